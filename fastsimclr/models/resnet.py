"""torchvision's ResNets as encoders, with a width multiplier and a stem for small images."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastsimclr.errors import UserError
from fastsimclr.models.cpu_conv import SmallMapConv2d

_BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
ENCODERS = tuple(_BLOCKS)
STEMS = ("auto", "imagenet", "small")
SMALL_IMAGE = 64  # pixels: largest image size for which stem "auto" is "small"


class Encoder(ResNet):
    """ResNet without a classifier: images (N, 3, H, W) to representations h (N, out_features).

    The attributes name, width and stem ("imagenet" or "small") are its architecture: encoder(name, width, stem) builds
    the same one.
    """

    def __init__(self, name: str, width: float, stem: str) -> None:
        block, layers = _BLOCKS[name]
        nn.Module.__init__(self)  # ResNet's __init__ fixes the widths: build the same layers here, `width` times wider
        self.name, self.width, self.stem = name, width, stem
        self.transform: Callable[[Any], Tensor] | None = None
        channels = round(64 * width)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = channels, 1, 1, 64
        self.maxpool: nn.Module
        if stem == "small":  # for CIFAR, as in the paper's appendix B.9
            self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, channels, layers[0])
        self.layer2 = self._make_layer(block, 2 * channels, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * channels, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * channels, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Identity()
        self.out_features = 8 * channels * block.expansion

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if (module.kernel_size, module.padding) == ((3, 3), (1, 1)):
                    module.__class__ = SmallMapConv2d  # replaces only its forward
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):  # each block starts as the identity
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


def encoder(name: str, width: float = 1, stem: str = "auto", *, image_size: int = 224) -> Encoder:
    """Build a ResNet encoder: images (N, 3, H, W) to representations h (N, encoder.out_features), average-pooled.

    name: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
    width: width multiplier, applied to the channels of every layer; a multiple of 1/64 (1, 2 or 4 in the paper).
    stem: "imagenet" (7x7 convolution of stride 2, max-pooling), "small" (3x3 convolution of stride 1, no pooling; for
        CIFAR), or "auto": "small" for images of up to 64 pixels, otherwise "imagenet".
    image_size: side of the images in pixels; used only by stem "auto".

    With width 1 and stem "imagenet" the state dict is torchvision's without `fc`. The weights are randomly initialized.
    Raises ValueError for an unknown name or stem or an invalid width.
    """
    if name not in _BLOCKS:
        raise UserError(f"encoder: got {name!r}, expected one of {', '.join(ENCODERS)}")
    if stem not in STEMS:
        raise UserError(f"stem: got {stem!r}, expected one of {', '.join(STEMS)}")
    if width <= 0 or 64 * width % 1 != 0:
        raise UserError(f"width: got {width!r}, expected a positive multiple of 1/64, such as 0.5, 1 or 2")
    if stem == "auto":
        stem = "small" if image_size <= SMALL_IMAGE else "imagenet"
    return Encoder(name, int(width) if width == int(width) else width, stem)
