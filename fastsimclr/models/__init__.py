"""Encoders and the projection head."""

from fastsimclr.models.backbone import (
    Backbone,
    as_encoder,
    checkpoint_stages,
    count_features,
    import_module,
    unused_parameters,
)
from fastsimclr.models.cosine_filters import cosine_filters
from fastsimclr.models.registry import build, encoder_names, nearest_encoders, torchvision_options
from fastsimclr.models.resnet import ENCODERS, STANDARD_ENCODERS, STEMS, Encoder, resnet
from fastsimclr.models.running_statistics import discarded_statistics, divided_momentum
from fastsimclr.models.simclr import SimCLR, projector
from fastsimclr.models.spec import USER_MODULE, EncoderSpec
from fastsimclr.models.sync_batch_norm import synchronize_batch_norm

__all__ = [
    "ENCODERS",
    "STANDARD_ENCODERS",
    "STEMS",
    "USER_MODULE",
    "Backbone",
    "Encoder",
    "EncoderSpec",
    "SimCLR",
    "as_encoder",
    "build",
    "checkpoint_stages",
    "cosine_filters",
    "count_features",
    "discarded_statistics",
    "divided_momentum",
    "encoder_names",
    "import_module",
    "nearest_encoders",
    "projector",
    "resnet",
    "synchronize_batch_norm",
    "torchvision_options",
    "unused_parameters",
]
