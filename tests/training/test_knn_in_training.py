"""kNN accuracy during training: when it is measured, and what happens to a measurement that is interrupted."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from weights import metrics

from fastsimclr import pretrain
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.callbacks import Callback

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 512,  # three steps per epoch of 1,433 digits
    "model": {"hidden": 16, "out": 8},
    "epochs": 2,
    "knn_every": 1,
    "precision": "fp32",
    "device": "cpu",
    "log": None,
}


class Killed(BaseException):
    pass


class Encoder(nn.Module):
    """Calls `action` in the evaluation of one batch of the kNN, and takes a while for each."""

    def __init__(self, batch: int = -1, action: Any = None, seconds: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.batch, self.action, self.seconds = batch, action, seconds
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            self.calls += 1
            time.sleep(self.seconds)
            if self.calls == self.batch:
                self.action()
        return self.layers(images)  # type: ignore[no-any-return]


class Epochs(Callback):
    """Keeps the records of the epochs, over all processes of a run."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []

    def on_epoch(self, trainer: Any, record: dict[str, Any]) -> None:
        self.accuracies.append(record["knn_accuracy"])

    def state_dict(self) -> dict[str, Any]:
        return {"accuracies": list(self.accuracies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracies = state["accuracies"]


def accuracies(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["knn_accuracy"]) for line in metrics(folder) if "knn_accuracy" in line]


def train(folder: Path, encoder: nn.Module, **options: Any) -> Epochs:
    epochs = Epochs()
    pretrain("digits", encoder, output=folder, callbacks=[epochs], **TINY | options)
    return epochs


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def kill() -> None:
    raise Killed


def test_untrained_encoder_is_measured_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "no", Encoder(), epochs=1)
    assert "% untrained" not in capsys.readouterr().out
    assert [step for step, _ in accuracies(tmp_path / "no")] == [3]
    train(tmp_path / "yes", Encoder(), epochs=1, knn_at_start=True)
    assert "% trained, " in capsys.readouterr().out
    assert [step for step, _ in accuracies(tmp_path / "yes")] == [0, 3]


def test_knn_images_limits_the_batches(tmp_path: Path) -> None:
    encoder = Encoder()
    train(tmp_path, encoder, epochs=1, knn_images=100)
    assert encoder.calls == 2 * 4  # 100 training and 100 validation images, 32 at a time


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Epochs]:
    """A run that is not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as one_thread does, for longer
    epochs = train(folder, Encoder())
    torch.set_num_threads(threads)
    return folder, epochs


# 1,433 training images are 45 batches of 32, and 364 validation images 12. The second measurement is the last.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "action", "raised"), [(2, terminate, SystemExit), (57 + 50, terminate, SystemExit), (87, kill, Killed)]
)
def test_interrupted_measurement_is_repeated_by_the_same_command(
    tmp_path: Path,
    whole: tuple[Path, Epochs],
    batch: int,
    action: Any,
    raised: type[BaseException],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(raised):
        train(tmp_path / "two", Encoder(batch, action))
    step = 3 if batch < 57 else 6
    assert load_checkpoint(RunFolder(tmp_path / "two").checkpoint)["step"] == step
    assert [at for at, _ in accuracies(tmp_path / "two")] == [3] * (step == 6)
    if action is terminate:
        assert f"stopped by SIGTERM at step {step}" in capsys.readouterr().out

    resumed = train(tmp_path / "two", Encoder())
    folder, epochs = whole
    assert accuracies(tmp_path / "two") == accuracies(folder)
    assert resumed.accuracies == epochs.accuracies
    assert "trained 6 steps" in capsys.readouterr().out
    train(tmp_path / "two", Encoder())
    assert "has finished 6 of 6 steps: nothing to do" in capsys.readouterr().out
    states = [load_checkpoint(RunFolder(run).checkpoint) for run in (folder, tmp_path / "two")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert states[0]["callbacks"] == states[1]["callbacks"]


def interrupt(rank: int, folder: Path) -> float:
    """Rank 1 gets a signal in its third batch; return the seconds from then until this rank has stopped."""
    started = 0.0

    def notice() -> None:
        nonlocal started
        started = time.monotonic()
        if rank == 1:
            terminate()

    with pytest.raises(SystemExit):
        pretrain("digits", Encoder(3, notice, seconds=0.3), output=folder, **TINY)
    return time.monotonic() - started


@pytest.mark.slow
def test_signal_of_one_rank_stops_all_during_knn(tmp_path: Path) -> None:
    """The whole measurement takes at least 57 / 2 * 0.3 s."""
    assert max(run_ranks(2, interrupt, tmp_path)) < 5
    assert accuracies(tmp_path) == []
