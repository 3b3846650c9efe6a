"""The training command with real files, processes and signals."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import runs
from pictures import photo_folder, write
from PIL import Image
from weights import metrics, steps

from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.train import main

# Steps take a fraction of a second: small images, an early downsampling stem and a small batch.
TINY = [
    "--data.image_size=16",
    "--model.encoder=resnet18",
    "--model.stem=imagenet",
    "--model.hidden=32",
    "--model.out=16",
]
TINY += ["--batch_size=16", "--epochs=2", "--knn_every=0", "--device=cpu", "--precision=fp32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 smooth JPEG files in two class folders: two batches of 16 and a last one of 8."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(40):
        file = folder / f"class{number % 2}" / f"{number:02d}.jpg"
        file.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(file)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / "last.pt")["model"]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the single line on stderr, but for those that name slow phases of a run."""
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not re.search(r": [\d.]+ (s|min)\b", line)]
    assert len(errors) == 1, lines
    assert errors[0].startswith("fastsimclr.train: error: ")
    return errors[0]


@pytest.mark.slow
def test_run_writes_its_files_and_the_loss_decreases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Not an image size of 16: oneDNN's bf16 gradient of a 3x3 convolution over 1x1 pixels (torch 2.14, CPUs with AMX)
    # reads past its input, where memory may hold NaN.
    options = ["--config=digits", "--epochs=3", "--knn_every=1", f"--output={tmp_path / 'run'}", "--data.image_size=20"]
    assert main(options) == 0
    said = capsys.readouterr().out
    assert "% trained, " in said
    assert "lr 0.8485 (auto: sqrt rule at batch 128)" in said

    lines = steps(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 37))  # 1,433 images: eleven batches of 128 and one of 25
    assert {line["images"] for line in lines} == {128, 25}
    for name in ("epoch", "lr", "images_per_second", "data_wait", "step_ms"):
        assert all(name in line for line in lines), name
    for line in lines:
        stages = line["stages_ms"]
        assert list(stages) == ["data_wait", "views", "forward", "loss", "backward", "optimizer", "other"]
        assert sum(stages.values()) == pytest.approx(line["step_ms"], rel=0.01)
        assert min(stages.values()) > 0
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-6:]) < np.mean(losses[:6])
    knn = [line["knn_accuracy"] for line in metrics(tmp_path / "run") if "knn_accuracy" in line]
    assert len(knn) == 4  # untrained, and after each epoch
    assert all(0 <= accuracy <= 1 for accuracy in knn)
    assert (tmp_path / "run" / "config.yaml").read_text().count("train: digits") == 1
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["command"] == ["python", "-m", "fastsimclr.train", *options]
    assert environment["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert environment["loss"]["backend"] in environment["loss_backend"]


def test_saved_configuration_reproduces_the_run(tmp_path: Path) -> None:
    assert main([*TINY, "--data.train=digits", "--max_steps=2", f"--output={tmp_path / 'a'}"]) == 0
    assert main([f"--config={tmp_path / 'a' / 'config.yaml'}", f"--output={tmp_path / 'b'}"]) == 0
    assert [line["loss"] for line in steps(tmp_path / "a")] == [line["loss"] for line in steps(tmp_path / "b")]


def test_the_schedule_spans_the_steps_instead_of_the_epochs(tmp_path: Path, photos: Path) -> None:
    # 4 steps: one epoch of 3 and a part of the second
    assert main([*TINY, f"--data.train={photos}", "--steps=4", "--optim.lr=1", f"--output={tmp_path / 'run'}"]) == 0
    assert [line["lr"] for line in steps(tmp_path / "run")] == pytest.approx([1, 0.854, 0.5, 0.146], abs=1e-3)


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
@pytest.mark.slow
def test_resume_after_kill_is_bit_identical(tmp_path: Path, photos: Path, backend: str) -> None:
    options = [*TINY, f"--data.train={photos}", f"--data.backend={backend}", "--epochs=6", "--checkpoint_every=0.4"]
    process = runs.start(*options, f"--output={tmp_path / 'killed'}")
    runs.wait_for_step(process, tmp_path / "killed", step=int(np.random.default_rng().integers(2, 12)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = runs.count_steps(tmp_path / "killed")
    assert killed_at < 18

    resumed = runs.start(*options, f"--output={tmp_path / 'killed'}")
    whole = runs.start(*options, f"--output={tmp_path / 'whole'}")
    resumed.end()
    whole.end()

    assert [line["step"] for line in steps(tmp_path / "killed")] == list(range(1, 19))
    assert [line["loss"] for line in steps(tmp_path / "killed")] == [line["loss"] for line in steps(tmp_path / "whole")]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), (name, killed_at)


MULTI_CROP = ["--data.num_views=3", '--data.per_view=[{}, {}, {"image_size": 24, "scale": [0.05, 0.3]}]']


@pytest.mark.parametrize("views", [[], MULTI_CROP], ids=["two views", "multi-crop"])
@pytest.mark.slow
def test_two_ranks_compute_the_same_as_one(tmp_path: Path, views: list[str]) -> None:
    options = [
        *TINY,
        *views,
        "--data.train=digits",
        "--precision=fp64",
        "--optim.warmup_epochs=0",
        "--max_steps=5",
        "--optim.lr=0.5",
    ]
    for run, ranks in (("one", 1), ("two", 2)):
        runs.start(*options, f"--output={tmp_path / run}", ranks=ranks).end()
    assert_same_runs(tmp_path / "one", tmp_path / "two", count=5)
    assert all({"gather", "rank_wait"} <= set(line["stages_ms"]) for line in steps(tmp_path / "two"))


def assert_same_runs(one: Path, other: Path, *, count: int) -> None:
    """Compare the losses of `count` steps, and the final weights, statistics included, of two runs in float64."""
    losses = [[line["loss"] for line in steps(run)] for run in (one, other)]
    assert len(losses[0]) == count
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-8)
    ours = weights(one)
    for name, tensor in weights(other).items():
        assert tensor.dtype in (torch.float64, torch.int64)
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_eight_ranks_with_uneven_batches_compute_the_same_as_one(tmp_path: Path) -> None:
    """Of 21 images, five ranks have 3 and three have 2. Of an epoch's last batch, of 5 images, three ranks would have
    none: eight ranks leave it out, so that their schedule is shorter unless one process leaves it out, too."""
    options = [*TINY, "--data.train=digits", "--batch_size=21", "--data.drop_last", "--max_steps=5", "--precision=fp64"]
    options += ["--optim.warmup_epochs=0", "--optim.lr=0.5"]
    for run, ranks in (("one", 1), ("eight", 8)):
        for process in runs.fork(*options, f"--output={tmp_path / run}", ranks=ranks):
            process.end()
    assert_same_runs(tmp_path / "one", tmp_path / "eight", count=5)


@pytest.mark.slow
def test_loaders_give_the_same_loss_curve(tmp_path: Path) -> None:
    # Temperature 0.5: at 0.1, an untrained encoder's loss amplifies small differences until the curves diverge.
    folder = photo_folder(tmp_path / "photos", 64)
    options = [*TINY, f"--data.train={folder}", "--data.image_size=64", "--loss.temperature=0.5", "--batch_size=32"]
    options += ["--epochs=5", "--optim.lr=0.1"]
    curves = []
    for changes in (["--data.backend=torchvision"], ["--data.backend=dali"], ["--data.backend=dali", "--seed=1"]):
        run = tmp_path / str(len(curves))
        assert main([*options, *changes, f"--output={run}"]) == 0
        curves.append(np.array([line["loss"] for line in steps(run)]))
    torchvision, dali, other_views = curves
    assert len(dali) == 10
    assert abs(dali / torchvision - 1).max() <= 0.02
    assert abs(other_views / torchvision - 1).max() > 0.04, "another seed exceeds the bound"


@pytest.mark.parametrize("views", [[], MULTI_CROP], ids=["two views", "multi-crop"])
@pytest.mark.slow
def test_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path: Path, views: list[str]) -> None:
    """With batch normalization in eval mode, so that its statistics do not depend on the split."""
    from fastsimclr.config import parse
    from fastsimclr.distributed import World
    from fastsimclr.training.trainer import Trainer

    gradients = []
    for micro_batch_size in ("none", "5"):  # 16 images: four micro-batches of 4
        options = [*views, f"--output={tmp_path}", "--data.train=digits", f"--micro_batch_size={micro_batch_size}"]
        trainer = Trainer(parse([*TINY, *options, "--precision=fp64"]), World(0, 1, torch.device("cpu")))
        trainer.model.eval()
        trainer.stepper.backward(next(iter(trainer.loader)).views, 16)
        gradients.append([p.grad for p in trainer.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 60
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.train=nowhere"], ["nowhere", "nothing at that path", "expected a folder"]),
        (["--data.train={empty}"], ["no images", "expected files ending in"]),
        (["--data.train={short}"], ["truncated or damaged", "short.tar", "expected a complete"]),
        (
            ["--data.train={unreadable}"],
            ["--data.max_bad: got 1 of 16", "07.jpg: got", "do not decode", "repair", "skipped_images.txt"],
        ),
        (["--data.train={photos}", "--data.max_bad=2"], ["--data.max_bad", "got 2.0", "expected from 0 to 1"]),
        (["--data.train={photos}", "--batch_size=41"], ["batch_size", "got 41", "40 images", "expected at most 40"]),
        (["--data.train={photos}", "--batch_size=1"], ["batch_size", "got 1", "expected at least 2"]),
        (["--data.train={photos}", "--batchsize=1"], ["--batchsize", "unrecognized"]),
        (["--data.train={photos}", "--epochs=many"], ["--epochs", "got many", "expected int"]),
        (
            ["--data.train={photos}", "--model.encoder=resnet51"],
            ["encoder: got 'resnet51'", "the nearest are timm/resnet51q"],
        ),
        (["--data.train={photos}", "--data.flip_prob=2"], ["--data.flip_prob", "got 2.0", "expected from 0 to 1"]),
        (["--data.train={mixed}", "--data.backend=memory"], ["003.jpg: got 81x75 pixels", "images of one size"]),
        (
            ["--data.train={photos}", "--resume={unreadable}/a/07.jpg"],
            ["07.jpg", "without the checksum at its end", "expected a checkpoint"],
        ),
        (["--data.train={photos}", "--resume=gone.pt"], ["gone.pt", "no such file", "expected a checkpoint"]),
        (["--data.train={photos}", "--config=gone.yaml"], ["gone.yaml"]),
        (["--data.train={photos}", "--device=tpu"], ["device", "tpu", "expected auto, cpu or cuda"]),
        (
            ["--data.train={photos}", "--loss.backend=fused"],
            ["--loss.backend", "it needs a CUDA GPU", 'use backend="auto"'],
        ),
        (["--data.train={photos}", "--data.val={mixed}"], ["--data.val: got classes that differ", "only in val"]),
        (["--data.train={photos}", "--data.num_views=1"], ["--data.num_views", "got 1", "expected at least 2"]),
    ],
)
def test_user_error_is_one_line_with_exit_code_2(
    tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str], options: list[str], expected: list[str]
) -> None:
    paths = {"photos": photos, "empty": tmp_path / "empty", "unreadable": tmp_path / "unreadable"}
    paths["empty"].mkdir()
    (paths["unreadable"] / "a").mkdir(parents=True)
    for number, file in enumerate(sorted(photos.rglob("*.jpg"))[:16]):
        data = file.read_bytes()
        (paths["unreadable"] / "a" / f"{number:02d}.jpg").write_bytes(data[:-100] if number == 7 else data)
    paths["mixed"] = photo_folder(tmp_path / "mixed", 18)
    paths["short"] = tmp_path / "short.tar"
    subprocess.run(["tar", "cf", paths["short"], "-C", photos, "class0"], check=True)
    paths["short"].write_bytes(paths["short"].read_bytes()[:20_000])

    options = [option.format_map(paths) for option in options]
    assert main([*TINY, f"--output={tmp_path / 'run'}", *options]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "fastsimclr.train: error: " in line]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    for words in expected:
        assert words in lines[0]


def test_checkpoint_of_another_architecture_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--data.train=digits", f"--output={tmp_path}"]
    assert main([*options, "--max_steps=1"]) == 0
    capsys.readouterr()
    assert main([*options, "--model.encoder=resnet34"]) == 2
    line = error_line(capsys)
    assert "last.pt" in line
    assert "encoder 'resnet18' instead of 'resnet34'" in line


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_every_optimizer_resumes_bit_for_bit(tmp_path: Path, photos: Path, name: str) -> None:
    options = [*TINY, f"--data.train={photos}", "--data.backend=torchvision", f"--optim.name={name}", "--optim.lr=0.01"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*options, f"--output={whole}"]) == 0
    for steps_so_far in (2, 6):
        assert main([*options, f"--max_steps={steps_so_far}", f"--output={parts}"]) == 0
    expected, got = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, parts))
    assert expected["step"] == got["step"] == 6
    for part in ("model", "optimizer"):
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=0)


def test_non_finite_loss_stops_the_run_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--data.train=digits", f"--output={tmp_path}", "--optim.name=sgd", "--optim.lr=1e30"]
    assert main([*options, "--epochs=1", "--optim.warmup_epochs=0", "--max_skipped=2"]) == 2
    *lines, error = capsys.readouterr().err.splitlines()  # on a busy machine, with lines of progress
    assert [line for line in lines if line.startswith("step 2: skipped, with a loss of nan")], lines
    assert "fastsimclr.train: error: loss: got nan" in error
    assert "lower --optim.lr" in error
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


def fail_on_two_ranks(*options: str, cause: Callable[[runs.Process], None] = lambda _: None) -> str:
    """Run two ranks that must both exit with code 2, and return the single line of error.

    Without torchrun, which would end the second rank when the first ends, and so hide a hang. cause: called with the
    first process after both have started.
    """
    ranks = runs.fork(*TINY, *options, ranks=2)
    try:
        cause(ranks[0])
        codes = [rank.wait() for rank in ranks]
    finally:
        runs.kill_all()
    errors = "".join(rank.errors for rank in ranks)
    assert codes == [2, 2], errors
    lines = [line for line in errors.splitlines() if "fastsimclr.train: error: " in line]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


@pytest.mark.slow
def test_error_on_one_rank_stops_the_others(tmp_path: Path, photos: Path) -> None:
    folder = write(tmp_path / "photos", {file.name: file.read_bytes() for file in photos.rglob("*.jpg")})

    def truncate_a_file(rank: runs.Process) -> None:
        runs.wait_for_step(rank, tmp_path / "run", 1)
        (folder / "07.jpg").write_bytes((folder / "07.jpg").read_bytes()[:-100])

    options = [f"--data.train={folder}", f"--output={tmp_path / 'run'}", "--data.backend=torchvision", "--epochs=500"]
    line = fail_on_two_ranks(*options, cause=truncate_a_file)
    assert "07.jpg" in line
    assert "do not decode" in line


@pytest.mark.slow
def test_one_image_per_rank_ends_all_ranks(tmp_path: Path) -> None:
    line = fail_on_two_ranks("--data.train=digits", "--batch_size=3", f"--output={tmp_path}")
    assert "batch_size: got 3 for 2 ranks" in line
    assert "expected at least 4" in line
