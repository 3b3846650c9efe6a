"""Steps whose loss or gradient is not finite: skipped on all ranks together, counted, the end of the run if many."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from fastsimclr import pretrain
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.errors import UserError
from fastsimclr.models import EncoderSpec
from fastsimclr.training.callbacks import Callback

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Flaky(nn.Module):
    """An encoder whose activations overflow, on one rank, in some of its forward passes in training mode."""

    out_features = 8
    spec = EncoderSpec("resnet18")

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.passes = bad, 0
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            x = x * math.inf if self.passes in self.bad else x
        return self.body(x).mean((2, 3))


class Weights(Callback):
    """The weights and the optimizer's state after each step, without the running statistics."""

    def __init__(self) -> None:
        self.after: list[list[Tensor]] = []

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        state = trainer.optimizer.state_dict()["state"]
        tensors = [*trainer.model.state_dict().values(), *(state[i]["momentum_buffer"] for i in sorted(state))]
        self.after.append([x.detach().clone() for x in tensors if x.dtype == torch.float32])


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)


def train(output: Path, bad: set[int], *callbacks: Callback, **options: Any) -> Any:
    options = {
        "batch_size": 16, "epochs": 5, "log": None, "precision": "fp32", "knn_every": 0,
        "image_size": 16, "model": {"hidden": 16, "out": 8},
    } | options  # fmt: skip
    return pretrain(images(), Flaky(bad), output=output, callbacks=callbacks, **options)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_skipped_steps_change_nothing_and_are_counted(tmp_path: Path, optimizer: str) -> None:
    weights = Weights()
    train(tmp_path, {3, 4, 8}, weights, max_skipped=3, optim={"name": optimizer})
    changed = [step for step in range(1, 20) if not all(map(torch.equal, weights.after[step - 1], weights.after[step]))]
    assert changed == [step for step in range(1, 20) if step + 1 not in (3, 4, 8)]
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert {line["step"]: line["skipped_steps"] for line in steps if "skipped_steps" in line} == {3: 1, 4: 2, 8: 3}
    assert [line["step"] for line in steps if line["loss"] is None] == [3, 4, 8]
    state = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert state["skipped_steps"] == {"total": 3, "in_a_row": 0}
    assert all(bool(x.isfinite().all()) for x in state["model"].values()), "running statistics, too"


def test_run_ends_after_max_skipped_with_views_and_norms_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^loss: got nan and a gradient norm of nan at step 9 .*4 skipped steps in a row"
    ):
        train(tmp_path, set(range(6, 100)), max_skipped=4, checkpoint_every=0.5)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 4  # 6 and 8 were skipped
    saved = torch.load(tmp_path / "non_finite-rank0.pt", weights_only=True)
    assert [view.shape for view in saved["views"]] == [(16, 3, 16, 16)] * 2
    assert all(bool(view.isfinite().all()) for view in saved["views"])
    assert all(map(math.isfinite, saved["weight_norms"].values()))
    assert not any(map(math.isfinite, saved["gradient_norms"].values()))

    train(tmp_path, set(), max_skipped=4)  # rerun after the fix: as if nothing had happened
    train(tmp_path / "whole", set())
    ours, theirs = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (tmp_path, tmp_path / "whole"))
    assert all(map(torch.equal, ours["model"].values(), theirs["model"].values()))


def train_rank(rank: int, folder: Path) -> tuple[list[list[Tensor]], str]:
    weights = Weights()
    train(folder / "skips", {2, 5} if rank == 1 else set(), weights)
    with pytest.raises(UserError) as raised:
        train(folder / "ends", {2, 3, 4} if rank == 1 else set(), max_skipped=3)
    return weights.after, str(raised.value)


def test_all_ranks_skip_and_end_together_if_one_is_not_finite(tmp_path: Path) -> None:
    (first, error), (second, same_error) = run_ranks(2, train_rank, tmp_path)
    for ours, theirs in zip(first, second, strict=True):
        assert all(map(torch.equal, ours, theirs))
    unchanged = [step for step in range(1, 20) if all(map(torch.equal, first[step - 1], first[step]))]
    assert unchanged == [1, 4]
    assert error == same_error
    assert error.startswith("loss: got nan")
    assert {path.name for path in (tmp_path / "ends").glob("non_finite*")} == {
        "non_finite-rank0.pt", "non_finite-rank1.pt"
    }  # fmt: skip
