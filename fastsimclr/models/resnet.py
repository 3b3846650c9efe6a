"""torchvision's ResNets as encoders: any width, and a stem for small images."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastsimclr.errors import UserError

_BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
ENCODERS = tuple(_BLOCKS)
STEMS = ("auto", "imagenet", "small")
SMALL_IMAGE = 64  # pixels: up to this side, "auto" takes the small stem
# What pays, as measured: of outputs that are wider, oneDNN computes single images as fast.
IMAGES_A_ROW, FEWEST_A_ROW, WIDEST_IN_ROWS = 16, 4, 7


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution, padded by 1, that a CPU computes in other forms where maps are small: there oneDNN is slow.

    ResNet's last stages have such maps, and took most of a step at 32 pixels (benchmarks/NOTES.md).
    """

    def forward(self, input: Tensor) -> Tensor:
        images, _, height, width = input.shape
        if torch.compiler.is_exporting():
            return super().forward(input)  # a graph is to take images of any size, so it must not depend on this one's
        if height <= self.stride[0] and width <= self.stride[1]:
            return self._one_pixel(input)
        images_a_row = math.gcd(images, IMAGES_A_ROW)
        in_bf16 = input.dtype == torch.bfloat16 and input.device.type == "cpu"
        if in_bf16 and width <= self.stride[1] * WIDEST_IN_ROWS and images_a_row >= FEWEST_A_ROW:
            return self._in_rows(input, images_a_row)
        return super().forward(input)

    def _one_pixel(self, input: Tensor) -> Tensor:
        """As a matrix product of the taps that meet no padding: 1 of 9 on a map of 1x1, 4 on one of 2x2.

        So oneDNN's bf16 gradient of a stride of 2 over one pixel is not met, which in torch 2.14 reads behind its input
        on CPUs with AMX.
        """
        height, width = input.shape[2:]
        taps = self.weight[:, :, 1 : 1 + height, 1 : 1 + width]
        # Pixel by pixel, which of a channels-last map needs no copy.
        return F.linear(input.permute(0, 2, 3, 1).flatten(1), taps.permute(0, 2, 3, 1).flatten(1))[:, :, None, None]

    def _in_rows(self, input: Tensor, images_a_row: int) -> Tensor:
        """On rows of images side by side, the padding between them: on wide maps oneDNN's kernels are fast."""
        # Cast here, as autocast does not reach into a Function.
        maps: Tensor = _ConvolutionInRows.apply(input, self.weight.to(input.dtype), self.stride[1], images_a_row)
        return maps


class _ConvolutionInRows(torch.autograd.Function):
    """Keeps maps for its backward, which the network keeps anyway, and makes their rows again there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, stride: int, images_a_row: int) -> Tensor:
        width = maps.shape[3]
        rows = _side_by_side(maps, images_a_row, stride * _period(width, stride))
        outputs = F.conv2d(rows, weight, stride=stride, padding=1)
        return _apart(outputs, images_a_row, -(-width // stride))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        maps, weight, ctx.stride, ctx.images_a_row = inputs
        ctx.save_for_backward(maps, weight)

    @staticmethod
    def backward(ctx: Any, dmaps: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        maps, weight = ctx.saved_tensors
        stride, width = ctx.stride, maps.shape[3]
        period = _period(width, stride)
        rows = _side_by_side(maps, ctx.images_a_row, stride * period)
        doutputs = _side_by_side(dmaps, ctx.images_a_row, period)
        dinput = dweight = None
        if ctx.needs_input_grad[0]:
            dinput = _apart(conv2d_input(rows.shape, weight, doutputs, stride, 1), ctx.images_a_row, width)
        if ctx.needs_input_grad[1]:
            dweight = conv2d_weight(rows, weight.shape, doutputs, stride, 1)
        return dinput, dweight, None, None


def _period(width: int, stride: int) -> int:
    """From image to image in a row of outputs; in one of inputs it is so many strides, at least one pixel more than an
    image."""
    return -(-(width + 1) // stride)


def _side_by_side(maps: Tensor, images_a_row: int, period: int) -> Tensor:
    """(N, C, H, W) to rows (N / images_a_row, C, H, images_a_row * period), zeros behind each image."""
    images = maps.permute(0, 2, 3, 1).unflatten(0, (-1, images_a_row))  # (rows, in a row, H, W, C)
    rows = F.pad(images.transpose(1, 2), (0, 0, 0, period - maps.shape[3])).flatten(2, 3)
    return rows.permute(0, 3, 1, 2)


def _apart(rows: Tensor, images_a_row: int, width: int) -> Tensor:
    """The reverse, of images of that width."""
    images = rows.permute(0, 2, 3, 1).unflatten(2, (images_a_row, -1))[:, :, :, :width]
    return images.transpose(1, 2).flatten(0, 1).permute(0, 3, 1, 2)


class Encoder(ResNet):
    """A ResNet without its classifier: images (N, 3, H, W) to representations h (N, out_features).

    name, width and stem ("imagenet" or "small") say how it is built: encoder(name, width, stem) is another such.
    """

    def __init__(self, name: str, width: int, stem: str) -> None:
        block, layers = _BLOCKS[name]
        nn.Module.__init__(self)  # ResNet's own __init__ fixes the widths: the same layers follow, `width` times wider
        self.name, self.width, self.stem = name, width, stem
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = 64 * width, 1, 1, 64
        self.maxpool: nn.Module
        if stem == "small":  # CIFAR's, as in the paper's appendix B.9
            self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, 64 * width, layers[0])
        self.layer2 = self._make_layer(block, 128 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 256 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 512 * width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Identity()
        self.out_features = 512 * width * block.expansion

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if (module.kernel_size, module.padding) == ((3, 3), (1, 1)):
                    module.__class__ = SmallMapConv2d  # another forward, all else as torchvision made it
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):  # each block begins as the identity
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


def encoder(name: str, width: int = 1, stem: str = "auto", *, image_size: int = 224) -> Encoder:
    """A ResNet encoder: images (N, 3, H, W) to representations h (N, encoder.out_features) after average pooling.

    name: resnet18, resnet34, resnet50, resnet101 or resnet152.
    width: multiplies every layer's channels (paper: 1, 2, 4).
    stem: "imagenet" (7x7 of stride 2, max-pool), "small" (3x3 of stride 1, no pool; for CIFAR), "auto": small where
        `image_size` is at most 64. At width 1 and stem "imagenet" the state dict is torchvision's, `fc` apart.
    Raises ValueError for an unknown name, stem or width.
    """
    if name not in _BLOCKS:
        raise UserError(f"encoder: got {name!r}, expected one of {', '.join(ENCODERS)}")
    if stem not in STEMS:
        raise UserError(f"stem: got {stem!r}, expected one of {', '.join(STEMS)}")
    if width < 1 or int(width) != width:
        raise UserError(f"width: got {width!r}, expected a whole number from 1")
    if stem == "auto":
        stem = "small" if image_size <= SMALL_IMAGE else "imagenet"
    return Encoder(name, int(width), stem)
