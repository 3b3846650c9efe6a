"""SimCLR pre-training of image encoders, and the NT-Xent loss for use in any training loop."""

from typing import TYPE_CHECKING

from fastsimclr._lazy import export
from fastsimclr.version import __version__

if TYPE_CHECKING:
    from fastsimclr.data.augmentation import Augmentation
    from fastsimclr.data.dataset import open_views
    from fastsimclr.data.loader import Batch
    from fastsimclr.errors import UserError
    from fastsimclr.loss import NTXentLoss, nt_xent
    from fastsimclr.models import SimCLR, projector
    from fastsimclr.optim import LARS
    from fastsimclr.pretrained import encoder, import_weights, load_encoder
    from fastsimclr.training.pretrain import pretrain

__all__ = [
    "LARS",
    "Augmentation",
    "Batch",
    "NTXentLoss",
    "SimCLR",
    "UserError",
    "__version__",
    "encoder",
    "import_weights",
    "load_encoder",
    "nt_xent",
    "open_views",
    "pretrain",
    "projector",
]

__getattr__ = export(
    __name__,
    {
        "fastsimclr.data.augmentation": ["Augmentation"],
        "fastsimclr.data.dataset": ["open_views"],
        "fastsimclr.data.loader": ["Batch"],
        "fastsimclr.errors": ["UserError"],
        "fastsimclr.loss": ["NTXentLoss", "nt_xent"],
        "fastsimclr.models": ["SimCLR", "projector"],
        "fastsimclr.optim": ["LARS"],
        "fastsimclr.pretrained": ["encoder", "import_weights", "load_encoder"],
        "fastsimclr.training.pretrain": ["pretrain"],
    },
)
