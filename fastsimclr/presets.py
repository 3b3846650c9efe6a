"""Where the presets are: configs/ beside the package in a checkout, inside it when installed."""

from importlib.resources import files
from pathlib import Path

from fastsimclr.errors import UserError


def preset_file(name: str) -> Path:
    """The YAML file of preset `name`. Raises UserError if there is none."""
    for folder in (files("fastsimclr") / "configs", files("fastsimclr") / ".." / "configs"):
        file = Path(str(folder)) / f"{name}.yaml"
        if file.is_file():
            return file
    raise UserError(f"--config: got {name!r}, expected a YAML file or the name of a preset in configs/")
