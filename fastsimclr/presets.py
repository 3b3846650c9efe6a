"""Presets: YAML files in configs/, selected by name."""

from pathlib import Path

from fastsimclr.errors import UserError

CONFIGS = Path(__file__).with_name("configs")


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """Return the YAML file of preset `name`. Raises UserError if it does not exist."""
    file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(preset_names())
        raise UserError(f"--config: got {name!r}, expected a YAML file or a preset: {names}")
    return file
