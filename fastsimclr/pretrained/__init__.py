"""Load encoders from files: checkpoints of a run, exports, and other projects' checkpoints."""

from fastsimclr.pretrained.load import TIMM_FILES, Pretrained, import_weights, load_encoder, open_pretrained

__all__ = ["TIMM_FILES", "Pretrained", "import_weights", "load_encoder", "open_pretrained"]
