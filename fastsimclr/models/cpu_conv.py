"""3x3 convolutions of small feature maps on a CPU, rewritten into operations that oneDNN computes faster."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

# As measured: for wider outputs oneDNN is as fast without rows.
MAX_IMAGES_PER_ROW, MIN_IMAGES_PER_ROW, MAX_OUTPUT_WIDTH = 16, 4, 7


class SmallMapConv2d(nn.Conv2d):
    """3x3 convolution with padding 1, with faster implementations for small feature maps on a CPU.

    oneDNN is slow on such maps. ResNet's last stages have them, and took most of a step at 32 pixels
    (benchmarks/NOTES.md).
    """

    def forward(self, input: Tensor) -> Tensor:
        images, _, height, width = input.shape
        if torch.compiler.is_exporting():
            return super().forward(input)  # the exported graph must not depend on the size of this input
        if height <= self.stride[0] and width <= self.stride[1]:
            return self._conv_one_pixel(input)
        images_per_row = math.gcd(images, MAX_IMAGES_PER_ROW)
        in_bf16 = input.dtype == torch.bfloat16 and input.device.type == "cpu"
        if in_bf16 and width <= self.stride[1] * MAX_OUTPUT_WIDTH and images_per_row >= MIN_IMAGES_PER_ROW:
            return self._conv_rows(input, images_per_row)
        return super().forward(input)

    def _conv_one_pixel(self, input: Tensor) -> Tensor:
        """Compute a 1x1 output as a matrix product with the taps that see no padding: 1 of 9 for a 1x1 map, 4 for 2x2.

        This also avoids oneDNN's bf16 gradient of a convolution of stride 2 with a 1x1 output, which in torch 2.14
        reads past the end of its input on CPUs with AMX.
        """
        height, width = input.shape[2:]
        taps = self.weight[:, :, 1 : 1 + height, 1 : 1 + width]
        # In the order of a channels-last map, which then needs no copy.
        return F.linear(input.permute(0, 2, 3, 1).flatten(1), taps.permute(0, 2, 3, 1).flatten(1))[:, :, None, None]

    def _conv_rows(self, input: Tensor, images_per_row: int) -> Tensor:
        """Convolve rows of images side by side, separated by padding: oneDNN is fast on wide maps."""
        # Cast here, as autocast does not apply inside an autograd.Function.
        maps: Tensor = _RowConv2d.apply(input, self.weight.to(input.dtype), self.stride[1], images_per_row)
        return maps


class _RowConv2d(torch.autograd.Function):
    """Convolution of rows of images. It saves the input maps, which the network saves anyway, and rebuilds the rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, stride: int, images_per_row: int) -> Tensor:
        width = maps.shape[3]
        rows = _to_rows(maps, images_per_row, stride * _period(width, stride))
        outputs = F.conv2d(rows, weight, stride=stride, padding=1)
        return _from_rows(outputs, images_per_row, -(-width // stride))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        maps, weight, ctx.stride, ctx.images_per_row = inputs
        ctx.save_for_backward(maps, weight)

    @staticmethod
    def backward(ctx: Any, dmaps: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        maps, weight = ctx.saved_tensors
        stride, width = ctx.stride, maps.shape[3]
        period = _period(width, stride)
        rows = _to_rows(maps, ctx.images_per_row, stride * period)
        doutputs = _to_rows(dmaps, ctx.images_per_row, period)
        dinput = dweight = None
        if ctx.needs_input_grad[0]:
            dinput = _from_rows(conv2d_input(rows.shape, weight, doutputs, stride, 1), ctx.images_per_row, width)
        if ctx.needs_input_grad[1]:
            dweight = conv2d_weight(rows, weight.shape, doutputs, stride, 1)
        return dinput, dweight, None, None


def _period(width: int, stride: int) -> int:
    """Return the distance in pixels between images in a row of outputs.

    In a row of inputs it is `stride` times that, at least one pixel more than the width of an image.
    """
    return -(-(width + 1) // stride)


def _to_rows(maps: Tensor, images_per_row: int, period: int) -> Tensor:
    """Join maps (N, C, H, W) into rows (N / images_per_row, C, H, images_per_row * period), zeros after each image."""
    images = maps.permute(0, 2, 3, 1).unflatten(0, (-1, images_per_row))  # (rows, images_per_row, H, W, C)
    rows = F.pad(images.transpose(1, 2), (0, 0, 0, period - maps.shape[3])).flatten(2, 3)
    return rows.permute(0, 3, 1, 2)


def _from_rows(rows: Tensor, images_per_row: int, width: int) -> Tensor:
    """Split rows into maps (N, C, H, width); the inverse of _to_rows."""
    images = rows.permute(0, 2, 3, 1).unflatten(2, (images_per_row, -1))[:, :, :, :width]
    return images.transpose(1, 2).flatten(0, 1).permute(0, 3, 1, 2)
