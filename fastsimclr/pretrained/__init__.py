"""Load encoders from files: checkpoints of a run, exports, and other projects' checkpoints."""

from fastsimclr.pretrained.initialize import encoder, initialize
from fastsimclr.pretrained.load import Pretrained, import_weights, load_encoder, open_pretrained

__all__ = ["Pretrained", "encoder", "import_weights", "initialize", "load_encoder", "open_pretrained"]
