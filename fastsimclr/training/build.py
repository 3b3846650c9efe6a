"""Build the model, the loss and the optimizer of a run from its options."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from fastsimclr.config import Config
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.distributed import World
from fastsimclr.errors import UserError
from fastsimclr.loss import BackendError, NTXentLoss, choose_backend
from fastsimclr.models import SimCLR, as_encoder, encoder, projector, synchronize_batch_norm
from fastsimclr.optim import build_optimizer, resolve_lr
from fastsimclr.precision import Precision, choose_precision


@dataclass(frozen=True)
class Learner:
    """A model on its device, with its loss and optimizer."""

    augmentation: Augmentation
    model: nn.Module
    """A SimCLR module; with several ranks its batch norm may be synchronized."""
    optimizer: Optimizer
    peak_lr: float
    loss: NTXentLoss
    loss_backend: str
    """Backend of the loss, and the reason for choosing it."""
    precision: Precision
    scaler: GradScaler


def build_learner(config: Config, world: World, *, channels: int = 3, module: nn.Module | None = None) -> Learner:
    """Build the learner. Raises UserError for options that contradict each other or do not fit this machine.

    channels: channels of the images. module: the encoder, instead of the one that config.model names.
    """
    augmentation = config.data.augmentation()
    if augmentation.num_views < 2:
        raise UserError(f"--data.num_views: got {augmentation.num_views}, expected at least 2: the loss compares views")
    precision = choose_precision(config.precision, world.device)
    try:
        backend, why = choose_backend(config.loss.backend, world.device, precision.dtype, config.model.out)
    except BackendError as error:
        raise UserError(f"--loss.backend: {error}") from error
    loss = NTXentLoss(
        config.loss.temperature,
        group="world" if config.loss.global_negatives else None,
        backend=backend,  # not "auto": every rank would warn about a slower backend
        precision=config.loss.precision,
        decoupled=config.loss.decoupled,
    )

    torch.manual_seed(config.seed)
    size = augmentation.image_size
    chosen: Any
    if module is not None:
        chosen = as_encoder(module, image_size=size, channels=channels)
    else:
        name, width, stem = config.model.encoder, config.model.width, config.model.stem
        chosen = encoder(name, width, stem, image_size=size, channels=channels)
    head = projector(chosen.out_features, config.model.hidden, config.model.out, config.model.layers)
    model: nn.Module = SimCLR(chosen, head)
    model.to(world.device, precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if world.world_size > 1 and config.model.sync_bn:
        model = synchronize_batch_norm(model, world.device)

    optim = config.optim
    peak_lr = resolve_lr(optim.lr_rule, config.batch_size, optim.name) if optim.lr == "auto" else optim.lr
    optimizer = build_optimizer(optim.name, model.parameters(), peak_lr, optim.momentum, optim.weight_decay)
    scaler = precision.grad_scaler(world.device)
    return Learner(augmentation, model, optimizer, peak_lr, loss, f"{backend} ({why})", precision, scaler)


def architecture(config: Config, model: nn.Module) -> dict[str, Any]:
    """The options that must be the same when a run resumes from a checkpoint."""
    return {
        "encoder": asdict(model.encoder.spec),  # type: ignore[union-attr,arg-type]
        "hidden": config.model.hidden,
        "out": config.model.out,
        "layers": config.model.layers,
        "optimizer": config.optim.name,
    }


def check_architecture(file: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError, naming the differences, unless the checkpoint has the architecture of this run."""
    got = _options(saved)
    differences = [
        f"{name} {got.get(name)!r} instead of {value!r}"
        for name, value in _options(expected).items()
        if got.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{file}: got a checkpoint of another architecture ({', '.join(differences)}); expected that of "
            "this run: change the --model options, or use another --output or --resume never"
        )


def _options(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the options by name. The image size may change in a run, unless weights depend on it."""
    built = architecture["encoder"]
    rest = {name: value for name, value in architecture.items() if name != "encoder"}
    return {"encoder": built["name"], **{name: built[name] for name in ("width", "stem", "channels")}, **rest}
