"""Presets: the YAML files in configs/, by name."""

from pathlib import Path

from fastsimclr.errors import UserError

CONFIGS = Path(__file__).with_name("configs")


def preset_file(name: str) -> Path:
    """The YAML file of preset `name`. Raises UserError if there is none."""
    file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise UserError(f"--config: got {name!r}, expected a YAML file or one of the presets {names}")
    return file
