"""Evaluations of the data of a run: in another folder, after the run or the images have moved, and held-out images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import jpeg, photo, write

from fastsimclr.distributed import SINGLE_PROCESS
from fastsimclr.evaluate import configure
from fastsimclr.evaluate import main as evaluate
from fastsimclr.evaluation.protocols import Evaluation
from fastsimclr.run_folder import RunFolder
from fastsimclr.train import main as train
from fastsimclr.training.callbacks import Callback
from fastsimclr.training.pretrain import pretrain

OPTIONS = ["--data.image_size=16", "--model.encoder=resnet18", "--model.stem=imagenet", "--model.width=0.25"]
OPTIONS += ["--batch_size=8", "--max_steps=1", "--knn_k=3", "--optim.name=sgd", "--device=cpu", "--data.workers=0"]
OPTIONS += ["--data.backend=torchvision", "--precision=fp32"]
KNN = ["knn", "--k=3", "--device=cpu", "--precision=fp32"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with 24 photos of two classes in photos/."""
    write(tmp_path / "photos", {f"{'ab'[i % 2]}/{i:02}.jpg": jpeg(photo(20, 20, seed=i)) for i in range(24)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_run_by_relative_paths_is_used_in_another_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([*OPTIONS, "--data.train=photos", "--output=run", "--knn_every=0"]) == 0
    assert "data: photos, 24 images" in capsys.readouterr().out, "as the user gave it"
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert evaluate([*KNN, f"--checkpoint={here / 'run'}"]) == 0

    monkeypatch.chdir(here)
    Path("run").rename("moved")
    assert train([*OPTIONS, "--data.train=photos", "--output=moved", "--knn_every=0", "--max_steps=2"]) == 0
    assert "resumed from moved/checkpoints/last.pt at step 1" in capsys.readouterr().out

    Path("photos").rename("gone")
    assert evaluate([*KNN, "--checkpoint=moved", "--force"]) == 2
    error = capsys.readouterr().err
    assert f"{here / 'photos'}: got nothing at that path" in error
    assert "The path is that of the training of moved: if the images have moved, give theirs" in error
    assert evaluate([*KNN, "--checkpoint=moved", "--data.train=gone", "--force"]) == 0


def keys(source: Any) -> list[str]:
    return [source.key(index) for index in range(len(source))]


class Kept(Callback):
    def on_start(self, trainer: Any) -> None:
        self.train, self.val = keys(trainer.data.train), keys(trainer.data.val)


@pytest.mark.slow
def test_fraction_is_held_out_of_training_and_of_the_evaluations(here: Path) -> None:
    kept = Kept()
    options = {"image_size": 16, "batch_size": 8, "max_steps": 1, "knn_k": 3, "device": "cpu", "backend": "torchvision"}
    options |= {"model": {"width": 0.25, "stem": "imagenet"}, "workers": 0, "precision": "fp32", "seed": 5}
    pretrain("photos", "resnet18", val=0.25, output="run", callbacks=[kept], **options)
    assert sorted(kept.train + kept.val) == sorted(
        str(file.relative_to("photos")) for file in Path("photos").rglob("*.jpg")
    )
    assert [sum(name.startswith(label) for name in kept.val) for label in "ab"] == [3, 3]
    assert "val: 0.25\n" in RunFolder("run").config.read_text()

    for protocol in (["knn", "--k=3"], ["linear", "--solver=lbfgs", "--c=1"], ["finetune", "--epochs=1"]):
        arguments = [*protocol, "--checkpoint=run", "--seed=1", "--device=cpu", "--precision=fp32"]
        evaluation = Evaluation(*configure(arguments), SINGLE_PROCESS)
        assert evaluation.data.val is not None
        assert (keys(evaluation.data.train), keys(evaluation.data.val)) == (kept.train, kept.val), protocol
    assert evaluate([*KNN, "--checkpoint=run", "--seed=1"]) == 0
    record = json.loads(RunFolder("run").knn.read_text())
    assert record["val"] == {"path": str(here / "photos"), "images": 6}
    assert np.array(record["confusion"]).sum() == 6


@pytest.mark.parametrize(
    ("fraction", "data", "expected"),
    [
        ("1.5", "photos", "--data.val: got 1.5, expected a number between 0 and 1, or a string, or none"),
        ("0.01", "photos", "--data.val: got 0.01, which is not one image of any class, as the largest has 12"),
        ("0.5", "photos/a", "--data.val: got 0.5, but the images have no labels"),
    ],
)
def test_unusable_fraction_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], fraction: str, data: str, expected: str
) -> None:
    assert train([*OPTIONS, f"--data.train={data}", f"--data.val={fraction}", "--output=run"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert expected in errors[0]
