"""Callbacks: the order of their calls, what stops a run and how it resumes, and the checkpoints that are kept."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_state
from PIL import Image
from ranks import run_ranks
from weights import metrics, steps

from fastsimclr import UserError, load_encoder
from fastsimclr.checkpoint_format import load_checkpoint, write_checkpoint
from fastsimclr.cli import exit_code
from fastsimclr.config import Config, from_options
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import OtherRankError
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.callbacks import Callback, EarlyStopping, KeepCheckpoints
from fastsimclr.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 16x16 pixels in two class folders: three batches of 16."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(48):
        file = folder / f"class{number % 2}" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return folder


def tiny(photos: Path, output: Path, **options: Any) -> Config:
    """Two epochs of three steps each, which take a tenth of a second."""
    return from_options(
        {
            "data": {"train": str(photos), "image_size": 16, "backend": "memory"},
            "model": {"encoder": "resnet18", "width": 0.25, "stem": "imagenet", "hidden": 16, "out": 8},
            "batch_size": 16,
            "epochs": 2,
            "knn_every": 0,
            "precision": "fp32",
            "device": "cpu",
            "log": None,
            "output": str(output),
        }
        | options
    )


def train(config: Config, *callbacks: Callback, world: World = SINGLE_PROCESS) -> Trainer:
    trainer = Trainer(config, world, callbacks=callbacks)
    trainer.train()
    return trainer


class Recorder(Callback):
    """Notes every call, and calls or raises `action` in on_step after the step `at`."""

    def __init__(self, at: int = 0, action: Any = None) -> None:
        self.calls: list[Any] = []
        self.at, self.action = at, action

    def on_start(self, trainer: Any) -> None:
        self.calls.append(("start", trainer.progress.step, trainer.untrained_knn is not None))

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        self.calls.append(record)
        if record["step"] == self.at:
            self.action(trainer)

    def on_epoch(self, trainer: Any, record: dict[str, Any]) -> None:
        self.calls.append(("epoch", record))

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        step = load_checkpoint(path)["step"] if trainer.world.is_rank_zero else trainer.saved_step
        self.calls.append(("checkpoint", step))

    def on_end(self, trainer: Any) -> None:
        self.calls.append("end")


def fail(trainer: Any) -> None:
    raise ArithmeticError("a bug in a callback")


def test_order_and_records_of_the_calls(tmp_path: Path, photos: Path) -> None:
    recorder = Recorder()
    train(tiny(photos, tmp_path, knn_every=1, knn_at_start=True, checkpoint_every=2, max_steps=5), recorder)
    steps_, knn = steps(tmp_path), [record for record in metrics(tmp_path) if "knn_accuracy" in record]
    assert len(steps_) == 5
    assert [record["step"] for record in knn] == [0, 3, 5]
    assert recorder.calls == [
        ("start", 0, True),
        *steps_[:3],
        ("epoch", steps_[2] | {"knn_accuracy": knn[1]["knn_accuracy"]}),
        *steps_[3:],
        ("epoch", steps_[4] | {"knn_accuracy": knn[2]["knn_accuracy"]}),
        ("checkpoint", 5),
        "end",
    ]


def test_stop_ends_the_run_after_the_step_and_it_resumes(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(photos, tmp_path / "run", checkpoint_every=10)
    recorder = Recorder(at=4, action=Trainer.stop)
    train(config, recorder)
    assert recorder.calls[-2:] == [("checkpoint", 4), "end"]
    assert (
        f"stopped by a callback at step 4; rerun with --output {tmp_path / 'run'} to resume" in capsys.readouterr().out
    )
    train(config)
    train(tiny(photos, tmp_path / "whole"))
    assert [line["loss"] for line in steps(tmp_path / "run")] == [line["loss"] for line in steps(tmp_path / "whole")]


@pytest.mark.parametrize(
    "hook",
    [
        "on_start",
        "on_step",
        *(pytest.param(f"on_{name}", marks=pytest.mark.slow) for name in ("epoch", "checkpoint", "end")),
    ],
)
def test_exception_ends_the_run_with_a_checkpoint(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], hook: str
) -> None:
    failing, recorder = Callback(), Recorder()
    setattr(failing, hook, fail if hook in ("on_start", "on_end") else lambda trainer, _: fail(trainer))
    with pytest.raises(ArithmeticError, match="a bug in a callback") as caught:
        train(tiny(photos, tmp_path, checkpoint_every=2), recorder, failing)
    assert "fail" in [entry.name for entry in caught.traceback]
    assert recorder.calls[-1] == "end", "the other callbacks end as always"
    last_step = {"on_start": None, "on_step": 1, "on_epoch": 3, "on_checkpoint": 6, "on_end": 6}[hook]
    checkpoint = RunFolder(tmp_path).checkpoint
    assert (load_checkpoint(checkpoint)["step"] if checkpoint.exists() else None) == last_step
    if hook != "on_end":
        assert "rank 0: callback Callback raised; the run ends on all ranks" in capsys.readouterr().err


def test_user_error_of_a_callback_stays_one(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="keep_best: got knn with knn_every 0"):
        tiny(photos, tmp_path, keep_best="knn", knn_every=0)
    without_labels = tiny(photos / "class0", tmp_path, keep_best="knn", knn_every=1)
    with pytest.raises(UserError, match="--keep_best: got a run that does not measure kNN accuracy; expected images"):
        train(without_labels)
    assert not RunFolder(tmp_path).checkpoint.exists()


def test_state_that_a_checkpoint_cannot_load_is_not_saved(tmp_path: Path, photos: Path) -> None:
    class Mean(Recorder):
        def state_dict(self) -> dict[str, Any]:
            return {"mean": np.float64(0.5)}

    with pytest.raises(
        UserError, match=r"Mean.state_dict: got \{'mean': np.float64\(0.5\)\}, expected tensors, numbers"
    ):
        train(tiny(photos, tmp_path), Mean())
    assert [name for name, _ in load_checkpoint(RunFolder(tmp_path).checkpoint)["callbacks"]] == ["KeepCheckpoints"]


def per_rank(rank: int, photos: Path, folder: Path) -> list[Any]:
    world = World(rank, 2, torch.device("cpu"))
    stopping = Recorder(at=2, action=Trainer.stop if rank == 1 else lambda _: None)
    train(tiny(photos, folder / "stopped"), stopping, world=world)
    losses = [call["loss"] for call in stopping.calls if isinstance(call, dict)]

    failing = Recorder(at=4, action=fail if rank == 1 else lambda _: None)
    try:
        train(tiny(photos, folder / "failed"), failing, world=world)
    except (ArithmeticError, OtherRankError) as error:
        return [losses, len(failing.calls), repr(error)]
    return []


@pytest.mark.slow
def test_one_rank_ends_both(tmp_path: Path, photos: Path) -> None:
    results = run_ranks(2, per_rank, photos, tmp_path)
    (losses, _, _), (other_losses, _, _) = results
    assert losses == other_losses, "a record has the loss over all ranks"
    assert len(losses) == 2
    assert load_checkpoint(RunFolder(tmp_path / "stopped").checkpoint)["step"] == 2

    calls = [result[1] for result in results]
    assert calls == [9, 9], "start, 3 steps, epoch, checkpoint, 1 step, checkpoint, end: on both ranks"
    assert [result[2] for result in results] == [
        "OtherRankError('rank 1 raised ArithmeticError: a bug in a callback')",
        "ArithmeticError('a bug in a callback')",
    ]
    assert load_checkpoint(RunFolder(tmp_path / "failed").checkpoint)["step"] == 4


def test_error_of_another_rank_is_exit_code_1_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise OtherRankError("rank 1 raised ArithmeticError: a bug")

    assert exit_code("train", work) == 1
    assert capsys.readouterr().err == ""


class Stub:
    """A trainer after some epochs, to feed callbacks with chosen accuracies."""

    def __init__(self, folder: Path) -> None:
        self.world, self.folder, self.measures_knn = SINGLE_PROCESS, RunFolder(folder), True
        self.progress = SimpleNamespace(epoch=0, step=0)
        self.stops = self.saved_step = 0
        self.requested = False

    def stop(self) -> None:
        self.stops += 1

    def request_checkpoint(self) -> None:
        self.requested = True

    def end_epoch(self, callback: Any, accuracy: float) -> None:
        """End an epoch as the trainer does; each has one step."""
        self.progress.epoch += 1
        self.progress.step += 1
        callback.on_epoch(self, {"epoch": self.progress.epoch - 1, "knn_accuracy": accuracy})
        if self.requested:
            self.saved_step = self.progress.step
            state = make_state(step=self.saved_step, callbacks=[("KeepCheckpoints", callback.state_dict())])
            self.folder.checkpoint.parent.mkdir(exist_ok=True)
            self.folder.checkpoint.unlink(missing_ok=True)  # kept ones are links to it
            write_checkpoint(state, self.folder.checkpoint)
            callback.on_checkpoint(self, self.folder.checkpoint)
        self.requested = False


def test_early_stopping_counts_epochs_without_improvement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, early = Stub(tmp_path), EarlyStopping("knn_accuracy", patience=2, min_delta=0.01)
    early.on_start(trainer)
    for accuracy in (0.5, 0.6, 0.605):
        trainer.end_epoch(early, accuracy)
    assert trainer.stops == 0
    resumed = EarlyStopping("knn_accuracy", patience=2, min_delta=0.01)
    resumed.load_state_dict(early.state_dict())
    trainer.end_epoch(resumed, 0.59)
    assert trainer.stops == 1
    said = "EarlyStopping: knn_accuracy has not improved for 2 epochs; the best was 0.6 after epoch 2\n"
    assert capsys.readouterr().out == said
    for patience, stops in ((2, 1), (3, 0)):
        again, early = Stub(tmp_path), EarlyStopping("knn_accuracy", patience)
        early.load_state_dict(resumed.state_dict())
        early.on_start(again)
        assert again.stops == stops, "stays stopped, unless patience is larger"


@pytest.mark.slow
def test_early_stopping_by_loss_is_exact_after_a_resume(tmp_path: Path, photos: Path) -> None:
    whole, resumed = EarlyStopping("loss", patience=3), EarlyStopping("loss", patience=3)
    train(tiny(photos, tmp_path / "whole"), whole)
    train(tiny(photos, tmp_path / "run"), EarlyStopping("loss", patience=3), Recorder(at=4, action=Trainer.stop))
    train(tiny(photos, tmp_path / "run"), resumed)
    assert resumed.state_dict() == whole.state_dict()
    means = np.array([line["loss"] for line in steps(tmp_path / "whole")]).reshape(2, 3).mean(axis=1)
    assert whole.best == pytest.approx(means.min(), rel=1e-12)
    assert whole.best_epoch == means.argmin() + 1


def test_invalid_early_stopping_raises(tmp_path: Path, photos: Path) -> None:
    for options, words in (({"metric": "accuracy"}, "metric: got 'accuracy'"), ({"patience": 0}, "got 0 and 0.0")):
        with pytest.raises(UserError, match=words):
            EarlyStopping(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="EarlyStopping: got a run that does not measure kNN accuracy"):
        train(tiny(photos, tmp_path), EarlyStopping("knn_accuracy"))


def test_kept_checkpoints_load_and_resume(tmp_path: Path, photos: Path) -> None:
    config = {"epochs": 4, "knn_every": 1, "checkpoint_every": 10, "keep_every": 2, "keep_best": "knn"}
    train(tiny(photos, tmp_path / "run", **config))
    run = RunFolder(tmp_path / "run")
    names = ["best.pt", "epoch-0002.pt", "epoch-0004.pt", "last.pt", "previous.pt"]
    assert sorted(file.name for file in run.checkpoint.parent.iterdir()) == names
    assert [load_checkpoint(run.epoch_checkpoint(epoch))["step"] for epoch in (2, 4)] == [6, 12]
    assert run.epoch_checkpoint(4).samefile(run.checkpoint), "a link, not a second file"
    accuracies = [record["knn_accuracy"] for record in metrics(run.path) if "knn_accuracy" in record]
    best_epoch = int(np.argmax(accuracies)) + 1
    best = load_checkpoint(run.best_checkpoint)
    assert best["step"] == 3 * best_epoch
    assert best["callbacks"] == [("KeepCheckpoints", {"best_accuracy": max(accuracies), "best_epoch": best_epoch})]
    assert load_encoder(run.best_checkpoint).out_features == 128
    found = RunFolder.of(run.epoch_checkpoint(2))
    assert found is not None
    assert found.path == run.path

    resumed = tiny(photos, tmp_path / "resumed", **config, resume=str(run.epoch_checkpoint(2)))
    train(resumed)
    assert [line["loss"] for line in steps(tmp_path / "resumed")] == [line["loss"] for line in steps(run.path)][6:]


def test_first_of_equal_best_checkpoints_is_kept_also_after_a_resume(tmp_path: Path) -> None:
    trainer, keep = Stub(tmp_path), KeepCheckpoints(best="knn")
    for accuracy in (0.5, 0.7, 0.7, 0.6):
        trainer.end_epoch(keep, accuracy)
    assert load_checkpoint(trainer.folder.best_checkpoint)["step"] == 2
    resumed = KeepCheckpoints(best="knn")
    resumed.load_state_dict(keep.state_dict())
    trainer.end_epoch(resumed, 0.65)
    assert load_checkpoint(trainer.folder.best_checkpoint)["step"] == 2
    trainer.end_epoch(resumed, 0.8)
    best = load_checkpoint(trainer.folder.best_checkpoint)
    assert (best["step"], best["callbacks"][0][1]) == (6, {"best_accuracy": 0.8, "best_epoch": 6})


def test_file_that_cannot_be_kept_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, keep = Stub(tmp_path), KeepCheckpoints(every=1)
    (trainer.folder.epoch_checkpoint(1) / "occupied").mkdir(parents=True)
    trainer.end_epoch(keep, 0.5)
    trainer.end_epoch(keep, 0.5)
    assert "epoch-0001.pt: not kept (Is a directory); the run continues" in capsys.readouterr().err
    assert sorted(file.name for file in trainer.folder.checkpoint.parent.iterdir()) == [
        "epoch-0001.pt",
        "epoch-0002.pt",
        "last.pt",
    ]


@pytest.mark.slow
def test_the_documented_callback_runs(working_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "callbacks.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(code, {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert re.findall(r"^epoch (\d): loss", said, flags=re.MULTILINE) == list("1234")
    assert len(metrics(working_directory / "runs" / "digits")) == 24 + 4
