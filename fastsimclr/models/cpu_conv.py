"""3x3 convolutions of small maps on a CPU, computed in forms in which oneDNN is faster."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

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

        This also avoids oneDNN's bf16 gradient of a stride of 2 over one pixel, which in torch 2.14 reads past the end
        of its input on CPUs with AMX.
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
