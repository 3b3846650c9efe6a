"""Encoders, the projection head, and synchronized batch normalization."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from ranks import run_ranks
from torch import Tensor, nn

from fastsimclr import SimCLR, UserError, encoder, projector
from fastsimclr.distributed import World, neighbors
from fastsimclr.models import synchronize_batch_norm
from fastsimclr.models.cpu_conv import SmallMapConv2d
from fastsimclr.models.resnet import ENCODERS


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.slow
def test_state_dict_matches_torchvision_except_fc(name: str) -> None:
    ours = encoder(name)
    if name == "resnet10":
        theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    else:
        theirs = torchvision.models.get_model(name)
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert result.unexpected_keys == []
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    h = ours.eval()(images)
    torch.testing.assert_close(h, theirs.eval()(images), rtol=0, atol=0)
    assert h.shape == (2, ours.out_features)


@pytest.mark.parametrize(("width", "features", "parameters"), [(1, 2048, 23.5e6), (2, 4096, 93.9e6)])
def test_width_multiplies_every_layer(width: int, features: int, parameters: float) -> None:
    """As in the paper: 24 M parameters at width 1, 94 M at width 2."""
    model = encoder("resnet50", width)
    assert model.out_features == features
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_stems_for_small_images_keep_more_of_their_resolution() -> None:
    shapes = {}
    for stem in ("small", "medium", "imagenet"):
        model = encoder("resnet18", stem=stem)
        model.layer1.register_forward_hook(lambda _, __, out, stem=stem: shapes.update({stem: out.shape}))
        model(torch.zeros(2, 3, 32, 32))
    assert shapes["small"] == (2, 64, 32, 32)
    assert shapes["medium"] == (2, 64, 16, 16)
    assert shapes["imagenet"] == (2, 64, 8, 8)
    assert isinstance(encoder("resnet18", image_size=32).maxpool, nn.Identity)
    assert isinstance(encoder("resnet18", image_size=224).maxpool, nn.MaxPool2d)


def results_and_gradients(layer: nn.Module, forward: Callable[[Tensor], Tensor], *shape: int) -> list[Tensor]:
    """Return y, dx and dw in float64 for a fixed random input and output gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
    y = forward(x)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    return [y, *torch.autograd.grad(y, (x, layer.weight), dy)]


@pytest.mark.parametrize(
    ("shape", "stride"),
    # Feature maps whose output is one pixel, including 1x2 and 2x1; and the smallest whose output is larger.
    [((1, 1), 1), ((1, 1), 2), ((2, 2), 2), ((1, 2), 2), ((2, 1), 2), ((2, 1), 1), ((3, 3), 2)],
)
def test_one_pixel_convolution_matches_conv2d(shape: tuple[int, int], stride: int) -> None:
    layer = SmallMapConv2d(6, 5, 3, stride, padding=1, bias=False).double()
    expected = results_and_gradients(layer, functools.partial(nn.Conv2d.forward, layer), 4, 6, *shape)
    torch.testing.assert_close(results_and_gradients(layer, layer, 4, 6, *shape), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("images_per_row", [1, 2, 6])
@pytest.mark.parametrize(("shape", "stride"), [((2, 2), 1), ((4, 4), 1), ((8, 8), 2), ((7, 7), 2), ((5, 3), 1)])
def test_convolution_of_images_in_rows_matches_conv2d(shape: tuple[int, int], stride: int, images_per_row: int) -> None:
    layer = SmallMapConv2d(6, 5, 3, stride, padding=1, bias=False).double()
    expected = results_and_gradients(layer, functools.partial(nn.Conv2d.forward, layer), 12, 6, *shape)
    in_rows = results_and_gradients(layer, lambda x: layer._conv_rows(x, images_per_row), 12, 6, *shape)
    torch.testing.assert_close(in_rows, expected, rtol=1e-13, atol=1e-14)


def test_rows_are_recomputed_in_the_backward_and_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    original, padded = F.pad, list[weakref.ref[Tensor]]()

    def pad(*args: Any) -> Tensor:
        padded.append(weakref.ref(result := original(*args)))
        return result

    monkeypatch.setattr(F, "pad", pad)
    layer = SmallMapConv2d(6, 5, 3, padding=1, bias=False).double()
    x = torch.randn(12, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    y = layer._conv_rows(x, 4)
    assert [reference() for reference in padded] == [None]
    y.sum().backward()
    assert len(padded) > 1


def test_convolution_of_images_in_rows_supports_double_backward_and_torch_func() -> None:
    layer = SmallMapConv2d(6, 5, 3, padding=1, bias=False).double()
    x = torch.randn(4, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer._conv_rows(x, 4), x)

    def loss(x: Tensor) -> Tensor:
        return layer._conv_rows(x, 4).square().sum()

    batches = torch.stack([x, 2 * x])
    expected = torch.stack([torch.autograd.grad(loss(batch), batch)[0] for batch in batches])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batches), expected)


@pytest.mark.parametrize("images", [32, 3])  # two rows; too few images for rows
def test_bf16_convolution_matches_conv2d(images: int) -> None:
    torch.manual_seed(0)
    layer = SmallMapConv2d(64, 64, 3, padding=1, bias=False)
    x = torch.randn(images, 64, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = nn.Conv2d.forward(layer, x.float())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.01 * expected.norm()


def test_bf16_gradient_of_stride_two_over_one_pixel() -> None:
    """oneDNN of torch 2.14 reads past the input here, on CPUs with AMX. The last stage has such a layer if images have
    16 pixels."""
    images, features = 256, 64
    torch.manual_seed(0)
    layer = encoder("resnet18", stem="imagenet").layer2[0].conv1
    buffer = torch.full((3, images, features, 1, 1), torch.nan, dtype=torch.bfloat16)
    x = buffer[1].copy_(torch.randn(images, features, 1, 1))
    dy = torch.randn(images, 2 * features, 1, 1)
    (expected,) = torch.autograd.grad(layer(x.float()), layer.weight, dy)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    (got,) = torch.autograd.grad(y, layer.weight, dy.to(y.dtype))
    assert (got - expected).norm() < 0.02 * expected.norm()  # rounding alone gives 0.002


def test_residual_blocks_are_initialized_to_the_identity() -> None:
    model = encoder("resnet50")
    for name, module in model.named_modules():
        if name.endswith("bn3"):
            assert not module.weight.any(), name
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.all(), name


@pytest.mark.parametrize("layers", [2, 3])
def test_projector_has_batch_norm_after_each_layer(layers: int) -> None:
    head = projector(64, hidden=32, out=16, layers=layers)
    kinds = [type(module).__name__ for module in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * (layers - 1) + ["Linear", "BatchNorm1d"]
    z = SimCLR(nn.Flatten(), head)(torch.randn(8, 4, 4, 4))
    assert z.shape == (8, 16)
    torch.testing.assert_close(z.mean(0), torch.zeros(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: encoder("resnet20"),
        lambda: encoder("resnet18", 0),
        lambda: encoder("resnet18", stem="tiny"),
        lambda: projector(8, layers=4),
        lambda: projector(0),
    ],
)
def test_invalid_arguments_raise(make: object) -> None:
    with pytest.raises(ValueError, match=r"got .*expected"):
        make()  # type: ignore[operator]


def normalize_on_a_rank(
    rank: int, batches: list[Tensor], weight: Tensor, group_size: int | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    module = batch_norm(batches[0], weight)
    device = torch.device("cpu")
    synced = synchronize_batch_norm(module, device, neighbors(group_size, World(rank, len(batches), device)))
    x = batches[rank].clone().requires_grad_()
    y = synced(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {k: v.detach() for k, v in synced.state_dict().items()}


def normalize_bf16_on_a_rank(
    rank: int, batches: list[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    module = nn.BatchNorm2d(len(weight))
    module.weight.data.copy_(weight)
    x = batches[rank].clone().requires_grad_()
    y = synchronize_batch_norm(module, torch.device("cpu"))(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, module.state_dict()


def batch_norm(like: Tensor, weight: Tensor) -> nn.Module:
    module = nn.BatchNorm2d(len(weight)) if like.ndim == 4 else nn.BatchNorm1d(len(weight))
    module.double().weight.data.copy_(weight)
    return module


def assert_like_one_process(
    results: list[tuple[Tensor, Tensor, dict[str, Tensor]]], parts: list[Tensor], weight: Tensor
) -> None:
    batch = torch.cat(parts)
    x = batch.clone().requires_grad_()
    whole = batch_norm(batch, weight)
    y = whole(x)
    upstream = torch.cat([torch.arange(p.numel(), dtype=p.dtype).view_as(p).sin() for p in parts])
    (y * upstream).sum().backward()
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), x.grad, rtol=1e-10, atol=1e-12)
    for _, _, state in results:
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def parts_of_ranks(shape: tuple[int, ...], sizes: list[int]) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    return list(batch.split(sizes)), torch.rand(3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3, 2, 4), (5, 3)])
@pytest.mark.slow
def test_synchronized_batch_norm_matches_the_whole_batch(shape: tuple[int, ...]) -> None:
    parts, weight = parts_of_ranks(shape, [2, 3])  # different batch sizes on the ranks
    assert_like_one_process(run_ranks(2, normalize_on_a_rank, parts, weight), parts, weight)


@pytest.mark.slow
def test_synchronized_batch_norm_of_bf16_has_float32_statistics() -> None:
    parts = [part.float().bfloat16() for part in parts_of_ranks((40, 3, 8, 8), [15, 25])[0]]
    weight = torch.tensor([0.5, 1.0, 2.0])
    batch = torch.cat(parts)
    expected = nn.BatchNorm2d(3)
    expected(batch.float())
    for of_rank, part in zip(run_ranks(2, normalize_bf16_on_a_rank, parts, weight), parts, strict=True):
        y, dx, state = of_rank
        mean, variance = batch.float().mean((0, 2, 3)), batch.float().var((0, 2, 3), correction=0)
        plain = F.batch_norm(part.float(), mean, variance, weight)
        assert y.dtype == dx.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), plain, rtol=1e-2, atol=1e-2)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(state[name], expected.get_buffer(name), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_groups_of_ranks_have_statistics_of_their_own() -> None:
    parts, weight = parts_of_ranks((9, 3, 2, 4), [2, 3, 1, 3])
    results = run_ranks(4, normalize_on_a_rank, parts, weight, 2)
    for group in (slice(0, 2), slice(2, 4)):
        assert_like_one_process(results[group], parts[group], weight)


def test_groups_must_divide_the_ranks() -> None:
    world = World(0, 6, torch.device("cpu"))
    assert neighbors(None, world) is neighbors(6, world) is None
    with pytest.raises(UserError, match=r"--model.bn_group: got 4, expected a divisor of the number of ranks, 6"):
        neighbors(4, world)
