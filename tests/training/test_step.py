"""Steps in micro-batches, with dropout, batch normalization and several ranks; and checkpointed stages."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fastsimclr import NTXentLoss, SimCLR, UserError, encoder, projector
from fastsimclr.models import as_encoder, checkpoint_stages, synchronize_batch_norm
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


def step(model: nn.Module, micro_batch_size: int | None, outputs: Outputs | None = None, **options: Any) -> Step:
    precision = choose_precision("fp64", torch.device("cpu"))
    scaler = precision.grad_scaler(torch.device("cpu"))
    return Step(model, NTXentLoss(group="world"), precision, micro_batch_size, scaler, outputs, **options)


def views(images: int = 10, side: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(2, images, 3, side, side, dtype=torch.float64, generator=generator))


def gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of all parameters."""
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return found  # type: ignore[return-value]


def assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


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


# Batch normalization


def test_micro_batches_move_the_running_statistics_as_one_batch() -> None:
    """Micro-batches of 4, 3 and 3 images: two views each, in one forward pass. 0.9 of the old statistics remain."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = SimCLR(as_encoder(nn.Sequential(conv, norm), image_size=8, channels=3), nn.Linear(4, 8)).double()
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    expected_mean, expected_variance = torch.zeros_like(mean), torch.ones_like(variance)
    for piece in zip(*(view.split([4, 3, 3]) for view in views()), strict=True):
        maps = conv(torch.cat(piece)).detach()
        expected_mean.lerp_(maps.mean((0, 2, 3)), 1 - 0.9 ** (1 / 3))
        expected_variance.lerp_(maps.var((0, 2, 3)), 1 - 0.9 ** (1 / 3))
    step(model, 4).backward(views(), 10)
    assert norm.num_batches_tracked == 3
    assert norm.momentum == 0.1
    assert norm.running_mean is mean
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected_variance)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_checkpointed_stages_change_neither_gradients_nor_statistics(
    one_thread: None, name: str, micro_batch_size: int | None
) -> None:
    torch.manual_seed(0)
    body = encoder(name, 0.25 if name.startswith("resnet") else 1, image_size=16)
    plain = SimCLR(body, projector(body.out_features, 8, 8)).double()
    plain.load_state_dict({key: value + 0.1 for key, value in plain.state_dict().items()})  # no gamma is zero
    model = copy.deepcopy(plain)
    checkpoint_stages(model.encoder)  # type: ignore[arg-type]
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    network: Any = getattr(model.encoder, "module", model.encoder)
    (network.layer2[0] if hasattr(network, "layer2") else network.blocks[1]).register_forward_pre_hook(count)
    loss = step(model, micro_batch_size, recomputes=True).backward(views(10, 16), 10)
    assert passes == (2 if micro_batch_size is None else 9)  # of three micro-batches: without a graph, with one, again

    torch.testing.assert_close(step(plain, micro_batch_size).backward(views(10, 16), 10), loss, rtol=0, atol=1e-10)
    assert_close(gradients(model), gradients(plain))
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/dla46_c", "module"])
def test_checkpointing_is_refused_where_there_is_none(name: str) -> None:
    made = as_encoder(nn.Flatten(), image_size=32, channels=3) if name == "module" else encoder(name, image_size=32)
    with pytest.raises(UserError, match=f"--model.checkpoint_stages: got {name}, expected resnet10 to resnet152, or"):
        checkpoint_stages(made)


# Exactness


def model_without_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten())
    made = as_encoder(layers, image_size=8, channels=3)
    return SimCLR(made, nn.Sequential(nn.Linear(made.out_features, 16), nn.ReLU(), nn.Linear(16, 8))).double()


@pytest.mark.parametrize("micro_batch_size", [1, 3, 7])
def test_micro_batches_equal_the_whole_batch(micro_batch_size: int) -> None:
    whole, parts = model_without_batch_norm(), model_without_batch_norm()
    loss = step(whole, None).backward(views(21), 21)
    assert_close([step(parts, micro_batch_size).backward(views(21), 21)], [loss])
    assert_close(gradients(parts), gradients(whole))


def steps_on_rank(rank: int, world_size: int) -> list[tuple[list[Tensor], int]]:
    """Return the gradients and the number of reductions of steps in micro-batches of different sizes."""
    own = [view.tensor_split(world_size)[rank] for view in views(21)]
    results = []
    for micro_batch_size in (None, 1, 3, 7):
        model, reductions = DistributedDataParallel(model_without_batch_norm(), gradient_as_bucket_view=True), 0

        def reduce(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            nonlocal reductions
            reductions += 1
            return allreduce_hook(group, bucket)

        model.register_comm_hook(None, reduce)
        step(model, micro_batch_size).backward(own, -(-21 // world_size))
        results.append((gradients(model), reductions))
    return results


def checkpointed_step_on_rank(rank: int, world_size: int) -> None:
    """Compare a step with checkpointed stages and synchronized batch normalization with one without checkpoints."""
    own = [view.tensor_split(world_size)[rank] for view in views(10, 16)]
    models = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model: Any = SimCLR(body := encoder("resnet18", 0.25, image_size=16), projector(body.out_features, 8, 8))
        model = DistributedDataParallel(synchronize_batch_norm(model.double(), torch.device("cpu")))
        body.set_grad_checkpointing(is_checkpointed)
        step(model, 3, recomputes=is_checkpointed).backward(own, -(-10 // world_size))
        models.append(model)
    plain, checkpointed = models
    assert_close(gradients(checkpointed), gradients(plain))
    for name, buffer in plain.named_buffers():
        assert torch.equal(checkpointed.get_buffer(name), buffer), name


def per_rank(rank: int, world_size: int) -> list[tuple[list[Tensor], int]]:
    checkpointed_step_on_rank(rank, world_size)
    return steps_on_rank(rank, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_micro_batches_on_ranks_equal_the_whole_batch(world_size: int) -> None:
    """Of 21 images, which no number of ranks divides; and the ranks reduce the gradients once per batch."""
    whole = model_without_batch_norm()
    step(whole, None).backward(views(21), 21)
    for results in run_ranks(world_size, per_rank, world_size):
        for ours, reductions in results:
            assert_close(ours, gradients(whole))
            assert reductions == 1  # there is one bucket
