"""The checkpoint of a run: what it holds, how it is written, and how a run resumes from it."""

from pathlib import Path
from typing import Any, Protocol

from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from fastsimclr.config import Config, to_yaml
from fastsimclr.data import ViewLoader
from fastsimclr.errors import UserError
from fastsimclr.run_folder import RunFolder, load_checkpoint
from fastsimclr.training.build import architecture, check_architecture, check_weights
from fastsimclr.training.callbacks import Callbacks, TrainerInterface
from fastsimclr.training.images import with_absolute_paths
from fastsimclr.training.metrics import Metrics
from fastsimclr.training.skipped import SkippedImages


class ResumableTrainer(TrainerInterface, Protocol):
    """The parts of `Trainer` that a checkpoint stores and restores."""

    optimizer: Optimizer
    scaler: GradScaler
    loader: ViewLoader
    skipped: SkippedImages
    metrics: Metrics
    callbacks: Callbacks
    unfinished_epoch: dict[str, Any] | None


def file_to_resume(config: Config, folder: RunFolder) -> Path | None:
    """Return the checkpoint that --resume selects; None to start with the first step."""
    file = folder.checkpoint if config.resume == "auto" else Path(config.resume)
    return None if config.resume == "never" or (config.resume == "auto" and not file.exists()) else file


def write_checkpoint(trainer: ResumableTrainer) -> None:
    """Replace the checkpoint of the run. All ranks call it; rank zero writes."""
    trainer.metrics.sync()
    if trainer.world.is_rank_zero:
        trainer.folder.save(
            {
                "step": trainer.progress.step,
                "batch_size": trainer.config.batch_size,
                "architecture": architecture(trainer.config, trainer.model),
                "model": trainer.model.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "grad_scaler": trainer.scaler.state_dict(),
                "data": trainer.progress.position,
                "skipped_images": trainer.skipped.state_dict(),
                "callbacks": trainer.callbacks.state_dict(),
                "untrained_knn": trainer.untrained_knn,
                "unfinished_epoch": trainer.unfinished_epoch,
                "config": to_yaml(with_absolute_paths(trainer.config)),
            }
        )


def resume(trainer: ResumableTrainer, file: Path) -> None:
    """Restore the state of the trainer from a checkpoint. Raises UserError if it is not one of this run."""
    state = load_checkpoint(file)
    config, model = trainer.config, trainer.model
    check_architecture(file, state["architecture"], architecture(config, model))
    if state["batch_size"] != config.batch_size:
        raise UserError(
            f"--batch_size: got {config.batch_size}, but {file} is from a run with {state['batch_size']}; "
            "expected the same, because the schedule counts steps: use that, or --resume never"
        )
    check_weights(file, state["model"], model)
    model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state.get("grad_scaler"):  # empty if the checkpoint's precision needs no scale; this run's then starts new
        trainer.scaler.load_state_dict(state["grad_scaler"])
    trainer.loader.load_state_dict(state["data"])
    trainer.progress.step, trainer.progress.position = state["step"], state["data"]
    trainer.skipped.load_state_dict(state["skipped_images"])
    trainer.untrained_knn = state["untrained_knn"]
    trainer.unfinished_epoch = state["unfinished_epoch"]
    trainer.metrics.last = trainer.unfinished_epoch or {}
    trainer.callbacks.load_state_dict(state.get("callbacks", []))
    if trainer.world.is_rank_zero:
        print(f"resumed from {file} at step {trainer.progress.step}", flush=True)
