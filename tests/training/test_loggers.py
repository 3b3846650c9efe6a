"""The metrics that TensorBoard, wandb and MLflow receive, read back from their own files."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weights import metrics, steps

from fastsimclr import UserError, pretrain
from fastsimclr.training import loggers
from fastsimclr.training.callbacks import Callback

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 512,  # three steps per epoch of 1,433 digits
    "model": {"width": 0.25, "stem": "imagenet", "hidden": 16, "out": 8},
    "precision": "fp32",
    "device": "cpu",
    "knn_every": 1,
    "knn_at_start": True,
}


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            trainer.stop()


def interrupted_run(folder: Path, log: str) -> dict[str, list[tuple[int, float]]]:
    """Train two epochs of which step 5 is repeated. Return (step, value) of each metric in metrics.jsonl."""
    options = TINY | {"log": log, "epochs": 2}
    pretrain("digits", "resnet18", output=folder, callbacks=[StopAt(4)], **options)
    checkpoint = (folder / "checkpoints" / "last.pt").read_bytes()
    pretrain("digits", "resnet18", output=folder, callbacks=[StopAt(5)], **options)
    (folder / "checkpoints" / "last.pt").write_bytes(checkpoint)  # as if killed before it was replaced
    pretrain("digits", "resnet18", output=folder, **options)
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in metrics(folder):
        stages = {f"stages_ms/{name}": ms for name, ms in record.get("stages_ms", {}).items()}
        for name, value in (record | stages).items():
            if name not in ("step", "stages_ms") and not (name == "epoch" and "loss" not in record):
                curves.setdefault(name, []).append((record["step"], value))
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curves["knn_accuracy"]] == [0, 3, 6]
    assert "stages_ms/forward" in curves
    return curves


@pytest.mark.slow
def test_tensorboard_has_every_metric_and_no_repeated_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = interrupted_run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == set(curves)
    for name, curve in curves.items():
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in curve], name


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format, blocks of 32 KiB with chunks of (checksum, size, kind).

    wandb has no reader for them in Python.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = file.read_bytes(), 7, b""  # after the file's header
    while position < len(data):
        if 32768 - position % 32768 < 7:  # padding
            position += 32768 - position % 32768
        size, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_gets_one_run_with_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    curves = interrupted_run(tmp_path / "digits-run", "wandb")
    wandb.teardown()  # its service writes the end of the file when it stops
    logged: dict[str, dict[int, float]] = {}
    runs = []
    for file in sorted(
        (tmp_path / "digits-run" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime
    ):
        for record in wandb_records(file):
            if record.HasField("run"):
                runs.append(record.run)
            for item in record.history.item:
                name = "/".join(item.nested_key) or item.key
                if not name.startswith("_"):
                    logged.setdefault(name, {})[record.history.step.num] = float(item.value_json)
    assert {run.run_id for run in runs} == {(tmp_path / "digits-run" / "wandb_id.txt").read_text()}
    assert {(run.project, run.display_name) for run in runs} == {("fastsimclr", "digits-run")}
    assert {"data", "batch_size"} <= {item.key for item in runs[0].config.update}
    assert set(logged) == set(curves)
    for name in ("loss", "knn_accuracy"):
        assert logged[name] == dict(curves[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 with SQLAlchemy 2.1
def test_mlflow_gets_one_run_with_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    curves = interrupted_run(tmp_path / "digits-run", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fastsimclr").experiment_id])
    assert run.info.run_id == (tmp_path / "digits-run" / "mlflow_id.txt").read_text()
    assert (run.info.run_name, run.info.status) == ("digits-run", "FINISHED")
    assert run.data.params["batch_size"] == "512"
    assert run.data.params["model.width"] == "0.25"
    for name, curve in curves.items():
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))
        assert [step for step, _ in history] == [step for step, _ in curve], name
        if name in ("loss", "knn_accuracy"):
            assert history == curve


def test_no_logger_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain("digits", "resnet18", output=tmp_path, log=None, max_steps=1, **TINY)
    assert len(steps(tmp_path)) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    ]
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log: got wandb, which is not installed; pip install 'fastsimclr\[wandb\]'"):
        pretrain("digits", "resnet18", output=tmp_path, log="wandb", **TINY)
