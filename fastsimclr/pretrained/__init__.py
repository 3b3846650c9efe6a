"""Load encoders from files: checkpoints of a run, exports, and other projects' checkpoints."""

from fastsimclr.pretrained.load import Pretrained, import_weights, load_encoder, load_state, open_pretrained

__all__ = ["Pretrained", "import_weights", "load_encoder", "load_state", "open_pretrained"]
