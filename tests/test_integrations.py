"""docs/integrations.md: every code block runs, and losses that it calls equal are equal."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from fastsimclr import InfoNCELoss, NTXentLoss, SupConLoss, info_nce, nt_xent

ROOT = Path(__file__).resolve().parents[1]
# Warnings of other packages are not errors.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]
COMPILED = 'torch.compile(SimCLR(encoder("resnet18"), projector(512)), backend="eager")'  # no time for code generation
NEEDS = {  # packages of each section; those that are missing skip it (pip install -e '.[integrations]')
    "PyTorch": [],
    "lightly": ["lightly"],
    "PyTorch Lightning": ["pytorch_lightning"],
    "Hugging Face Trainer": ["transformers", "accelerate"],
    "Accelerate": ["accelerate"],
    "stable-pretraining": ["stable_pretraining"],
    "pytorch-metric-learning": ["pytorch_metric_learning"],
    "OpenCLIP": ["open_clip"],
    "MoCo": [],
    "SupContrast": [],
}


def sections() -> dict[str, str]:
    """Return the code of each section, by its title."""
    parts = re.split(r"^## (.*)\n", (ROOT / "docs" / "integrations.md").read_text(), flags=re.MULTILINE)
    return {
        title: "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


SECTIONS = sections()


def script(title: str, changes: dict[str, str] | None = None) -> str:
    """Return the code of a section, after that of the images. changes: texts to replace, which it must contain."""
    for package in NEEDS[title]:
        pytest.importorskip(package, reason=f"the section {title} needs it: pip install -e '.[integrations]'")
    code = SECTIONS[title]
    for old, new in (changes or {}).items():
        assert old in code
        code = code.replace(old, new)
    return f"{SECTIONS['Images']}\n{code}"


def two_ranks(code: str, folder: Path, *launcher: str) -> None:
    """Run code as a file, with a launcher that starts two processes."""
    file = folder / "train.py"
    file.write_text(code)
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(file)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")


def test_every_section_is_tested() -> None:
    assert list(SECTIONS) == ["Images", *NEEDS]
    assert all(SECTIONS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "title",
    ["PyTorch", "lightly", "stable-pretraining", "pytorch-metric-learning", "OpenCLIP", "MoCo", "SupContrast"],
)
def test_section_runs(title: str, working_directory: Path) -> None:
    names: dict[str, Any] = {}
    exec(script(title), names)
    if "loss" in names:
        assert torch.isfinite(names["loss"])


@pytest.mark.slow
def test_lightning_runs_on_two_ranks(working_directory: Path) -> None:
    changes = {
        'devices="auto"': "devices=2, accelerator='cpu', enable_progress_bar=False",
        'SimCLR(encoder("resnet18"), projector(512))': COMPILED,
        "sync_batchnorm=True": "sync_batchnorm=False",  # SyncBatchNorm of PyTorch needs a GPU
    }
    two_ranks(script("PyTorch Lightning", changes), working_directory)
    (checkpoint,) = working_directory.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["views._extra_state"] == 256  # images of rank 0


@pytest.mark.slow
def test_trainer_runs_on_two_ranks(working_directory: Path) -> None:
    changes = {"bf16=True": "bf16=True, use_cpu=True, torch_compile=True, torch_compile_backend='eager'"}
    two_ranks(script("Hugging Face Trainer", changes), working_directory, *TORCHRUN)


@pytest.mark.slow
def test_accelerate_runs_on_two_ranks(working_directory: Path) -> None:
    two_ranks(script("Accelerate", {"Accelerator(": "Accelerator(cpu=True, "}), working_directory, *TORCHRUN)
    assert (working_directory / "runs" / "accelerate" / "custom_checkpoint_0.pkl").is_file()


def projections(rank: int = 0, count: int = 6) -> list[Tensor]:
    random = torch.Generator().manual_seed(rank)
    return [torch.randn(count, 16, generator=random).requires_grad_() for _ in range(2)]


def value_and_gradients(loss: Any, rank: int = 0) -> list[Tensor]:
    z1, z2 = projections(rank)
    value = loss(z1, z2)
    return [value.detach(), *torch.autograd.grad(value, [z1, z2])]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_lightlys_losses_are_ours(temperature: float) -> None:
    lightly = pytest.importorskip("lightly.loss", reason="compared with its loss: pip install -e '.[integrations]'")
    theirs = value_and_gradients(lightly.NTXentLoss(temperature=temperature))
    assert_equal(value_and_gradients(NTXentLoss(temperature)), theirs)
    theirs = value_and_gradients(lightly.DCLLoss(temperature=temperature))
    assert_equal(value_and_gradients(NTXentLoss(temperature, decoupled=True)), theirs)


def losses_over_ranks(rank: int) -> list[list[Tensor]]:
    from lightly.loss import NTXentLoss as Lightlys

    losses = [NTXentLoss(0.5, group="world"), Lightlys(temperature=0.5, gather_distributed=True)]
    return [value_and_gradients(loss, rank) for loss in losses]


@pytest.mark.slow
def test_lightlys_gathered_loss_is_ours() -> None:
    pytest.importorskip("lightly", reason="compared with its loss: pip install -e '.[integrations]'")
    for ours, theirs in run_ranks(2, losses_over_ranks):
        assert_equal(ours, theirs)


def test_pytorch_metric_learnings_loss_is_ours() -> None:
    reason = "compared with its loss: pip install -e '.[integrations]'"
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason=reason)
    for temperature in (0.07, 0.5):
        theirs = value_and_gradients(losses.SelfSupervisedLoss(losses.NTXentLoss(temperature)))
        assert_equal(value_and_gradients(NTXentLoss(temperature)), theirs)


def test_pytorch_metric_learnings_supervised_loss_is_ours() -> None:
    reason = "compared with its loss: pip install -e '.[integrations]'"
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason=reason)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 1])
    for temperature in (0.07, 0.5):
        theirs = losses.SupConLoss(temperature)
        ours = SupConLoss(temperature)
        assert_equal(
            value_and_gradients(lambda z1, z2, loss=ours: loss(torch.cat([z1, z2]), labels)),
            value_and_gradients(lambda z1, z2, loss=theirs: loss(torch.cat([z1, z2]), labels)),
        )


def clip_loss(**options: Any) -> Any:
    reason = "compared with its loss: pip install -e '.[integrations]'"
    loss = pytest.importorskip("open_clip.loss", reason=reason).ClipLoss(**options)
    return lambda a, b: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), 1 / 0.07)


def test_openclips_loss_is_ours() -> None:
    assert_equal(value_and_gradients(InfoNCELoss(0.07)), value_and_gradients(clip_loss()))


def clip_losses_over_ranks(rank: int) -> list[list[Tensor]]:
    theirs = clip_loss(local_loss=True, gather_with_grad=True, rank=rank, world_size=2)
    return [value_and_gradients(loss, rank) for loss in (InfoNCELoss(0.07, group="world"), theirs)]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_openclips_gathered_loss_is_ours() -> None:
    pytest.importorskip("open_clip", reason="compared with its loss: pip install -e '.[integrations]'")
    for ours, theirs in run_ranks(2, clip_losses_over_ranks):
        assert_equal(ours, theirs)


def test_lightlys_loss_with_a_memory_bank_is_ours() -> None:
    lightly = pytest.importorskip("lightly.loss", reason="compared with its loss: pip install -e '.[integrations]'")
    theirs = lightly.NTXentLoss(temperature=0.5, memory_bank_size=(8, 16))
    theirs(*projections(1))  # fills the bank
    bank = theirs.memory_bank.bank.clone()

    def ours(z1: Tensor, z2: Tensor) -> Tensor:
        return info_nce(z1, z2, 0.5, symmetric=False, queue=bank, batch_negatives=False)

    assert_equal(value_and_gradients(ours), value_and_gradients(theirs))


def test_stable_pretrainings_loss_is_ours() -> None:
    reason = "compared with its loss: pip install -e '.[integrations]'"
    losses = pytest.importorskip("stable_pretraining.losses", reason=reason)
    assert_equal(value_and_gradients(nt_xent), value_and_gradients(losses.NTXEntLoss(0.1)))
