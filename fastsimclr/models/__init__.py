"""Encoders and the projection head."""

from fastsimclr.models.resnet import ENCODERS, STEMS, Encoder, encoder
from fastsimclr.models.simclr import SimCLR, projector
from fastsimclr.models.sync_batch_norm import synchronise_batch_norm

__all__ = ["ENCODERS", "STEMS", "Encoder", "SimCLR", "encoder", "projector", "synchronise_batch_norm"]
