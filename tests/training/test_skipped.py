"""Runs whose images go bad: the run goes on, lists them, limits their number, and resumes as if it had not stopped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import runs
from pictures import open_encoded, photo_folder
from test_train import TINY, weights
from weights import metrics, steps

from fastsimclr import pretrain
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.data.sampler import Sampler
from fastsimclr.train import main
from fastsimclr.training.callbacks import Callback

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
IMAGES, BATCH = 500, 50
OPTIONS: dict[str, Any] = {
    "encoder": "resnet18",
    "image_size": 16,
    "model": {"stem": "imagenet", "hidden": 32, "out": 16},
    "batch_size": BATCH,
    "epochs": 2,
    "knn_every": 0,
    "device": "cpu",
    "precision": "fp32",
}


class Damage(Callback):
    """Let one file vanish, truncate one and replace one by garbage, after the second step."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            gone, cut, garbage = self.files
            gone.unlink(missing_ok=True)
            cut.write_bytes(cut.read_bytes()[:500])
            garbage.write_bytes(b"<html>404</html>")


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_run_goes_on_when_files_go_bad_and_a_resumed_one_has_the_same_weights(tmp_path: Path, backend: str) -> None:
    data = photo_folder(tmp_path / "data", IMAGES, size=lambda i: (24 + i % 3, 24))
    source = open_encoded(data)
    # Of the epoch's last batch, so that no loader has read them before the second step is done.
    bad = sorted(Sampler(IMAGES, BATCH).remaining()[-1].index.tolist()[:3])
    files = [Path(source.name(index)) for index in bad]
    whole = {file: file.read_bytes() for file in files}
    options = OPTIONS | {"backend": backend, "workers": 0, "max_bad": 0.01, "callbacks": [Damage(files)]}
    run = pretrain(str(data), output=tmp_path / "run", **options).folder
    lines = (run / "skipped_images.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(map(str, files))
    for file, reason in zip(
        files, ("cannot be read (No such", "got 500 bytes that do not", "got 16 bytes"), strict=True
    ):
        assert any(line.startswith(f"{file}: {reason}") for line in lines)
    counts = [record["skipped_images"] for record in metrics(run) if "skipped_images" in record]
    assert counts[-1] == 3
    assert [line["images"] for line in steps(run)] == [BATCH] * 20

    for max_steps in (8, 12):  # stopped before they are met, and after
        for file, content in whole.items():
            file.write_bytes(content)
        resumed = tmp_path / f"resumed{max_steps}"
        pretrain(str(data), output=resumed, max_steps=max_steps, **options)
        pretrain(str(data), output=resumed, **options)
        listed = (resumed / "skipped_images.txt").read_text().splitlines()
        assert sorted(line.partition(": ")[0] for line in listed) == sorted(map(str, files)), "each once"
        expected = weights(run)
        assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_run_with_too_many_bad_images_stops_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = photo_folder(tmp_path / "data", 64), tmp_path / "run"
    files = sorted(data.rglob("*.jpg"))[::16]  # 4
    whole = {file: file.read_bytes() for file in files}
    for file in files:
        file.write_bytes(b"")
    options = [*TINY, f"--data.train={data}", f"--output={run}", "--data.workers=0", "--data.max_bad=0.05"]
    assert main(options) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--data.max_bad: got 4 of 64 images that cannot be used, expected a fraction of at most 0.05: " in message
    assert f"; and 1 more (all are listed in {run}/skipped_images.txt); repair or restore them" in message
    assert len((run / "skipped_images.txt").read_text().splitlines()) == 4
    assert load_checkpoint(run / "checkpoints" / "last.pt")["step"] == 3, "not before an epoch"
    assert main(options) == 2, "still bad"
    for file, content in whole.items():
        file.write_bytes(content)
    assert main(options) == 0
    assert not (run / "skipped_images.txt").exists()
    assert [line["images"] for line in steps(run)] == [16] * 8


def test_two_ranks_list_the_bad_images_of_both(tmp_path: Path) -> None:
    data = photo_folder(tmp_path / "data", 64)
    files = sorted(data.rglob("*.jpg"))[::10]  # 7
    for file in files:
        file.write_bytes(b"")
    options = [f"--data.train={data}", "--data.max_bad=0.2", "--data.workers=0", "--epochs=3"]
    runs.start(*TINY, *options, f"--output={tmp_path / 'two'}", ranks=2).end()
    lines = (tmp_path / "two" / "skipped_images.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == list(map(str, files))
    assert main([*TINY, *options, f"--output={tmp_path / 'one'}"]) == 0
    losses = [[line["loss"] for line in steps(tmp_path / name)] for name in ("one", "two")]
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=2e-3)  # the same images and replacements
