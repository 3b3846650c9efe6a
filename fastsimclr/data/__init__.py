"""Data loading: `open_views` returns an iterable of augmented batches for any dataset and backend."""

from typing import TYPE_CHECKING

from fastsimclr._lazy import export

if TYPE_CHECKING:
    from fastsimclr.data.backends import choose_backend
    from fastsimclr.data.dataset import open_views
    from fastsimclr.data.loader import Batch, ViewLoader
    from fastsimclr.data.opening import open_source
    from fastsimclr.data.sources import Source

__all__ = ["Batch", "Source", "ViewLoader", "choose_backend", "open_source", "open_views"]

__getattr__ = export(
    __name__,
    {
        "fastsimclr.data.backends": ["choose_backend"],
        "fastsimclr.data.dataset": ["open_views"],
        "fastsimclr.data.loader": ["Batch", "ViewLoader"],
        "fastsimclr.data.opening": ["open_source"],
        "fastsimclr.data.sources": ["Source"],
    },
)
