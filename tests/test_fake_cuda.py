"""The host code of training and evaluation on a fake GPU, which needs no GPU.

Detects tensors on the wrong device, except those that PyTorch accepts there: 0-dim tensors and indices.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import GPU, fake_cuda, real
from torch import Tensor

from fastsimclr import _extension, encoder, info_nce, nt_xent, sup_con
from fastsimclr.config import parse
from fastsimclr.data import open_source, open_views
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.data.torchvision import _Crops
from fastsimclr.distributed import World
from fastsimclr.evaluation import linear
from fastsimclr.evaluation.classifier import Classifier, Schedule, train_classifier
from fastsimclr.evaluation.features import Shard
from fastsimclr.evaluation.knn import knn_ranking, measure
from fastsimclr.loss import fused, tiled
from fastsimclr.loss.log_sums import log_sums_backward, log_sums_forward
from fastsimclr.models import Encoder
from fastsimclr.precision import choose_precision
from fastsimclr.training.step import Step
from fastsimclr.training.trainer import Trainer

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch is built without CUDA"),
    pytest.mark.skipif(_extension.compiled is None, reason="the extension is not built"),
]

WORLD = World(0, 1, GPU)
LOADER = LoaderConfig(batch_size=8, backend="memory", world=WORLD)
HOPPER, TURING = (9, 0), (7, 5)
"""Compute capabilities: Hopper uses the extension's kernels and bf16, Turing uses PyTorch operations and fp16."""
COLORFUL = Augmentation(
    image_size=16,
    flip_prob=1.0,
    jitter_prob=1.0,
    grayscale_prob=1.0,
    blur_prob=1.0,
    solarize_prob=1.0,
    per_view=({}, {"interpolation": "bilinear"}),
)
"""Applies every operation to each view."""


def assert_on_gpu(tensor: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    assert tensor is not None
    assert (tensor.device, tensor.dtype, tensor.shape) == (GPU, dtype, shape)


def small_encoder() -> Encoder:
    return encoder("resnet18", stem="imagenet")


def with_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: real(function, *arguments, **options)


# These functions run inside `fake_cuda`.


def open_training(folder: Path, *more: str) -> Trainer:
    options = ["--data.train=digits", "--data.image_size=16", "--model.encoder=resnet18", "--model.hidden=32"]
    options += ["--model.out=16", "--batch_size=8", "--optim.clip_grad=1.0", f"--output={folder}", *more]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("images.open_pair", "trainer.prepare_pair", "build.build", "build.projector"):
            full_name = f"fastsimclr.training.{name}"
            patch.setattr(full_name, with_real_tensors(resolve_name(full_name)))
        return Trainer(parse(options), WORLD)


def train(folder: Path, *more: str) -> None:
    training = open_training(folder, *more)
    with training.clock.running():
        batches = training.sync.batches(training.loader, training.progress, training.skipped, training.checkpoints)
        for batch in itertools.islice(batches, 2):
            lr = training.schedule.apply(training.optimizer, training.progress.step)
            measured = training.train_step(batch)
            training.progress.advance(batch)
            _, stages = training.clock.end_step()
            assert stages()["views"] > 0
    training.metrics.log(measured, stages, {"step": 2, "lr": lr})
    assert not training.metrics.last, "on a GPU, a record is completed one step later"
    for value in measured.values():
        assert_on_gpu(value)
    for parameter in training.model.parameters():
        assert parameter.device == GPU
        for state in training.optimizer.state[parameter].values():
            assert state.device == GPU or state.ndim == 0  # Adam counts steps on the CPU
    assert training.model.encoder.spec.stem == "small"
    assert len(training.optimizer.state) == len(list(training.model.parameters()))


def loss(backend: str, precision: str, reduction: str, temperature: str) -> None:
    z = [torch.randn(6, 16, device=GPU, requires_grad=True) for _ in range(2)]
    t: Any = 0.1
    if temperature != "float":
        t = torch.tensor(0.1, device=temperature).requires_grad_(temperature == "cuda")
    value = nt_xent(z[0], z[1], t, backend=backend, precision=precision, reduction=reduction)
    assert_on_gpu(value, *(() if reduction == "mean" else (12,)))
    value.sum().backward()
    for projections in z:
        assert_on_gpu(projections.grad, 6, 16)
    if temperature == "cuda":
        assert_on_gpu(t.grad)


def loss_operators(module: Any, name: str, precision: str, reduction: str, temperature: str) -> None:
    """Run the operators' own code, which FakeTensors otherwise replace by `register_fake`, and compare the outputs."""
    forward, backward = (getattr(module, f"{name}_{which}") for which in ("forward", "backward"))
    z1, z2 = (torch.randn(6, 16, device=GPU) for _ in range(2))
    mean = reduction == "mean"
    t = torch.tensor(0.1, device="cpu" if temperature == "cpu" else GPU)
    value = None if temperature == "cuda" else 0.1
    inputs = (z1, z2, t, "", mean, False, precision, value)
    outputs = assert_same_metadata(forward._init_fn(*inputs), forward(*inputs))
    dloss = torch.ones_like(outputs[0])
    if name == "tiled":
        backward_inputs = (dloss, *outputs[1:], t, "", precision, value)
    else:
        backward_inputs = (dloss, z1, z2, *outputs[1:], t, "", value)
    for gradient in assert_same_metadata(backward._init_fn(*backward_inputs), backward(*backward_inputs)):
        assert gradient.device == GPU


def other_losses(backend: str, precision: str, reduction: str, temperature: str) -> None:
    t: Any = 0.1 if temperature == "float" else torch.tensor(0.1, device=temperature)
    options: dict[str, Any] = {"backend": backend, "precision": precision, "reduction": reduction}
    labels, queue = torch.zeros(6, dtype=torch.int64, device=GPU), torch.randn(4, 16, device=GPU)
    for of, count in (
        (lambda a, b: info_nce(a, b, t, **options), 12),
        (lambda a, b: info_nce(a, b, t, symmetric=False, queue=queue, **options), 6),
        (lambda a, b: nt_xent(a, b, t, hardness=0.5, **options), 12),
        (lambda a, b: sup_con(a * b, labels, t, **options), 6),
    ):
        z = [torch.randn(6, 16, device=GPU, requires_grad=True) for _ in range(2)]
        value = of(*z)
        assert_on_gpu(value, *(() if reduction == "mean" else (count,)))
        value.sum().backward()
        for projections in z:
            assert_on_gpu(projections.grad, 6, 16)


def sums_operators(implementation: str, precision: str, _: str, temperature: str) -> None:
    """As `loss_operators`: the sums of a symmetric matrix, of two towers, and of a queue."""
    a, b = (torch.randn(6, 16, device=GPU) for _ in range(2))
    t = torch.tensor(0.1, device="cpu" if temperature == "cpu" else GPU)
    how = (implementation, precision, None if temperature == "cuda" else 0.1)
    for other, offset, columns in ((None, 0, False), (b, 0, True), (b[:4], -1, False)):
        sizes = ("", [6], offset, 0)
        inputs = (a, other, t, *sizes, columns, other is not None, *how)
        outputs = assert_same_metadata(log_sums_forward._init_fn(*inputs), log_sums_forward(*inputs))
        g, h = torch.ones_like(outputs[0]), torch.ones_like(outputs[1])
        backward_inputs = (g, h, a, other, *outputs, t, *sizes, other is not None, *how)
        results = log_sums_backward._init_fn(*backward_inputs), log_sums_backward(*backward_inputs)
        for gradient in assert_same_metadata(*results):
            assert gradient.device == GPU


def assert_same_metadata(outputs: tuple[Tensor, ...], fakes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for output, fake in zip(outputs, fakes, strict=True):
        assert (output.shape, output.dtype, output.device) == (fake.shape, fake.dtype, fake.device)
    return outputs


def loader(backend: str, dtype: torch.dtype) -> None:
    source = real(open_source, "digits")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__init__", "__getitem__"):  # these run in worker processes, which do not use the GPU
            patch.setattr(_Crops, name, with_real_tensors(getattr(_Crops, name)))
        batches = open_views(source, COLORFUL, 8, backend=backend, device=GPU, dtype=dtype, drop_last=True, workers=0)
        batch = next(iter(batches))
    for view in batch.views:
        assert_on_gpu(view, 8, 3, 16, 16, dtype=dtype)
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert_on_gpu(batch.index, 8, dtype=torch.int64)
    assert_on_gpu(batch.label, 8, dtype=torch.int64)


def features_and_labels(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 16, device=GPU), torch.zeros(rows, dtype=torch.int64, device=GPU)


def knn() -> None:
    labels = torch.zeros(40, dtype=torch.int64, device=GPU)
    bank, queries = (
        Shard.of(torch.arange(rows, device=GPU), torch.randn(rows, 16, device=GPU)) for rows in (len(labels), 12)
    )
    for temperature in (0.07, None):
        assert_on_gpu(knn_ranking(bank, labels, queries, 5, temperature=temperature), 12, 5, dtype=torch.int64)
    assert_on_gpu(knn_ranking(bank, labels, bank, 5, leave_one_out=True), 40, 5, dtype=torch.int64)
    source = real(open_source, "digits").subset(np.arange(16))
    model = real(small_encoder).to(GPU, memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen = choose_precision("auto", GPU)
    measure(model, source, None, COLORFUL, LOADER, 5, images=None, autocast=chosen.autocast)


def logistic_regression() -> None:
    features, labels = features_and_labels(40)
    fitted = linear.fit(features, labels, 10, c=1.0)
    assert_on_gpu(fitted.weight, 10, 16)
    assert_on_gpu(linear.rank(fitted, features), 40, 5, dtype=torch.int64)
    linear.choose_c(features, labels, 10, np.arange(30), np.arange(30, 40))


def classifier(frozen: bool) -> None:
    source = real(open_source, "digits").subset(np.arange(16))
    model = real(lambda: Classifier(small_encoder(), 10, frozen=frozen))
    chosen = choose_precision("auto", GPU)
    schedule = Schedule(epochs=1, lr=0.1, batch_size=8)
    train_classifier(model, source, COLORFUL, schedule, LOADER, chosen, title="")
    assert_on_gpu(model.fc.weight, 10, 512)


def case(function: Callable[..., None], *arguments: Any, capability: tuple[int, int] = HOPPER) -> Any:
    words = [getattr(argument, "__name__", str(argument)) for argument in arguments]
    name = ", ".join([function.__name__, *words, *(["Turing"] if capability == TURING else [])])
    return pytest.param(capability, function, arguments, id=name)


LOSSES = [  # precision, reduction, temperature
    ("highest", "mean", "float"),
    ("highest", "none", "cuda"),
    ("medium", "mean", "cuda"),
    ("medium", "none", "cpu"),
]
CASES = [
    case(train, "--optim.name=lars"),
    case(train, "--optim.name=adamw", "--micro_batch_size=3", capability=TURING),
    case(train, "--optim.name=muon"),
    *(case(loss, backend, *options) for backend in ("auto", "tiled", "reference") for options in LOSSES),
    *(case(loss_operators, module, name, *options) for module, name in ((fused, "fused"), (tiled, "tiled"))
      for options in LOSSES),
    *(case(other_losses, backend, *options) for backend in ("auto", "tiled", "reference") for options in LOSSES),
    *(case(sums_operators, name, *options) for name in ("fused", "tiled") for options in LOSSES),
    case(loader, "memory", torch.bfloat16),
    case(loader, "memory", torch.float16, capability=TURING),
    case(loader, "torchvision", torch.bfloat16),
    case(knn),
    case(logistic_regression),
    case(classifier, True),
    case(classifier, False, capability=TURING),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "function", "arguments"), CASES)
def test_host_code_keeps_tensors_on_the_gpu(
    tmp_path: Path, capability: tuple[int, int], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    slower_views = pytest.warns(UserWarning, match=r"^views: .*7\.5") if capability == TURING else nullcontext()
    with fake_cuda(capability), slower_views:
        function(*((tmp_path, *arguments) if function is train else arguments))


def test_old_gpu_uses_fp16_and_the_tiled_loss_with_one_warning_each(tmp_path: Path) -> None:
    z1, z2 = torch.randn(2, 6, 16)
    with fake_cuda(TURING), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        training = open_training(tmp_path)
        batch = next(iter(training.loader))
        training.train_step(batch)
        assert [str(each.message).split(":")[0] for each in caught] == ["views"], (
            "training logs the backend of the loss instead of a warning"
        )
        for _ in range(2):
            nt_xent(z1.to(GPU), z2.to(GPU))
    assert training.precision.why.startswith("fp16 autocast with scaled gradients (auto: this GPU has ")
    assert training.loss_backend.startswith("tiled (auto: a fake GPU has compute capability 7.5; ")
    _, loss_warning = caught
    assert training.loss_backend.removeprefix("tiled ") in str(loss_warning.message)


def test_micro_batches_are_halved_while_the_gpu_runs_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Step._project

    def project_up_to_3(self: Step, views: Sequence[Tensor]) -> list[Tensor]:
        if torch.is_grad_enabled() and len(views[0]) > 3:
            raise torch.OutOfMemoryError
        return project(self, views)

    monkeypatch.setattr(Step, "_project", project_up_to_3)
    with fake_cuda():
        assert open_training(tmp_path, "--micro_batch_size=auto").config.micro_batch_size == 2


def moved_to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        return [each.cpu() for each in result] if isinstance(result, list | tuple) else result.cpu()

    return faulty


@pytest.mark.filterwarnings("ignore:views")
@pytest.mark.parametrize(
    ("faulty", "capability", "function", "arguments"),
    [
        ("fastsimclr.training.step.Step._project", HOPPER, train, ()),
        ("fastsimclr.optim.lars.LARS._scratch_like", HOPPER, train, ()),
        ("fastsimclr.loss.tiled.log_sums", HOPPER, loss_operators, (tiled, "tiled", *LOSSES[0])),
        ("fastsimclr.loss.tiled.gradients", HOPPER, loss_operators, (tiled, "tiled", *LOSSES[0])),
        ("fastsimclr.loss.fused.Kernels.floats", HOPPER, loss_operators, (fused, "fused", *LOSSES[0])),
        ("fastsimclr.data.native.on_device", HOPPER, loader, ("memory", torch.bfloat16)),
        ("fastsimclr.data.photometric._luma", TURING, loader, ("memory", torch.float16)),
        ("fastsimclr.data.crop._weights", TURING, loader, ("memory", torch.float16)),
        ("fastsimclr.evaluation.features.F.normalize", HOPPER, knn, ()),
        ("fastsimclr.evaluation.linear._standardized", HOPPER, logistic_regression, ()),
    ],
)
def test_tensor_on_the_cpu_is_detected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faulty: str,
    capability: tuple[int, int],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    monkeypatch.setattr(faulty, moved_to_cpu(resolve_name(faulty)))
    with fake_cuda(capability), pytest.raises((RuntimeError, ValueError), match="cpu"):
        function(*((tmp_path, *arguments) if function is train else arguments))
