"""fastsimclr: SimCLR pre-training of image encoders, and the NT-Xent loss on its own."""

from fastsimclr.data import Batch, open_views
from fastsimclr.data.augmentation import Views
from fastsimclr.errors import UserError
from fastsimclr.loss import NTXentLoss, nt_xent
from fastsimclr.models import SimCLR, encoder, projector
from fastsimclr.optim import LARS
from fastsimclr.pretrained import import_weights, load_encoder
from fastsimclr.version import __version__

__all__ = [
    "LARS",
    "Batch",
    "NTXentLoss",
    "SimCLR",
    "UserError",
    "Views",
    "__version__",
    "encoder",
    "import_weights",
    "load_encoder",
    "nt_xent",
    "open_views",
    "projector",
]
