"""Load encoders from files: checkpoints of a run, exports, and other projects' checkpoints."""

from fastsimclr.pretrained.initialize import encoder, initialize
from fastsimclr.pretrained.libraries import classifier_name, describe, tensors
from fastsimclr.pretrained.load import (
    Pretrained,
    import_weights,
    load_encoder,
    load_state,
    open_checkpoint,
    open_pretrained,
)

__all__ = [
    "Pretrained",
    "classifier_name",
    "describe",
    "encoder",
    "import_weights",
    "initialize",
    "load_encoder",
    "load_state",
    "open_checkpoint",
    "open_pretrained",
    "tensors",
]
