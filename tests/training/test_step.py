"""Micro-batches of encoders with dropout and drop-path."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsimclr import NTXentLoss, SimCLR, projector
from fastsimclr.models import as_encoder
from fastsimclr.precision import choose_precision
from fastsimclr.training.step import Outputs, Step


class Recorded(nn.Module):
    """A module that keeps its outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.outputs = module, list[Tensor]()

    def forward(self, images: Tensor) -> Any:
        self.outputs.append(self.module(images))
        return self.outputs[-1]


def droppy_model(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.LayerNorm([16, 3, 3]), nn.Dropout(dropout), nn.Flatten())
    made = as_encoder(layers, image_size=8, channels=3)
    model = SimCLR(made, projector(made.out_features, 8, 8))
    model.projector.eval()  # batch norm of micro-batches differs from that of the whole batch
    return model.double()


def step(model: nn.Module, micro_batch_size: int | None, outputs: Outputs | None = None) -> Step:
    precision = choose_precision("fp64", torch.device("cpu"))
    scaler = precision.grad_scaler(torch.device("cpu"))
    return Step(model, NTXentLoss(), precision, micro_batch_size, scaler, outputs)


def views() -> list[Tensor]:
    return list(torch.randn(2, 10, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def test_both_passes_of_a_micro_batch_have_the_same_dropout_masks() -> None:
    model = droppy_model(0.5)
    recorded = Recorded(model)
    torch.manual_seed(2)
    step(recorded, 4).backward(views(), 10)
    first, second = recorded.outputs[:3], recorded.outputs[3:]
    assert not torch.equal(first[0][:3], first[1][:3])
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_are_those_of_the_masks_of_the_first_pass() -> None:
    """The masks of three micro-batches, applied to the whole batch, give the same gradients."""
    model = droppy_model(0.5)
    masks: list[Tensor] = []
    dropout = model.encoder.module[2]
    hook = dropout.register_forward_hook(lambda _, inputs, output: masks.append(output.detach() / inputs[0].detach()))
    torch.manual_seed(2)
    loss = step(model, 4).backward(views(), 10)
    gradients = [parameter.grad for parameter in model.parameters()]
    hook.remove()

    pieces = [mask.chunk(2) for mask in masks[:3]]  # the two views of each micro-batch
    whole = torch.cat([*(first for first, _ in pieces), *(second for _, second in pieces)])
    dropout.register_forward_hook(lambda _, inputs, output: inputs[0] * whole)
    model.zero_grad()
    torch.testing.assert_close(step(model, None).backward(views(), 10), loss)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_step_draws_new_masks_after_the_last(micro_batch_size: int | None) -> None:
    recorded = Recorded(droppy_model(0.5))
    for _ in range(2):
        step(recorded, micro_batch_size).backward(views(), 10)
    assert not torch.equal(recorded.outputs[0], recorded.outputs[len(recorded.outputs) // 2])


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_outputs_are_kept(micro_batch_size: int | None) -> None:
    """Those of all micro-batches and views, also of a view with a forward pass of its own, of the latest step only."""
    model = droppy_model(0.0)
    kept = step(model, micro_batch_size, Outputs())
    first, second = views()
    small = second[:, :, :7, :7]
    kept.backward([second, first], 10)
    kept.backward([first, small, second], 10)
    assert kept.outputs is not None
    with torch.no_grad():
        torch.testing.assert_close(kept.outputs.z, [model(view) for view in (first, small, second)])
        torch.testing.assert_close(kept.outputs.h, model.encoder(first))
