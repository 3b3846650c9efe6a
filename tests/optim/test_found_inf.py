"""Fused steps of each optimizer, with `found_inf` as on a GPU, against PyTorch's plain ones and LARS's own."""

import pytest
import torch
from torch import Tensor, nn

from fastsimclr.optim import build_optimizer


def train(name: str, found_inf: list[float] | None, momentum: float = 0.9) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return weights and state after three steps, the second of which has NaN gradients if it is to be skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(name, model.parameters(), 0.1, momentum, 1e-2)
    if name in ("sgd", "adamw"):
        for group in optimizer.param_groups:
            assert group["fused"] == (name == "adamw")
            group["fused"] = found_inf is not None
    history = []
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if found_inf is not None:
            if found_inf[step]:
                for p in model.parameters():
                    p.grad = torch.full_like(p, torch.nan)
            optimizer.found_inf = torch.tensor(found_inf[step])  # type: ignore[attr-defined]
        optimizer.step()
        states = [v for p in model.parameters() for v in optimizer.state[p].values() if v.ndim]
        history.append([x.detach().clone() for x in (*model.parameters(), *states)])
    return list(model.parameters()), history


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_finite_steps_are_those_of_the_plain_optimizer(name: str, momentum: float) -> None:
    _, fused = train(name, [0.0, 0.0, 0.0], momentum)
    _, plain = train(name, None, momentum)
    count = 4  # weights; LARS without momentum keeps another buffer
    for ours, theirs in zip(fused, plain, strict=True):
        for a, b in zip(ours[:count], theirs[:count], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_skipped_step_changes_nothing(name: str) -> None:
    _, (first, second, third) = train(name, [0.0, 1.0, 0.0])
    assert all(map(torch.equal, first, second))
    assert all(bool(x.isfinite().all()) for x in third)
    assert not torch.equal(second[0], third[0])
