"""Encoders and the projection head."""

from fastsimclr.models.registry import Backbone, as_encoder, build, encoder
from fastsimclr.models.resnet import ENCODERS, STEMS, Encoder, resnet
from fastsimclr.models.simclr import SimCLR, projector
from fastsimclr.models.spec import USER_MODULE, EncoderSpec
from fastsimclr.models.sync_batch_norm import synchronize_batch_norm

__all__ = [
    "ENCODERS",
    "STEMS",
    "USER_MODULE",
    "Backbone",
    "Encoder",
    "EncoderSpec",
    "SimCLR",
    "as_encoder",
    "build",
    "encoder",
    "projector",
    "resnet",
    "synchronize_batch_norm",
]
