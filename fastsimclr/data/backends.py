"""The backends that decode and crop images, and the choice made by "auto"."""

import importlib.util
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

    from fastsimclr.data.sources import Source

Backend = Literal["auto", "dali", "torchvision", "memory"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def choose_backend(source: "Source", device: "torch.device") -> tuple[str, str]:
    """Return the backend that "auto" selects for `source` and `device`, and the reason."""
    from fastsimclr.data.memory import fits_in_memory
    from fastsimclr.data.sources import ArraySource, DecodedSource

    if fits_in_memory(source):
        return "memory", f"the images are small and {'decoded' if isinstance(source, ArraySource) else 'of one size'}"
    if isinstance(source, DecodedSource):
        return "torchvision", "the images come decoded, and are not small or not in memory"
    if device.type != "cuda":
        return "torchvision", "it decodes as fast as DALI on a CPU"
    # For a submodule of a package that is not installed, find_spec raises instead of returning None.
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "torchvision", "DALI is not installed"
    return "dali", "it decodes on the GPU"
