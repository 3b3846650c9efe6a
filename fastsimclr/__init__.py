"""SimCLR pre-training of image encoders, and contrastive losses for use in any training loop."""

from typing import TYPE_CHECKING

from fastsimclr._lazy import export
from fastsimclr.version import __version__

if TYPE_CHECKING:
    from fastsimclr.data.augmentation import Augmentation
    from fastsimclr.data.dataset import open_views
    from fastsimclr.data.loader import Batch
    from fastsimclr.errors import UserError
    from fastsimclr.loss import InfoNCELoss, NTXentLoss, SupConLoss, info_nce, nt_xent, sup_con
    from fastsimclr.models import SimCLR, projector
    from fastsimclr.optim import LARS
    from fastsimclr.pretrained import encoder, import_weights, load_encoder
    from fastsimclr.training.pretrain import pretrain

__all__ = [
    "LARS",
    "Augmentation",
    "Batch",
    "InfoNCELoss",
    "NTXentLoss",
    "SimCLR",
    "SupConLoss",
    "UserError",
    "__version__",
    "encoder",
    "import_weights",
    "info_nce",
    "load_encoder",
    "nt_xent",
    "open_views",
    "pretrain",
    "projector",
    "sup_con",
]

__getattr__ = export(
    __name__,
    {
        "fastsimclr.data.augmentation": ["Augmentation"],
        "fastsimclr.data.dataset": ["open_views"],
        "fastsimclr.data.loader": ["Batch"],
        "fastsimclr.errors": ["UserError"],
        "fastsimclr.loss": ["InfoNCELoss", "NTXentLoss", "SupConLoss", "info_nce", "nt_xent", "sup_con"],
        "fastsimclr.models": ["SimCLR", "projector"],
        "fastsimclr.optim": ["LARS"],
        "fastsimclr.pretrained": ["encoder", "import_weights", "load_encoder"],
        "fastsimclr.training.pretrain": ["pretrain"],
    },
)
