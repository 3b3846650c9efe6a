"""The online probe: the classifier of its formula, over any number of ranks, that does not change the encoder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from weights import metrics, steps

from fastsimclr import pretrain
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.probe import LR, OnlineProbe

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES, CLASSES = 12, 3
RUN: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 128,  # 12 steps per epoch of 1,433 digits
    "model": {"hidden": 32, "out": 16},
    "optim": {"name": "adamw", "lr": 0.01},
    "jitter_prob": 0.0,
    "blur_prob": 0.0,
    "precision": "fp32",
    "device": "cpu",
    "log": None,
    "health": False,
    "knn_every": 1,
    "epochs": 2,
}


def batches(number: int, images: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Representations of three classes, with a common offset, and labels, of which some are missing."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, FEATURES, generator=generator)
    found = []
    for _ in range(number):
        labels = torch.randint(CLASSES, (images,), generator=generator)
        h = 2 + centers[labels] + torch.randn(images, FEATURES, generator=generator)
        found.append((h, labels.where(torch.rand(images, generator=generator) > 0.2, -1)))
    return found


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())


def train_on(batches: list[tuple[Tensor, Tensor]], world: World = SINGLE_PROCESS) -> tuple[OnlineProbe, list[float]]:
    probe = OnlineProbe(FEATURES, CLASSES, world)
    return probe, [float(probe.train_step(h, labels)) for h, labels in batches]


def test_equals_softmax_regression_on_standardized_rows() -> None:
    linear = nn.Linear(FEATURES, CLASSES).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    adam = torch.optim.Adam(linear.parameters(), lr=LR)
    expected = []
    for h, labels in batches(50):
        x = h[labels >= 0].double()
        x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, correction=0, keepdim=True)
        loss = F.cross_entropy(linear(x), labels[labels >= 0])
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected.append(loss.item())
    probe, losses = train_on(batches(50))
    assert expected[0] == pytest.approx(math.log(CLASSES))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    state = probe.state_dict()
    torch.testing.assert_close(state["weight"].double(), linear.weight.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(state["bias"].double(), linear.bias.detach(), rtol=0, atol=1e-5)


def on_rank(rank: int) -> tuple[dict[str, Tensor], list[float]]:
    """Train on a part of each batch: rank 0 has fewer images than rank 1."""
    part = slice(0, 11) if rank == 0 else slice(11, None)
    parts = [(h[part], labels[part]) for h, labels in batches(20)]
    probe, losses = train_on(parts, World(rank, 2, torch.device("cpu")))
    return {name: probe.state_dict()[name] for name in ("weight", "bias")}, losses


@pytest.mark.slow
def test_two_ranks_equal_one() -> None:
    probe, losses = train_on(batches(20))
    for weights, of_rank in run_ranks(2, on_rank):
        np.testing.assert_allclose(of_rank, losses, rtol=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, probe.state_dict()[name], rtol=0, atol=1e-5)


def test_batch_that_is_not_finite_changes_nothing() -> None:
    probe, _ = train_on(batches(3))
    before = [probe.state_dict()[name].clone() for name in ("weight", "bias")]
    h, labels = batches(1)[0]
    assert math.isnan(probe.train_step(h.index_fill(0, torch.tensor([5]), torch.nan), labels.clamp(min=0)))
    assert all(map(torch.equal, before, [probe.state_dict()[name] for name in ("weight", "bias")]))


def test_unlabeled_images_change_nothing() -> None:
    probe = OnlineProbe(FEATURES, CLASSES, SINGLE_PROCESS)
    assert probe.train_step(batches(1)[0][0], torch.full((32,), -1)) == 0
    assert not probe.state_dict()["weight"].any()


def test_run_with_and_without_it_trains_the_same_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, probe in (("with", True), ("without", False)):
        pretrain("digits", encoder(), output=tmp_path / name, probe=probe, **RUN)
        assert ("linear probe, trained beside the encoder: " in capsys.readouterr().out) == probe
    states = [load_checkpoint(RunFolder(tmp_path / name).checkpoint) for name in ("with", "without")]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    assert states[1]["probe"] == {}
    assert not any("probe" in name for record in metrics(tmp_path / "without") for name in record)


def test_it_learns_and_is_resumed(tmp_path: Path) -> None:
    whole = pretrain("digits", encoder(), output=tmp_path / "whole", **RUN)
    losses = whole.metrics["probe_loss"]
    assert losses[0] == pytest.approx(math.log(10))  # the weights start at zero
    assert losses[-5:].mean() < losses[0] - 0.05
    assert whole.metrics["probe_accuracy"][-1] > 0.2  # after 24 steps; chance is 0.1
    assert whole.metrics["probe_step"].tolist() == [12, 24]

    for options in ({"max_steps": 7}, {}):
        resumed = pretrain("digits", encoder(), output=tmp_path / "resumed", **RUN | options)
    assert resumed.metrics["probe_loss"].tolist() == losses.tolist()
    assert resumed.metrics["probe_accuracy"][-1] == whole.metrics["probe_accuracy"][-1]
    of_runs = [load_checkpoint(RunFolder(run.folder).checkpoint)["probe"] for run in (whole, resumed)]
    torch.testing.assert_close(*of_runs, rtol=0, atol=0)
    assert len(steps(tmp_path / "resumed")) == 24
