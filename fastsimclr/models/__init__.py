"""Encoders and the projection head."""

from fastsimclr.models.resnet import ENCODERS, STEMS, Encoder, encoder
from fastsimclr.models.simclr import SimCLR, projector
from fastsimclr.models.sync_batch_norm import synchronize_batch_norm

__all__ = ["ENCODERS", "STEMS", "Encoder", "SimCLR", "encoder", "projector", "synchronize_batch_norm"]
