"""torchvision's ResNets as encoders, with a width multiplier and stems for small images."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastsimclr.errors import UserError
from fastsimclr.models.cpu_conv import SmallMapConv2d
from fastsimclr.models.spec import EncoderSpec

_BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
ENCODERS = tuple(_BLOCKS)
STANDARD_ENCODERS = ENCODERS[1:]  # which torchvision and timm have under the same names
STEMS = ("auto", "imagenet", "medium", "small")
_FIRST_CONV = {"imagenet": (7, 2), "medium": (5, 2), "small": (3, 1)}  # size and stride; small: paper, appendix B.9
SMALL_IMAGE = 40  # pixels: largest image size for which stem "auto" is "small"


class Encoder(ResNet):
    """ResNet without a classifier: images (N, 3, H, W) to representations h (N, out_features).

    spec: its architecture; `build(spec)` builds the same one.
    """

    grad_checkpointing: bool = False

    def __init__(self, spec: EncoderSpec) -> None:
        width, stem, channels = spec.width, spec.stem, spec.channels
        block, layers = _BLOCKS[spec.name]
        nn.Module.__init__(self)  # ResNet's __init__ fixes the widths: build the same layers here, `width` times wider
        self.spec = spec
        self.transform: Callable[[Any], Tensor] | None = None
        features = round(64 * width)  # of the first stage
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = features, 1, 1, 64
        size, stride = _FIRST_CONV[stem]
        self.conv1 = nn.Conv2d(channels, self.inplanes, size, stride, padding=size // 2, bias=False)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, features, layers[0])
        self.layer2 = self._make_layer(block, 2 * features, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * features, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * features, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Identity()
        self.out_features = 8 * features * block.expansion

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if (module.kernel_size, module.padding) == ((3, 3), (1, 1)):
                    module.__class__ = SmallMapConv2d  # replaces only its forward
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):  # each block starts as the identity
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each residual stage for the backward pass, which computes the stage again.

        The name is timm's. The second computation updates the running statistics of batch normalization again, unless
        the backward pass runs in `fastsimclr.models.discarded_statistics`.
        """
        self.grad_checkpointing = enable

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            recomputes = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(stage, x, use_reentrant=False) if recomputes else stage(x)
        h: Tensor = self.fc(self.avgpool(x).flatten(1))
        return h


def resnet(spec: EncoderSpec) -> Encoder:
    """Build a ResNet of ours. spec.stem may be "auto"."""
    name, width, stem = spec.name, spec.width, spec.stem
    if name not in _BLOCKS:
        raise UserError(f"encoder: got {name!r}, expected one of {', '.join(ENCODERS)}")
    if stem not in STEMS:
        raise UserError(f"stem: got {stem!r}, expected one of {', '.join(STEMS)}")
    if width <= 0 or 64 * width % 1 != 0:
        raise UserError(f"width: got {width!r}, expected a positive multiple of 1/64, such as 0.5, 1 or 2")
    if stem == "auto":
        stem = "small" if spec.image_size <= SMALL_IMAGE else "imagenet"
    return Encoder(replace(spec, width=int(width) if width == int(width) else width, stem=stem))
