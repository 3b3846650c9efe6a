"""docs/comparison.md: the programs have as many lines as it says, and run on tiny data."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import jpeg, photo, write

from fastsimclr import cli

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "comparison"
PAGE = (ROOT / "docs" / "comparison.md").read_text()
# Warnings of other packages are not errors.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]
SMALLER_PYTHON = {
    '"cuda"': '"cpu"',
    "batch_size=256": "batch_size=4",
    "num_workers=8": "num_workers=0",
    "SimCLRTransform()": "SimCLRTransform(input_size=32)",
    "Resize(256)": "Resize(32)",
    "Crop(224)": "Crop(32)",
    "range(100)": "range(1)",
    "Trainer(": 'Trainer(accelerator="cpu", enable_progress_bar=False, ',
    "epochs=100": "epochs=1",
    "max_epochs=90": "max_epochs=1",
    'devices="auto"': "devices=2",
    "sync_batchnorm=True": "sync_batchnorm=False",  # SyncBatchNorm of PyTorch needs a GPU
    'output="runs/dataset"': 'output="runs/dataset", image_size=32, batch_size=8, device="cpu"',
}
SMALLER_OURS = ["--data.image_size=32", "--batch_size=8", "--epochs=1", "--device=cpu"]
SMALLER_SOLO = ["data.num_workers=0", "optimizer.batch_size=8", "max_epochs=1", "accelerator=cpu", "devices='1'"]
SMALLER_SOLO += ["precision=32", "++strategy=auto", "sync_batchnorm=False", "wandb.enabled=False"]


def lines(program: Path) -> list[str]:
    return [line for line in program.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]


def code(program: str) -> str:
    """Return the Python code of a program, with sizes for a quick run on a CPU."""
    text = (PROGRAMS / program).read_text()
    for large, small in SMALLER_PYTHON.items():
        text = text.replace(large, small)
    return text


def words(program: str) -> list[str]:
    """Return the command of a program, without the name of the interpreter or console script."""
    return shlex.split((PROGRAMS / program).read_text().replace("\\\n", " "))[1:]


def python(*arguments: str, **environment: str) -> str:
    """Run Python in a new process, and return its output."""
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def photos(working_directory: Path) -> Path:
    """The working directory with photos/train and photos/val, of the classes a and b."""
    for part, count in (("train", 10), ("val", 5)):
        images = {f"{label}/{number}.jpg": jpeg(photo(48, 48, number)) for label in "ab" for number in range(count)}
        write(working_directory / "photos" / part, images)
    return working_directory


def test_every_program_is_counted_as_the_table_says() -> None:
    cells = re.findall(r"\[(\d+)\]\(\.\./tests/comparison/([^)]+)\)", PAGE)
    programs = [path for path in PROGRAMS.rglob("*") if path.is_file()]
    assert {program for _, program in cells} == {str(path.relative_to(PROGRAMS)) for path in programs}
    assert {program: int(count) for count, program in cells} == {
        str(path.relative_to(PROGRAMS)): len(lines(path)) for path in programs
    }
    assert max(len(line) for path in programs for line in lines(path)) <= 120


def test_losses_of_all_programs_are_equal() -> None:
    values = {}
    for project, package in (("fastsimclr", "fastsimclr"), ("lightly", "lightly"), ("solo_learn", "solo")):
        if importlib.util.find_spec(package) is not None:
            z1, z2 = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
            names: dict[str, Any] = {"z1": z1, "z2": z2}
            exec(code(f"{project}/loss.py"), names)
            values[project] = float(names["loss"])
    assert values == dict.fromkeys(values, pytest.approx(values["fastsimclr"], rel=1e-5))


@pytest.mark.slow
def test_our_programs_run(photos: Path) -> None:
    for task in ("folder", "backbone", "resume"):
        assert cli.main([*words(f"fastsimclr/{task}.sh"), *SMALLER_OURS]) == 0
    exec(code("fastsimclr/dataset.py"), {})
    assert (photos / "runs" / "dataset" / "checkpoints" / "last.pt").is_file()
    for task, options in (("knn", ["--k=1"]), ("linear", ["--epochs=1"]), ("export", [])):
        assert cli.main([*words(f"fastsimclr/{task}.sh"), *options]) == 0
    several = [word if word != "8" else "2" for word in words("fastsimclr/several_gpus.sh")]
    python("-m", "torch.distributed.run", *several, *SMALLER_OURS, "--output=runs/two", PYTHONPATH=str(ROOT))
    trained = torch.load("runs/photos/checkpoints/last.pt", weights_only=True)["model"]
    names = {name.removeprefix("encoder.") for name in trained if name.startswith("encoder.")}
    assert torch.load("encoder.pt", weights_only=True).keys() == names


@pytest.mark.slow
def test_lightlys_programs_run(photos: Path) -> None:
    pytest.importorskip("lightly", reason="runs its programs: pip install -e '.[integrations]'")
    names: dict[str, Any] = {}
    exec(code("lightly/folder.py") + code("lightly/export.py"), names)
    assert torch.isfinite(names["loss"])
    assert torch.load("encoder.pt", weights_only=True).keys() == names["backbone"].state_dict().keys()
    for task in ("knn", "linear", "dataset", "backbone"):
        exec(code(f"lightly/{task}.py"), {})
    for name in ("several_gpus", "resume"):
        Path(f"{name}.py").write_text(code(f"lightly/{name}.py"))
        python(f"{name}.py")
    assert "Restored all states from the checkpoint" in python("resume.py")


@pytest.mark.slow
def test_solo_learns_programs_run(photos: Path) -> None:
    solo = pytest.importorskip(
        "solo", reason="runs its programs: put a clone of github.com/vturrisi/solo-learn on PYTHONPATH"
    )
    clone = Path(solo.__file__).parents[1]
    for label in "cde":  # its linear evaluation needs five classes
        for part in ("train", "val"):
            write(
                photos / "photos" / part, {f"{label}/{number}.jpg": jpeg(photo(48, 48, number)) for number in range(2)}
            )

    def run(task: str, options: dict[str, str] | None = None) -> str:
        script, *arguments = [(options or {}).get(word, word) for word in words(f"solo_learn/{task}.sh")]
        arguments = [word.replace("=photos", f"={photos}/photos") for word in arguments]
        return python(str(clone / script), *arguments, *SMALLER_SOLO, PYTHONPATH=str(clone))

    for task in ("folder", "backbone", "resume"):
        run(task)
    checkpoint = next(photos.rglob("trained_models/simclr/*/*.ckpt"))
    name = "pretrained_feature_extractor="
    run("linear", {f"{name}trained_models/simclr/RUN/LAST.ckpt": f"{name}'{checkpoint}'"})  # quoted: it contains "="
