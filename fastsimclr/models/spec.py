"""How an encoder is built."""

from dataclasses import dataclass

USER_MODULE = "module"
"""The name of a user's module in an EncoderSpec: only the user can build it."""


@dataclass(frozen=True)
class EncoderSpec:
    """How an encoder is built: arguments of `fastsimclr.encoder`."""

    name: str
    """A ResNet of ours ("resnet50"), "timm/NAME", "torchvision/NAME", or "module" for a user's module."""
    width: float = 1
    """Width multiplier; only for our ResNets."""
    stem: str = "imagenet"
    """First layers: "imagenet", "medium" or "small"; only for our ResNets."""
    image_size: int = 224
    """Height and width of the images, which fix the position embeddings of a ViT."""
    channels: int = 3
    """Channels of the images."""
