"""The code and commands of README.md work, and links in the docs resolve."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pictures import jpeg, photo, write
from PIL import Image
from weights import outputs, randomize_norms, save_run

from fastsimclr import encoder
from fastsimclr.cli import COMMANDS
from fastsimclr.config import parse

README = Path("README.md").read_text()
SMALL = [  # options that come last, and make each command fast
    *("--data.image_size=32", "--model.encoder=resnet18", "--batch_size=8", "--epochs=1", "--max_steps=1"),
    "--device=cpu",
]
SMALLER = {
    "train": SMALL,
    "preview": ["--images=2", "--data.image_size=32"],
    "evaluate knn": ["--k=1"],
    "evaluate linear": ["--epochs=1"],
    "evaluate finetune": ["--epochs=1", "--labels=0.5"],
    "embed": ["--map=pca"],
}
DEVELOPMENT = ("python3", "pip", "pytest", ".ci/run", "source")  # run by .ci/run, or by developers


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words for words in lines if words and words[0] not in DEVELOPMENT]


def python_block(marker: str) -> str:
    (found,) = (block for block in blocks("python") if marker in block)
    return found


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: photos/train and photos/val, with the classes a and b."""
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 10), ("val", 5)):
        images = {f"{label}/{number}.jpg": jpeg(photo(48, 48, number)) for label in "ab" for number in range(count)}
        write(tmp_path / "photos" / part, images)
    return tmp_path


def test_loss_equals_the_three_lines_below_it() -> None:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours: dict[str, Any] = {"z1": z1, "z2": z2}
    exec(python_block("loss = nt_xent(z1, z2, temperature=0.1)"), ours)
    theirs = {"z1": z1, "z2": z2, "temperature": 0.1, "N": 5, "torch": torch, "F": F}
    exec(python_block("z @ z.T"), theirs)
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-12, atol=0)
    assert z1.grad is not None


def test_encoder_of_a_run_loads(tmp_path: Path) -> None:
    trained = randomize_norms(encoder("resnet18"))
    save_run(tmp_path / "run", trained)
    names: dict[str, Any] = {"image": Image.new("RGB", (60, 50))}
    exec(python_block("load_encoder").replace("runs/photos", str(tmp_path / "run")), names)
    assert torch.equal(outputs(names["encoder"]), outputs(trained))
    assert names["h"].shape == (1, 512)


def test_pretrain_trains_on_a_dataset(working_directory: Path) -> None:
    code = python_block("pretrain(")
    for large, small in (
        ("batch_size=256", 'batch_size=10, image_size=32, max_steps=1, knn_k=3, device="cpu"'),
        ("timm/vit_tiny_patch16_224", "resnet18"),  # timm is optional
    ):
        assert large in code
        code = code.replace(large, small)
    dataset = [(Image.fromarray(photo(40, 48, number)), number % 2) for number in range(20)]
    names: dict[str, Any] = {"dataset": dataset, "images": torch.zeros(2, 3, 32, 32)}
    exec(code, names)
    assert names["h"].shape == (2, 512)


def test_training_loop_trains(photos: Path) -> None:
    code = python_block("LARS(")
    for large, small in (
        ("range(100)", "range(2)"),
        ("batch_size=256", "batch_size=10, workers=0"),
        ("image_size=224", "image_size=32"),
        ('encoder("resnet50")', 'encoder("resnet18")'),
        ("projector(2048", "projector(512"),
    ):
        assert large in code
        code = code.replace(large, small)
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.isfinite(names["loss"])
    encoder("resnet18").load_state_dict(torch.load("encoder.pt", weights_only=True))


def test_options_in_the_table_exist() -> None:
    table = README[README.index("| To | use |") : README.index("## The loss alone")]
    options = [shlex.split(code) for code in re.findall(r"`(--[^`]*)`", table)]
    assert len(options) >= 6
    for words in options:
        parse(["--data.train=photos", *words])


@pytest.mark.slow
def test_every_command_runs(photos: Path) -> None:
    names = set()
    for words in commands():
        distributed = words[0] == "torchrun"
        name = "train" if distributed else " ".join(words[1:3] if words[1] == "evaluate" else words[1:2])
        if distributed:
            assert words[1:5] == ["--nproc-per-node", "8", "-m", "fastsimclr.train"]
            words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *words[3:]]
        else:
            assert words[0] == "fastsimclr"
            words = [sys.executable, "-m", "fastsimclr.cli", *words[1:]]
        done = subprocess.run([*words, *SMALLER.get(name, [])], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        names.add(name.split()[0])
    assert names == set(COMMANDS) - {"doctor", "plan"}  # named in the text only
    assert Path("encoder.pt").is_file()
    assert Path("runs/photos/report.html").is_file()


@pytest.mark.parametrize("page", ["README.md", *map(str, Path("docs").glob("*.md"))])
def test_links_within_the_repository_resolve(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)[)#]", Path(page).read_text())
    missing = [target for target in targets if not (Path(page).parent / target).exists()]
    assert not missing
