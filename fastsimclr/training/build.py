"""Build the model, the loss and the optimizer of a run from its options."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from fastsimclr.config import Config, ModelConfig
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.distributed import World, neighbors, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.imports import is_object_reference
from fastsimclr.loss import BackendError, NTXentLoss, choose_backend
from fastsimclr.models import (
    Backbone,
    Encoder,
    EncoderSpec,
    SimCLR,
    as_encoder,
    build,
    checkpoint_stages,
    count_features,
    import_module,
    projector,
    synchronize_batch_norm,
    unused_parameters,
)
from fastsimclr.optim import Muon, Recipe, build_optimizer, choose_optimizer, choose_recipe, excluded_from_decay
from fastsimclr.precision import Precision, choose_precision
from fastsimclr.pretrained import initialize
from fastsimclr.sharding import shard, template_of
from fastsimclr.training.freeze import Freezing

_MOMENTUM, _MOMENTS = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}


@dataclass(frozen=True)
class Learner:
    """A model on its device, with its loss and optimizer."""

    augmentation: Augmentation
    model: nn.Module
    """A SimCLR module; with several ranks its batch norm may be synchronized, and its weights sharded."""
    template: nn.Module | None
    """For `assemble`, if the weights are sharded: the encoder without weights."""
    weights: list[str]
    """Lines that describe the pretrained weights."""
    freezing: Freezing
    optimizer: Optimizer
    recipe: Recipe
    loss: NTXentLoss
    loss_backend: str
    """Backend of the loss, and the reason for choosing it."""
    precision: Precision
    scaler: GradScaler


class _Built(NamedTuple):
    """The parts of a learner that a rank builds alone."""

    augmentation: Augmentation
    model: nn.Module
    weights: list[str]
    loss: NTXentLoss
    loss_backend: str
    precision: Precision


def build_learner(
    config: Config,
    world: World,
    *,
    channels: int = 3,
    module: nn.Module | None = None,
    weights: str | None = None,
) -> Learner:
    """Build the learner. All ranks call it.

    channels: channels of the images. module: the encoder, instead of the one that config.model names.
    weights: pretrained weights to start the encoder from.
    Raises UserError on all ranks for options that contradict each other or do not fit the machine of one.
    """
    built = run_on_all_ranks(lambda: _build_alone(config, world, channels, module, weights), world)
    model, template = built.model, None
    if world.world_size > 1:
        template = template_of(model.get_submodule("encoder")) if config.distributed == "fsdp" else None
        if config.model.sync_bn:
            model = synchronize_batch_norm(model, world.device, neighbors(config.model.bn_group, world))
        if template is not None:
            shard(model)
    return run_on_all_ranks(lambda: _with_optimizer(config, built._replace(model=model), template), world)


def _with_optimizer(config: Config, built: _Built, template: nn.Module | None) -> Learner:
    model, optim = built.model, config.optim
    encoder: Any = model.encoder
    freezing = Freezing(model, config.model.freeze or "", config.model.freeze_epochs, frozen_bn=config.model.frozen_bn)
    recipe = choose_recipe(encoder, optim.name, optim.lr, optim.lr_rule, optim.weight_decay, config.batch_size)
    exclude = excluded_from_decay(model).__contains__
    optimizer = build_optimizer(
        recipe.optimizer, model.parameters(), recipe.lr, optim.momentum, recipe.weight_decay, exclude=exclude
    )
    scaler = built.precision.grad_scaler(next(model.parameters()).device)
    return Learner(
        **built._asdict(), template=template, freezing=freezing, optimizer=optimizer, recipe=recipe, scaler=scaler
    )


def _build_alone(config: Config, world: World, channels: int, module: nn.Module | None, weights: str | None) -> _Built:
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
        hardness=config.loss.hardness,
    )

    torch.manual_seed(config.seed)
    chosen = _build_encoder(config.model, augmentation, channels, module)
    if world.world_size > 1:
        _check_parameters(chosen, config.distributed)
    if config.model.checkpoint_stages:
        checkpoint_stages(chosen)
    loaded = initialize(chosen, weights) if weights is not None else []
    head = projector(chosen.out_features, config.model.hidden, config.model.out, config.model.layers)
    model = SimCLR(chosen, head)
    model.to(world.device, precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _Built(augmentation, model, loaded, loss, f"{backend} ({why})", precision)


def _build_encoder(
    config: ModelConfig, augmentation: Augmentation, channels: int, module: nn.Module | None
) -> Encoder | Backbone:
    """Build the encoder, or check the user's module. All views must have a size that it supports."""
    size = augmentation.image_size
    if module is None and is_object_reference(config.encoder):
        module = import_module(config.encoder)
    if module is not None:
        chosen = as_encoder(module, image_size=size, channels=channels)
    else:
        chosen = build(EncoderSpec(config.encoder, config.width, config.stem, size, channels))
    for other in {recipe.image_size for recipe in augmentation.recipes} - {size}:
        count_features(chosen, other, channels)
    return chosen


def _check_parameters(encoder: Encoder | Backbone, distributed: str) -> None:
    """Raise UserError if several ranks cannot train a parameter. The stages are not checkpointed yet.

    DistributedDataParallel would wait for one without a gradient, and fully_shard cannot divide one without dimensions.
    """
    scalars = [name for name, parameter in encoder.named_parameters() if parameter.ndim == 0]
    if distributed == "fsdp" and scalars:
        raise UserError(
            f"encoder: got {encoder.spec.name} with parameters without dimensions ({', '.join(scalars[:3])}); expected "
            "none with --distributed fsdp: give them the shape (1,), or use ddp"
        )
    if names := unused_parameters(encoder):
        raise UserError(
            f"encoder: got {encoder.spec.name} with {len(names)} parameters that its output does not depend on "
            f"({', '.join(names[:3])}); expected none with several ranks: give them requires_grad=False"
        )


def architecture(config: Config, model: nn.Module) -> dict[str, Any]:
    """The options that must be the same when a run resumes from a checkpoint."""
    encoder: Any = model.encoder
    built: dict[str, Any] = {
        "encoder": asdict(encoder.spec),
        "hidden": config.model.hidden,
        "out": config.model.out,
        "layers": config.model.layers,
        "optimizer": choose_optimizer(config.optim.name, encoder)[0],
    }
    if isinstance(encoder, Backbone) and encoder.fixed_size:
        built["image_size"] = encoder.spec.image_size
    return built


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


def check_weights(file: Path, saved: dict[str, Tensor], model: nn.Module) -> None:
    """Raise UserError, naming the first differences, unless the weights have the names and shapes of the model's."""
    got, expected = ({name: _form(tensor) for name, tensor in state.items()} for state in (saved, model.state_dict()))
    differences = [
        f"{name} {got.get(name, 'missing')} instead of {expected.get(name, 'none')}"
        for name in got | expected
        if got.get(name) != expected.get(name)
    ]
    if differences:
        raise UserError(
            f"{file}: got weights of another encoder ({len(differences)} differ: {', '.join(differences[:3])}); "
            "expected those of this run's: pass the same module, or use another --output or --resume never"
        )


def check_optimizer(file: Path, saved: dict[str, Any], optimizer: Optimizer) -> None:
    """Raise UserError, naming a difference, unless the state is one of this optimizer and its parameters."""
    groups, expected = saved["param_groups"], optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [group["params"] for group in expected]
    problem = None
    if [group["params"] for group in groups] != indices:
        problem = f"{[len(group['params']) for group in groups]} parameters instead of {[*map(len, indices)]}"
    elif any(got.keys() != group.keys() for got, group in zip(groups, expected, strict=True)):
        problem = f"the options {', '.join(groups[0])} instead of {', '.join(expected[0])}"
    names = [_state_names(optimizer, group) for group in optimizer.param_groups for _ in group["params"]]
    for index, state in saved["state"].items():
        if not 0 <= index < len(parameters):
            problem = problem or f"a state of parameter {index} of {len(parameters)}"
        elif state and state.keys() != names[index]:
            wanted = ", ".join(names[index])
            problem = problem or f"{', '.join(map(str, state))} of parameter {index} instead of {wanted}"
        elif any(isinstance(x, Tensor) and x.shape not in (parameters[index].shape, ()) for x in state.values()):
            problem = problem or f"a state of another shape than parameter {index}, {tuple(parameters[index].shape)}"
    if problem is not None:
        raise UserError(
            f"{file}: got the state of another optimizer ({problem}); expected that of this run: use the same "
            "--optim options, or another --output or --resume never"
        )


def _state_names(optimizer: Optimizer, group: dict[str, Any]) -> set[str]:
    """Return the names of what an optimizer keeps of each parameter of a group after a step."""
    if isinstance(optimizer, torch.optim.AdamW):
        return _MOMENTS
    return _MOMENTS if isinstance(optimizer, Muon) and not group["matrices"] else _MOMENTUM


def _form(tensor: Tensor) -> str:
    """Return the shape of a tensor, and whether it holds integers."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' of integers'}"


def _options(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the options by name. The image size is one if weights depend on it; else it may change in a run."""
    built = architecture["encoder"]
    rest = {name: value for name, value in architecture.items() if name != "encoder"}
    return {"encoder": built["name"], **{name: built[name] for name in ("width", "stem", "channels")}, **rest}
