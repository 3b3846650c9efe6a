"""Frozen parts of the encoder: nothing of them changes, and the rest trains as without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import jpeg, photo, write
from ranks import run_ranks
from torch import nn
from weights import randomize_norms, steps

from fastsimclr import NTXentLoss, SimCLR, UserError, encoder, projector
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.config import parse
from fastsimclr.distributed import World
from fastsimclr.models import as_encoder
from fastsimclr.optim import build_optimizer
from fastsimclr.precision import choose_precision
from fastsimclr.train import main
from fastsimclr.training.freeze import Freezing
from fastsimclr.training.step import Step
from fastsimclr.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def small_model() -> SimCLR:
    torch.manual_seed(0)
    body = encoder("resnet18", 0.25, image_size=16)
    return SimCLR(body, projector(body.out_features, 16, 8))


def train(model: SimCLR, optimizer: torch.optim.Optimizer, micro_batch_size: int | None, steps: int = 2) -> None:
    precision = choose_precision("fp32", CPU)
    step = Step(model, NTXentLoss(backend="reference"), precision, micro_batch_size, precision.grad_scaler(CPU))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        views = [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2)]
        step.backward(views, 4)
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Any]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_nothing_frozen_changes(name: str, micro_batch_size: int | None) -> None:
    model = small_model()
    freezing = Freezing(model, "conv1, bn1,layer1.0,layer2.0.conv1.weight", epochs=1)
    optimizer = build_optimizer(name, model.parameters(), 0.1, 0.9, 0.1)
    frozen = ("conv1.", "bn1.", "layer1.0.", "layer2.0.conv1.")
    always = {key for key in model.state_dict() if key.removeprefix("encoder.").startswith(frozen)}

    assert freezing.start_epoch(0)
    before = snapshot(model)
    train(model, optimizer, micro_batch_size)
    assert changed(model, before) == {key for key in before if key.startswith("projector.")}
    assert {id(parameter) for parameter in optimizer.state} <= {id(p) for p in model.projector.parameters()}

    assert freezing.start_epoch(1)
    assert not freezing.start_epoch(2)
    before = snapshot(model)
    train(model, optimizer, micro_batch_size)
    assert changed(model, before) == set(before) - always
    assert all(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_frozen_bn_keeps_the_statistics_and_trains_the_rest(micro_batch_size: int | None) -> None:
    model = small_model()
    freezing = Freezing(model, "conv1", epochs=0, frozen_bn=True)
    optimizer = build_optimizer("lars", model.parameters(), 0.1, 0.9, 0.1)
    freezing.start_epoch(0)
    before = snapshot(model)
    train(model, optimizer, micro_batch_size)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    fixed = {key for key in before if key.startswith("encoder.") and key.endswith(statistics)}
    assert changed(model, before) == set(before) - fixed - {"encoder.conv1.weight"}
    assert str(freezing) == "conv1, the running statistics of batch normalization"


def test_micro_batches_with_frozen_bn_equal_the_whole_batch() -> None:
    """Without batch normalization in the projector, which frozen_bn leaves as it is."""
    gradients = []
    for micro_batch_size in (None, 1, 3):
        model = small_model().double()
        model.projector = nn.Linear(model.encoder.out_features, 8).double()
        randomize_norms(model.encoder)
        Freezing(model, "", epochs=0, frozen_bn=True).start_epoch(0)
        precision = choose_precision("fp64", CPU)
        step = Step(model, NTXentLoss(), precision, micro_batch_size, precision.grad_scaler(CPU))
        step.backward(list(torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()), 4)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for parts in gradients[1:]:
        torch.testing.assert_close(parts, gradients[0], rtol=0, atol=1e-10)


def test_frozen_bn_needs_batch_normalization() -> None:
    model = SimCLR(as_encoder(nn.Conv2d(3, 4, 3), image_size=8, channels=3), projector(4, 4, 4))
    with pytest.raises(UserError, match=r"--model.frozen_bn: got true for an encoder without batch normalization"):
        Freezing(model, "", 0, frozen_bn=True)


def test_users_module_is_frozen_by_its_own_names_and_keeps_what_it_does_not_train() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1))
    module[0].bias.requires_grad_(False)
    model = SimCLR(as_encoder(module, image_size=8, channels=3), projector(4, 4, 4))
    freezing = Freezing(model, "2", epochs=1)
    freezing.start_epoch(0)
    assert not module[1].training
    freezing.start_epoch(1)
    assert module[1].training
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, False, False, False]


@pytest.mark.parametrize("name", ["layer", "layer1.0.conv", "layer1.2", "encoder.layer1"])
def test_unknown_name_lists_the_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}', expected .*: conv1, bn1, layer1, layer2, layer3, layer4"):
        Freezing(small_model(), f"layer1,{name}", 0)


TINY = ["--data.image_size=16", "--model.encoder=resnet18", "--model.width=0.25", "--model.hidden=16", "--model.out=8"]
TINY += ["--batch_size=8", "--epochs=3", "--knn_every=1", "--device=cpu", "--data.workers=0"]
FREEZE = ["--model.freeze=conv1,bn1", "--model.freeze_epochs=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 photos of two classes: two batches of 8 an epoch."""
    files = {f"class{number % 2}/{number}.jpg": jpeg(photo(20, 20, seed=number)) for number in range(16)}
    return write(tmp_path_factory.mktemp("photos"), files)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / "last.pt")["model"]


@pytest.mark.slow
def test_resume_in_and_after_the_frozen_epochs_is_bit_identical(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, *FREEZE, f"--data.train={photos}", "--precision=fp32"]
    assert main([*options, f"--output={tmp_path / 'whole'}"]) == 0
    assert " train (frozen: conv1, bn1, the whole encoder until the end of epoch 1)" in capsys.readouterr().out
    seen = []
    for last in (1, 2, 3, 6):  # in the first epoch, at its end, after it, and to the end
        assert main([*options, f"--max_steps={last}", f"--output={tmp_path / 'resumed'}"]) == 0
        seen.append(weights(tmp_path / "resumed"))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, seen[-1][name]), name
        is_fixed = torch.equal(seen[0][name], seen[1][name])
        assert is_fixed == name.startswith("encoder."), name
        is_fixed = torch.equal(seen[1][name], tensor)
        assert is_fixed == name.startswith(("encoder.conv1.", "encoder.bn1.")), name
    assert [s["loss"] for s in steps(tmp_path / "whole")] == [s["loss"] for s in steps(tmp_path / "resumed")]


def train_on_rank(rank: int, options: list[str], run: Path) -> str | None:
    """Train; return the message of a user error."""
    try:
        Trainer(parse([*options, f"--output={run}"]), World(rank, 2, CPU)).train()
    except UserError as error:
        return str(error)
    return None


def per_rank(rank: int, options: list[str], folder: Path) -> tuple[str | None, str | None]:
    done = train_on_rank(rank, options, folder / "two")
    return done, train_on_rank(rank, [*options, f"--model.weights={folder / 'missing.pt'}"], folder / "failed")


@pytest.mark.slow
def test_two_ranks_compute_the_same_as_one(tmp_path: Path, photos: Path) -> None:
    """Also with weights, which rank zero alone loads; if it can't, all ranks fail."""
    state = encoder("resnet18", image_size=16).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    options = [*TINY, *FREEZE, f"--data.train={photos}", "--precision=fp64", "--optim.warmup_epochs=0"]
    options += ["--epochs=2", "--model.width=1", f"--model.weights={tmp_path / 'weights.pt'}"]
    assert main([*options, f"--output={tmp_path / 'one'}"]) == 0
    for done, failed in run_ranks(2, per_rank, options, tmp_path):
        assert done is None
        assert failed is not None
        assert "missing.pt: got no such file" in failed
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=0, atol=1e-8)
    torch.testing.assert_close(weights(tmp_path / "two")["encoder.conv1.weight"].float(), state["conv1.weight"])
