"""LARS against hand-computed steps, a per-tensor implementation and timm's Lars; and the torch.optim interface."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from timm.optim import Lars as TimmLars
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models import resnet18

from fastsimclr.optim import LARS, Muon, build_optimizer, is_norm_or_bias, learning_rate


def parameter(values: list[list[float]], grad: list[list[float]]) -> nn.Parameter:
    p = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    p.grad = torch.tensor(grad, dtype=torch.float64)
    return p


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.Flatten(), nn.Linear(96, 5)
    ).to(dtype)


def set_gradients(net: nn.Module, seed: int) -> None:
    """Set gradients of a cross-entropy loss on random images: BN makes them orthogonal to the first convolution's
    weights."""
    p = next(net.parameters())
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64).to(p.dtype)
    labels = torch.randint(5, (16,), generator=generator)
    net.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()


def reference_step(params: list[Tensor], velocities: list[Tensor], lr: float, weight_decay: float) -> None:
    """One step of lars_optimizer.py of google-research/simclr (classic momentum .9, eeta .001), tensor by tensor."""
    for w, v in zip(params, velocities, strict=True):
        g, rate = w.grad, 1.0
        if w.ndim > 1:
            g = g + weight_decay * w.detach()
            w_norm, g_norm = w.detach().norm().item(), g.norm().item()
            rate = 0.001 * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
        v.copy_(0.9 * v + lr * rate * g)
        w.data.copy_(w.data - v)


def test_one_step_by_hand() -> None:
    # g = (2.5, -5) + .5·(3, 4) = (4, -3); r = .1·5/5; v = 2·.1·g. With ‖grad‖ + wd·‖w‖ instead of ‖g‖, r were .062.
    w = parameter([[3.0, 4.0]], [[2.5, -5.0]])
    LARS([w], lr=2.0, weight_decay=0.5, trust_coefficient=0.1).step()
    torch.testing.assert_close(w.detach(), torch.tensor([[2.2, 4.6]], dtype=torch.float64))


def test_changed_learning_rate_keeps_the_momentum_buffer() -> None:
    # v = .2·(3, 4) = (.6, .8), w = (2.4, 3.2). Then g = (1.5, 2), r = .1·4/2.5 = .16, at lr 1: v = .9·(.6, .8) + .16·g
    # = (.78, 1.04). If lr were applied after the momentum, the second update would be 1·(.9·.1·(3, 4) + .16·g) =
    # (.51, .68).
    w = parameter([[3.0, 4.0]], [[1.5, 2.0]])
    optimizer = LARS([w], lr=2.0, weight_decay=0.5, trust_coefficient=0.1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    w.grad = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[1.62, 2.16]], dtype=torch.float64))


def test_excluded_tensors_use_plain_momentum_sgd() -> None:
    bias = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = LARS([bias], lr=0.5, weight_decay=0.5)
    for expected in ([0.5, 1.0], [-0.45, -0.9]):  # v = .5·(1, 2), then .9·(.5, 1) + .5·(1, 2) = (.95, 1.9)
        bias.grad = torch.tensor([1.0, 2.0])
        optimizer.step()
        torch.testing.assert_close(bias.detach(), torch.tensor(expected))


# As published; large enough to have an effect; and 0, which needs no scratch memory.
@pytest.mark.parametrize("weight_decay", [1e-6, 1e-2, 0.0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.slow
def test_equals_per_tensor_reference(weight_decay: float, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    # ResNet-18: 11 million adapted elements make several chunks, and four tensors are larger than a chunk.
    net = resnet18().double().to(memory_format=memory_format)
    params = list(net.parameters())
    other = [p.detach().clone().requires_grad_() for p in params]
    velocities = [torch.zeros_like(p) for p in other]
    optimizer = LARS(params, lr=4.0, weight_decay=weight_decay)
    for lr in (4.0, 1.0, 3.0):
        optimizer.param_groups[0]["lr"] = lr
        for p, q in zip(params, other, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        optimizer.step()
        reference_step(other, velocities, lr, weight_decay)
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)  # atol: weights of 1e-2 minus updates of up to 10


@pytest.mark.slow
def test_matches_timm() -> None:
    # timm multiplies by lr after the momentum, which is equivalent at a constant lr, and divides by ‖grad‖ + wd·‖w‖ +
    # 1e-8 where SimCLR divides by ‖g‖, g = grad + wd·w. The denominators differ by at most 2·wd·‖w‖ + 1e-8 (triangle
    # inequality): with equal gradients, the relative difference of a trust ratio is at most `delta`, and a tensor
    # deviates by at most delta times the sum of its updates' norms, including their repetition by the momentum.
    ours, theirs = conv_net(), conv_net()
    params = list(ours.parameters())
    adapted = [not is_norm_or_bias(p) for p in params]
    optimizer = LARS(params, lr=1.0)
    timm_optimizer = TimmLars(
        [
            {"params": [p for p in theirs.parameters() if not is_norm_or_bias(p)], "weight_decay": 1e-6},
            {"params": [p for p in theirs.parameters() if is_norm_or_bias(p)], "weight_decay": 0.0},
        ],
        lr=1.0,
        momentum=0.9,
    )
    delta, length, path = ([0.0] * len(params) for _ in range(3))
    previous = [torch.zeros_like(p) for p in params]
    for step in range(10):
        set_gradients(ours, seed=step)
        for i, (p, q) in enumerate(zip(params, theirs.parameters(), strict=True)):
            q.grad = p.grad.clone()
            if adapted[i]:
                w, g = p.detach(), p.grad + 1e-6 * p.detach()
                delta[i] = max(delta[i], ((2e-6 * w.norm() + 1e-8) / g.norm()).item())
        optimizer.step()
        timm_optimizer.step()
        # length[t] = .9·length[t-1] + ‖lr·r·g‖ bounds the momentum buffer; path, their sum, bounds how far w moves.
        for i, p in enumerate(params):
            buffer = optimizer.state[p]["momentum_buffer"]
            length[i] = 0.9 * length[i] + (buffer - 0.9 * previous[i]).norm().item()
            path[i] += length[i]
            previous[i] = buffer.clone()
    assert 0 < max(delta) < 1e-4  # the bound is not trivial
    for i, (p, q) in enumerate(zip(params, theirs.parameters(), strict=True)):
        # 1.01: second-order effect of the weights' different norms. 1e-14: float64 roundings of 10 steps.
        assert (p - q).norm().item() <= (1.01 * delta[i] + 1e-14) * path[i] + 1e-14 * p.norm().item()


def test_excludes_exactly_batch_norms_and_biases() -> None:
    torch.manual_seed(0)
    net = resnet18()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.full_like(p, 2.0)
    LARS(net.parameters(), lr=1.0, weight_decay=0.5).step()
    # The update is exactly lr · grad: neither decayed nor adapted.
    plain = {name for name, p in net.named_parameters() if torch.equal(p.detach(), before[name] - 2.0)}
    by_name = {name for name in before if "bn" in name or "downsample.1" in name or name.endswith("bias")}
    assert plain == by_name
    assert len(plain) == 41  # 20 BatchNorms, two tensors each, and fc.bias


def test_custom_exclude() -> None:
    a, b = parameter([[3.0, 4.0]], [[1.0, 1.0]]), parameter([[3.0, 4.0]], [[1.0, 1.0]])
    LARS([a, b], lr=1.0, exclude=lambda p: p is a).step()
    assert a.tolist() == [[2.0, 3.0]]
    assert b.tolist() != [[2.0, 3.0]]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_zero_norms_give_trust_ratio_one(weight_decay: float) -> None:
    w = parameter([[0.0, 0.0]], [[1.0, 2.0]])
    LARS([w], lr=0.5, weight_decay=weight_decay).step()
    assert w.tolist() == [[-0.5, -1.0]]
    w = parameter([[3.0, 4.0]], [[-3 * weight_decay, -4 * weight_decay]])  # g = 0, with and without decay
    LARS([w], lr=0.5, weight_decay=weight_decay).step()
    assert w.tolist() == [[3.0, 4.0]]


def test_step_does_not_modify_gradients_or_parameters_without_gradient() -> None:
    net = conv_net()
    set_gradients(net, seed=0)
    frozen = net[3].weight
    frozen.grad = None
    grads = {p: (p.grad, p.grad.clone(), p.grad._version) for p in net.parameters() if p is not frozen}
    weight = frozen.detach().clone()
    optimizer = LARS(net.parameters(), lr=1.0)
    optimizer.step()
    for p, (grad, value, version) in grads.items():
        assert p.grad is grad
        assert grad._version == version
        assert torch.equal(grad, value)
    assert torch.equal(frozen, weight)
    assert frozen not in optimizer.state


def save_and_load(pair: tuple[nn.Module, LARS]) -> tuple[nn.Module, LARS]:
    file = io.BytesIO()
    torch.save([each.state_dict() for each in pair], file)
    file.seek(0)
    net = conv_net(torch.float32)
    other = (net, LARS(net.parameters(), lr=123.0))
    for each, state in zip(other, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    return other


@pytest.mark.parametrize("resume", [save_and_load, copy.deepcopy])
def test_resume_is_bit_identical(resume: Callable[[tuple[nn.Module, LARS]], tuple[nn.Module, LARS]]) -> None:
    net = conv_net(torch.float32)
    optimizer = LARS(net.parameters(), lr=0.7, momentum=0.8, weight_decay=1e-3)
    for step in range(3):
        set_gradients(net, seed=step)
        optimizer.step()
    resumed_net, resumed_optimizer = resume((net, optimizer))
    for step in range(3, 6):
        for model, each in ((net, optimizer), (resumed_net, resumed_optimizer)):
            set_gradients(model, seed=step)
            each.step()
    for p, q in zip(net.parameters(), resumed_net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pickle_keeps_exclude() -> None:
    w = parameter([[3.0, 4.0]], [[1.0, 1.0]])
    optimizer = pickle.loads(pickle.dumps(LARS([w], lr=1.0, exclude=torch.is_tensor)))
    assert optimizer.exclude is torch.is_tensor
    (copied,) = optimizer.param_groups[0]["params"]
    copied.grad = torch.ones_like(copied)
    optimizer.step()
    assert copied.tolist() == [[2.0, 3.0]]


def test_param_groups_with_own_settings_and_scheduler() -> None:
    a, b = parameter([[3.0, 4.0]], [[1.0, 1.0]]), parameter([[3.0, 4.0]], [[1.0, 1.0]])
    optimizer = LARS([{"params": [a], "lr": 2.0}, {"params": [b], "weight_decay": 0.1}], lr=1.0, momentum=0.0)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, peak=1.0, warmup_steps=2, total_steps=4))
    rates = []
    for _ in range(5):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([2 * x, x]) for x in (0.5, 1.0, 1.0, 0.5, 0.0)]
    assert a.tolist() != b.tolist()


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    w = parameter([[3.0, 4.0]], [[0.0, 0.0]])
    optimizer = LARS([w], lr=1.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 25.0
    assert w.tolist() != [[3.0, 4.0]]


def test_half_precision_norms_do_not_overflow() -> None:
    # ‖w‖ = 300·256 = 76800 exceeds float16's 65504: a norm computed in float16 would give a trust ratio of inf or nan.
    w = nn.Parameter(torch.full((256, 256), 300.0, dtype=torch.float16))
    w.grad = torch.ones_like(w)
    LARS([w], lr=1.0, weight_decay=0.0, trust_coefficient=1 / 300).step()
    assert torch.equal(w.detach(), torch.full_like(w, 299.0))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_step_never_synchronizes_with_the_device(device: str) -> None:
    # Fake tensors hold no data: .item(), branching on a value and copying to the CPU raise. Needs no real GPU.
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device=device)) for shape in ((8, 3, 3, 3), (8,), (4, 8))]
        optimizer = LARS(params, lr=1.0)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert {optimizer.state[p]["momentum_buffer"].device.type for p in params} == {device}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", torch.tensor(1.0)),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-6),
        ("weight_decay", float("inf")),
        ("trust_coefficient", 0.0),
        ("trust_coefficient", "1"),
    ],
)
def test_invalid_setting_raises(setting: str, value: object) -> None:
    w = parameter([[3.0]], [[1.0]])
    with pytest.raises(ValueError, match=rf"{setting} is .*, expected .*: pass {setting}="):
        LARS([w], **{"lr": 1.0, setting: value})
    optimizer = LARS([w], lr=1.0)
    with pytest.raises(ValueError, match=f"{setting} is"):
        optimizer.add_param_group({"params": [parameter([[1.0]], [[1.0]])], setting: value})
    assert len(optimizer.param_groups) == 1


def test_sparse_and_complex_gradients_raise() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"layout torch.sparse_coo .* expects dense real"):
        LARS(embedding.parameters(), lr=1.0).step()
    w = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match=r"dtype torch.complex64 .* expects dense real"):
        LARS([w], lr=1.0).step()
    with pytest.raises(ValueError, match="exclude is None"):
        LARS([w], lr=1.0, exclude=None)


@pytest.mark.parametrize(
    ("name", "kind"), [("lars", LARS), ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("muon", Muon)]
)
def test_build_optimizer_does_not_decay_norm_or_bias(name: str, kind: type) -> None:
    net = conv_net()
    net[3].requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = build_optimizer(name, net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    assert type(optimizer) is kind
    for p in net.parameters():
        p.grad = torch.zeros_like(p)  # only weight decay changes parameters now
    optimizer.step()
    decayed = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    assert decayed == [p.ndim > 1 and p.requires_grad for p in net.parameters()]


def test_build_optimizer_rejects_unknown_name_and_frozen_parameters() -> None:
    with pytest.raises(ValueError, match="'lamb', expected 'lars', 'sgd', 'adamw' or 'muon'"):
        build_optimizer("lamb", conv_net().parameters(), lr=0.1, momentum=0.9, weight_decay=0.0)
    with pytest.raises(ValueError, match="requires_grad"):
        build_optimizer("lars", conv_net().requires_grad_(False).parameters(), lr=0.1, momentum=0.9, weight_decay=0.0)


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.AdamW])
def test_state_of_another_optimizer_is_refused(other: type[torch.optim.Optimizer]) -> None:
    w = torch.nn.Parameter(torch.ones(2, 2))
    lars = LARS([w], lr=0.1)
    with pytest.raises(ValueError, match=r"without .*trust_coefficient"):
        lars.load_state_dict(other([w], lr=0.1).state_dict())  # type: ignore[call-arg]
