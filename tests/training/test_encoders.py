"""Training of encoders of timm and torchvision and of a user's module: resumed, on two ranks, and the errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr import encoder
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.config import Config, parse
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError
from fastsimclr.models import synchronize_batch_norm
from fastsimclr.optim import LARS
from fastsimclr.train import main
from fastsimclr.training.build import build_learner
from fastsimclr.training.trainer import Trainer

SMALL = ["--data.train=digits", "--data.image_size=32", "--model.hidden=32", "--model.out=16", "--batch_size=8"]
SMALL += ["--epochs=1", "--optim.warmup_epochs=0", "--knn_every=0", "--device=cpu", "--precision=fp32"]

MODULE = """
from torch import nn
def make(features=12):
    return nn.Sequential(nn.Conv2d(3, features, 4, 4), nn.BatchNorm2d(features), nn.ReLU(), nn.Dropout(0.2))
def make_wider():
    return make(20)
def make_half_used():
    module = make()
    module.unused = nn.Linear(3, 3)
    module.forward = lambda images: nn.Sequential(*list(module)[:4])(images)
    return module
"""


@pytest.fixture(scope="module")
def module_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("modules") / "modules_to_train.py"
    file.write_text(MODULE)
    return file


def configure(*options: str) -> Config:
    return parse([*SMALL, *options])


def weights(run: Path) -> dict[str, Tensor]:
    return load_checkpoint(run / "checkpoints" / "last.pt")["model"]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("timm/vit_tiny_patch16_224", "adamw"),
        ("timm/convnext_atto", "adamw"),
        ("torchvision/efficientnet_b0", "lars"),  # with drop-path and dropout
        ("torchvision/mobilenet_v3_small", "lars"),
        ("FILE:make", "lars"),
    ],
)
@pytest.mark.slow
def test_resumed_run_has_the_same_bits(
    name: str, optimizer: str, module_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, f"--model.encoder={name.replace('FILE', str(module_file))}"]
    assert main([*options, "--max_steps=3", f"--output={tmp_path / 'whole'}"]) == 0
    said = capsys.readouterr().out
    assert f"optimizer: {optimizer} (auto: " in said
    assert "images 3 x 32 x 32" in said
    for steps in (2, 3):
        assert main([*options, f"--max_steps={steps}", f"--output={tmp_path / 'resumed'}"]) == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(tensor.isfinite().all() and torch.equal(tensor, resumed[path]) for path, tensor in whole.items())


def test_dropout_differs_between_steps_and_not_between_runs(tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 8))
        trainer = Trainer(configure(f"--output={tmp_path}"), SINGLE_PROCESS, encoder=module)
        trainer.optimizer.param_groups[0]["lr"] = trainer.optimizer.param_groups[1]["lr"] = 0.0
        batch = next(iter(trainer.loader))
        for step in (0, 0, 1):
            trainer.progress.step = step
            losses.append(trainer.train_step(batch)["loss"].item())
        trainer.close()
    assert losses[0] == losses[1] == losses[3] == losses[4]
    assert losses[2] == losses[5] != losses[0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["FILE:make"], ["FILE:make_wider"], ["last.pt: got weights of another encoder", "instead of (20, 3, 4, 4)"]),
        (["FILE:make"], ["timm/test_vit"], ["encoder 'module' instead of 'timm/test_vit'"]),
        (["timm/test_vit"], ["timm/test_vit", "--data.image_size=48"], ["image_size 32 instead of 48"]),
        (["FILE:make"], ["FILE:make", "--optim.name=sgd"], ["optimizer 'lars' instead of 'sgd'"]),
    ],
)
def test_resumed_run_must_have_the_same_encoder(
    first: list[str], second: list[str], expected: list[str], module_file: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for max_steps, (name, *options), code in ((1, first, 0), (2, second, 2)):
        name = name.replace("FILE", str(module_file))
        run = [*SMALL, f"--model.encoder={name}", *options, f"--max_steps={max_steps}", f"--output={tmp_path}"]
        assert main(run) == code
    (line,) = capfd.readouterr().err.splitlines()[-1:]
    assert all(text in line for text in expected), line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.encoder=resnet19"], "the nearest are resnet18"),
        (["--model.encoder=missing.py:make"], "got missing.py, expected an existing Python file"),
        (
            [
                "--model.encoder=timm/vit_tiny_patch16_224",
                "--data.num_views=2",
                '--data.per_view=[{},{"image_size":48}]',
            ],
            "got timm/vit_tiny_patch16_224 on images of 3 x 48 x 48, which fails: AssertionError: Input height",
        ),
        (["--optim.weight_decay=-1"], "--optim.weight_decay: got -1.0, expected at least 0, or auto"),
    ],
)
def test_errors_come_before_the_first_step(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(configure(*options, f"--output={tmp_path}"), SINGLE_PROCESS)


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_batch_norm_with_its_own_forward_cannot_be_synchronized() -> None:
    with pytest.raises(UserError, match=r"--model.sync_bn: got a OwnBatchNorm .* use --model.sync_bn false"):
        synchronize_batch_norm(nn.Sequential(OwnBatchNorm(3)), torch.device("cpu"))


def test_conversion_for_gpus_keeps_the_activations_of_timm() -> None:
    made = encoder("timm/test_efficientnet", image_size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = made.eval()(images)
    converted = synchronize_batch_norm(made, torch.device("cuda"))
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules())
    torch.testing.assert_close(converted(images), expected, rtol=0, atol=0)


def normalized_encoder() -> nn.Module:
    torch.manual_seed(0)
    made = encoder("timm/test_efficientnet", image_size=32).double()
    return nn.Sequential(made, nn.BatchNorm1d(made.out_features, affine=False, momentum=None, dtype=torch.float64))


def train_two_steps(model: nn.Module, original: nn.Module, images: Tensor) -> dict[str, Tensor]:
    optimizer = LARS(original.parameters(), lr=0.1)
    for _ in range(2):
        model(images).square().mul(torch.arange(1, 1 + 256)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in original.state_dict().items()}


def two_steps_on_a_rank(rank: int, images: Tensor) -> dict[str, Tensor]:
    model = synchronize_batch_norm(normalized_encoder(), torch.device("cpu"))
    return train_two_steps(DistributedDataParallel(model), model, images.chunk(2)[rank])


@pytest.mark.slow
def test_two_ranks_train_a_timm_encoder_like_one_process() -> None:
    """EfficientNet has timm's BatchNormAct2d: batch normalization with an activation."""
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results: list[Any] = run_ranks(2, two_steps_on_a_rank, images)
    model = normalized_encoder()
    expected = train_two_steps(model, model, images)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


def build_on_rank(rank: int, encoder: str) -> None:
    expected = (
        r"module with 2 parameters that its output does not depend on \(module.unused.weight, module.unused.bias\)"
    )
    with pytest.raises(UserError, match=expected):
        build_learner(configure(f"--model.encoder={encoder}"), World(rank, 2, torch.device("cpu")))


@pytest.mark.slow
def test_unused_parameters_are_refused_on_several_ranks(module_file: Path) -> None:
    run_ranks(2, build_on_rank, f"{module_file}:make_half_used")
