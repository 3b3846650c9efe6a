"""Pre-training from Python: the same run as the command line's, resumable by the same call, also under torchrun."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from weights import metrics, steps

from fastsimclr import Augmentation, UserError, encoder, load_encoder, pretrain
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.run_folder import RunFolder
from fastsimclr.train import main as train

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 64,
    "epochs": 1,
    "precision": "fp32",
    "device": "cpu",
    "model": {"width": 0.25, "stem": "imagenet", "hidden": 16, "out": 8},
}


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())  # (N, 8, h, w)


def test_run_is_that_of_the_command_line(tmp_path: Path) -> None:
    run = pretrain("digits", "resnet18", output=tmp_path / "python", max_steps=3, **TINY)
    words = ["--data.train=digits", "--data.image_size=16", "--model.encoder=resnet18", "--epochs=1", "--max_steps=3"]
    words += [f"--model.{name}={value}" for name, value in TINY["model"].items()]
    words += ["--batch_size=64", "--precision=fp32", "--device=cpu", "--seed=0", f"--output={tmp_path / 'command'}"]
    assert train(words) == 0

    command = RunFolder(tmp_path / "command")
    one, other = (load_checkpoint(RunFolder(folder).checkpoint) for folder in (run.folder, command.path))
    assert one["architecture"] == other["architecture"]
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert RunFolder(run.folder).config.read_text().replace("/python", "/command") == command.config.read_text()
    assert sorted(os.listdir(run.folder)) == sorted(os.listdir(command.path))

    assert np.array_equal(run.metrics["loss"], [record["loss"] for record in steps(command.path)])
    assert run.metrics["step"].tolist() == [1, 2, 3]
    measured = [record["knn_accuracy"] for record in metrics(command.path) if "knn_accuracy" in record]
    assert run.metrics["knn_accuracy"].tolist() == measured
    assert run.metrics["knn_step"].tolist() == [3]
    assert run.knn_accuracy == measured[-1]
    images = torch.randn(2, 3, 16, 16)
    assert not run.encoder.training
    assert torch.equal(run.encoder(images), load_encoder(command.path)(images))


def test_encoder_that_was_built_by_name_is_trained_in_place(tmp_path: Path) -> None:
    options = {name: value for name, value in TINY.items() if name != "model"}
    made = encoder("resnet18", width=0.25, stem="imagenet", image_size=16)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    run = pretrain("digits", made, output=tmp_path, max_steps=1, knn_every=0, **options)
    assert run.encoder is made
    assert any(not torch.equal(value, before[name]) for name, value in made.state_dict().items())
    for name, value in load_encoder(tmp_path).state_dict().items():
        assert torch.equal(value, made.state_dict()[name]), name


def test_same_call_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = pretrain("digits", small_module(), output=tmp_path / "whole", max_steps=4, knn_every=0, **TINY)
    for steps_done in (2, 4):
        resumed = pretrain("digits", small_module(), output=tmp_path / "two", max_steps=steps_done, knn_every=0, **TINY)
    assert resumed.metrics["loss"].tolist() == whole.metrics["loss"].tolist()
    assert resumed.knn_accuracy is None
    states = [load_checkpoint(RunFolder(run.folder).checkpoint)["model"] for run in (whole, resumed)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_augmentation_and_its_options_are_recorded(tmp_path: Path) -> None:
    recipe = Augmentation(image_size=16, blur_prob=0.25, per_view=({"flip_prob": 0.0}, {}))
    options = {name: value for name, value in TINY.items() if name != "image_size"}
    run = pretrain("digits", small_module(), augmentation=recipe, output=tmp_path / "run", max_steps=1, **options)
    import yaml

    recorded = yaml.safe_load(RunFolder(run.folder).config.read_text())["data"]
    assert Augmentation.from_options(recorded) == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoks": 3}, "epoks: got an unknown option, expected one such as epochs, "),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"batch_size": "many"}, "batch_size: got many, expected int"),
        ({"optim": {"lr": -1}}, "optim.lr: got -1.0, expected a number above 0, or auto"),
        ({"optim": {"rate": 1}}, "optim.rate: got an unknown option, expected one such as "),
        ({"optim": 3}, "optim: got 3, expected a dict of its options"),
        ({"hue": 0.7}, "data.hue: got 0.7, expected from 0 to 0.5"),
        ({"augmentation": Augmentation(), "hue": 0.1}, "hue: got it in `augmentation` and as an option"),
        ({"model": {"encoder": "resnet18"}}, "model: got an encoder in it, expected it as the argument `encoder`"),
    ],
)
def test_invalid_option_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain("digits", "resnet18", **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_interrupt_saves_a_checkpoint_and_raises(tmp_path: Path) -> None:
    """SIGINT arrives while the second step waits for its batch: the step count of the checkpoint is that of the log."""
    timer = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT))

    class Interrupting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = small_module(), 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            if self.calls == 4 and not timer.is_alive():
                timer.start()
            h: torch.Tensor = self.inner(images)
            return h

    options = TINY | {"epochs": 1000}
    with pytest.raises(KeyboardInterrupt):
        pretrain("digits", Interrupting(), output=tmp_path / "run", knn_every=0, **options)
    state = load_checkpoint(RunFolder(tmp_path / "run").checkpoint)
    assert state["step"] == steps(tmp_path / "run")[-1]["step"] >= 1


@pytest.mark.slow
def test_script_without_main_guard_under_torchrun(tmp_path: Path) -> None:
    """Two calls in one script, with a worker process: both ranks return both runs, and the ranks agree."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import fastsimclr
from test_pretrain import TINY, small_module

for number in (1, 2):
    options = dict(output=f"run{{number}}", max_steps=2, workers=1, backend="torchvision", knn_every=0)
    run = fastsimclr.pretrain("digits", small_module(), **options, **TINY)
    print(f"loss {{run.metrics['loss'].tolist()}}\\n", end="", flush=True)
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = [line for line in done.stdout.splitlines() if line.startswith("loss [")]
    assert len(losses) == 4  # two ranks, two runs
    assert len(set(losses)) == 1
