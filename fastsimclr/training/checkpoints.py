"""The checkpoint of a run: which one a run resumes from, what it holds, and how it is restored."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from fastsimclr.checkpoint_format import FORMAT, Checkpoint
from fastsimclr.config import Config, to_yaml
from fastsimclr.data import ViewLoader
from fastsimclr.distributed import World, broadcast_object, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import print_line
from fastsimclr.run_folder import RunFolder
from fastsimclr.sharding import is_sharded, map_tensors, sharded_like, whole
from fastsimclr.training.build import architecture, check_optimizer, check_weights
from fastsimclr.training.callbacks import Callbacks, TrainerInterface
from fastsimclr.training.checkpoint_writer import CheckpointWriter, copy_to_cpu
from fastsimclr.training.images import with_absolute_paths
from fastsimclr.training.metrics import Metrics
from fastsimclr.training.non_finite import NonFiniteSteps
from fastsimclr.training.probe import OnlineProbe
from fastsimclr.training.skipped import SkippedImages


class ResumableTrainer(TrainerInterface, Protocol):
    """The parts of `Trainer` that a checkpoint stores and restores."""

    options: dict[str, Any]
    optimizer: Optimizer
    scaler: GradScaler
    loader: ViewLoader
    skipped: SkippedImages
    non_finite: NonFiniteSteps
    metrics: Metrics
    probe: OnlineProbe | None
    callbacks: Callbacks
    checkpoints: CheckpointWriter
    unfinished_epoch: dict[str, Any] | None


def checkpoint_to_resume(config: Config, folder: RunFolder, world: World) -> Checkpoint | None:
    """Open the checkpoint that --resume selects, on all ranks; None to start with the first step.

    Where a newer checkpoint of the run is not good, rank zero prints a warning. Raises UserError on all ranks if none
    is good, if the file of --resume is not, or if a rank cannot read it.
    """
    selected = run_on_all_ranks(lambda: _select(config, folder) if world.is_rank_zero else None, world)
    path = broadcast_object(selected.path if selected else None, world)
    if path is None:
        return None
    return run_on_all_ranks(lambda: selected or Checkpoint.open(path), world)


def _select(config: Config, folder: RunFolder) -> Checkpoint | None:
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return Checkpoint.open(Path(config.resume))
    try:
        checkpoint, problems = folder.newest_checkpoint()
    except UserError as error:
        raise UserError(f"{error}; to start again, use another --output or --resume never") from error
    if checkpoint is not None:
        for problem in problems:
            print_line(f"warning: {problem}; using {checkpoint.path} instead")
    return checkpoint


def learned_state(trainer: ResumableTrainer) -> dict[str, Any]:
    """Return copies of the states of the model and the optimizer on the CPU, on rank zero. All ranks call it."""
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    is_rank_zero = trainer.world.is_rank_zero

    def copy(tensor: Tensor) -> Any:
        if is_sharded(tensor):
            gathered = whole(tensor)  # one after the other, as the device may not have room for all
            return gathered.cpu() if is_rank_zero else None
        return copy_to_cpu(tensor) if is_rank_zero else None

    return map_tensors(copy, state)  # type: ignore[no-any-return]


def state_of(trainer: ResumableTrainer, learned: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU: the keys of `fastsimclr.checkpoint_format.CONTENTS`.

    learned: from `learned_state`.
    """
    others = {
        "format": FORMAT,
        "step": trainer.progress.step,
        "batch_size": trainer.config.batch_size,
        "architecture": architecture(trainer.config, trainer.model),
        "grad_scaler": trainer.scaler.state_dict(),
        "data": trainer.progress.position,
        "skipped_images": trainer.skipped.state_dict(),
        "skipped_steps": trainer.non_finite.state_dict(),
        "callbacks": trainer.callbacks.state_dict(),
        "probe": trainer.probe.state_dict() if trainer.probe is not None else {},
        "untrained_knn": trainer.untrained_knn,
        "unfinished_epoch": trainer.unfinished_epoch,
        "config": to_yaml(with_absolute_paths(trainer.config)),
        "options": trainer.options,
    }
    return learned | copy_to_cpu(others)  # type: ignore[no-any-return]


def resume(trainer: ResumableTrainer, checkpoint: Checkpoint) -> None:
    """Restore the state of the trainer from a checkpoint. Raises UserError if it is not one of this run."""
    file, state = checkpoint
    # The model copies its tensors. Others would keep the file mapped, and so on the disk when it is deleted.
    optimizer, callbacks, probe = copy_to_cpu((state["optimizer"], state["callbacks"], state["probe"]))
    config, model = trainer.config, trainer.model
    check_weights(file, state["model"], model)
    check_optimizer(file, optimizer, trainer.optimizer)
    own = model.state_dict()
    model.load_state_dict({name: sharded_like(tensor, own[name]) for name, tensor in state["model"].items()})
    of_options = [
        {name: value for name, value in group.items() if name != "params"} for group in trainer.optimizer.param_groups
    ]
    for group, own in zip(optimizer["param_groups"], trainer.optimizer.param_groups, strict=True):
        if "fused" in group:  # a choice of this machine, not of the run
            group["fused"] = own["fused"]
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    for index, of_parameter in optimizer["state"].items():
        for name, value in of_parameter.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                of_parameter[name] = _state_like(value, parameters[index])
    trainer.optimizer.load_state_dict(optimizer)
    for group, options in zip(trainer.optimizer.param_groups, of_options, strict=True):
        group.update(options)  # the checkpoint's may be other ones: --resume_changed
    if state["grad_scaler"]:  # empty if the checkpoint's precision needs no scale; this run's then starts new
        trainer.scaler.load_state_dict(state["grad_scaler"])
    if trainer.probe is not None and probe:
        trainer.probe.load_state_dict(probe)
    position = state["data"] | {"seed": config.seed}
    trainer.loader.load_state_dict(position)
    trainer.progress.step, trainer.progress.position = state["step"], position
    trainer.checkpoints.resumed_from(file, trainer.progress.step)
    trainer.skipped.load_state_dict(state["skipped_images"])
    trainer.non_finite.load_state_dict(state["skipped_steps"])
    trainer.untrained_knn = state["untrained_knn"]
    trainer.unfinished_epoch = state["unfinished_epoch"]
    trainer.metrics.last = trainer.unfinished_epoch or {}
    try:
        trainer.callbacks.load_state_dict(callbacks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: got a state that a callback cannot load ({error!r}), expected one of its state_dict(): use the "
            "callbacks of that run, or --resume never"
        ) from error
    if trainer.world.is_rank_zero:
        print(f"resumed from {file} at step {trainer.progress.step}", flush=True)


def _state_like(state: Tensor, parameter: Tensor) -> Tensor:
    """Return an optimizer's state of a parameter, sharded as that is, or with its strides.

    Fused optimizers take the strides for equal, but a run with sharded weights has saved others.
    """
    if is_sharded(parameter):
        return sharded_like(state, parameter)
    return torch.empty_like(parameter, dtype=state.dtype, device=state.device).copy_(state)
