"""The backends that decode and crop images, and which of them "auto" takes."""

import importlib.util
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

    from fastsimclr.data.sources import Source

Backend = Literal["auto", "dali", "torchvision", "memory"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def choose_backend(source: "Source", device: "torch.device") -> tuple[str, str]:
    """The backend that "auto" takes for these images on this device, and the reason."""
    from fastsimclr.data.memory import fits_in_memory
    from fastsimclr.data.sources import ArraySource, EncodedSource

    if isinstance(source, ArraySource):
        return "memory", "the images are small and decoded"
    if isinstance(source, EncodedSource) and fits_in_memory(source):
        return "memory", "the images are small and of one size"
    if device.type != "cuda":
        return "torchvision", "without a GPU it decodes as fast as DALI"
    # find_spec raises, and does not return None, for a submodule of a package that is not installed.
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "torchvision", "DALI is not installed"
    return "dali", "it decodes on the GPU"
