"""Pre-train from Python: the same run that the command line starts."""

import atexit
import signal
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastsimclr import distributed, stopping
from fastsimclr.config import Config, DataConfig, from_options
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.opening import describe
from fastsimclr.errors import UserError
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.metrics_file import read_records
from fastsimclr.pretrained import load_encoder
from fastsimclr.progress_bar import Phase
from fastsimclr.ranges import parse_duration
from fastsimclr.run_folder import RunFolder
from fastsimclr.stopping import Stopped, stop_signals
from fastsimclr.training.callbacks import Callback
from fastsimclr.training.options_check import check_ranks
from fastsimclr.training.run_lock import open_run
from fastsimclr.training.stall import Watchdog
from fastsimclr.training.trainer import Trainer


class Run:
    """A pre-training run and its results, read from its folder."""

    def __init__(self, folder: str | Path, encoder: nn.Module | None = None) -> None:
        """encoder: the module that was trained, if it is a user's own."""
        self.folder = Path(folder)
        self._module = encoder

    @cached_property
    def encoder(self) -> nn.Module:
        """The trained encoder, as `load_encoder` returns it: in eval mode, in float32, on the CPU."""
        return load_encoder(self.folder, encoder=self._module)

    @cached_property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """The numbers of metrics.jsonl by name, one array each, in the order of the steps.

        "step", "epoch", "loss", "lr" and the other figures of a step have one value per step: (steps,). "knn_accuracy"
        and "knn_step", the number of steps before it was measured, have one value per measurement; so do
        "probe_accuracy" and "probe_step", and the figures of `--health`, such as "contrastive_accuracy", and
        "health_step".
        """
        columns: dict[str, list[float]] = {}
        for record in read_records(RunFolder(self.folder).metrics):
            if "loss" not in record:  # an event between steps
                accuracies = {f"{of}_accuracy": f"{of}_step" for of in ("knn", "probe")}
                measured = {name: record[name] for name in accuracies if name in record}
                record = measured | {accuracies[name]: record["step"] for name in measured}
            elif "contrastive_accuracy" in record:
                record["health_step"] = record["step"]
            for name, value in record.items():
                if isinstance(value, int | float):
                    columns.setdefault(name, []).append(value)
        return {name: np.array(values, np.float64) for name, values in columns.items()}

    @property
    def knn_accuracy(self) -> float | None:
        """The latest kNN accuracy, a fraction; None if it was not measured."""
        measured = self.metrics.get("knn_accuracy")
        return None if measured is None else float(measured[-1])

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


def pretrain(
    data: Any,
    encoder: str | nn.Module = "resnet50",
    *,
    augmentation: Augmentation | None = None,
    val: Any = None,
    output: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Pre-train an encoder with SimCLR, and return the run. The same as `fastsimclr train`, with the same files.

    data: the images: what --data.train takes (a folder, tar shards, "cifar10", …), or an object that
        `fastsimclr.open_views` takes: a torch Dataset, an array (N, H, W, C), a Hugging Face dataset, a list of files.
    encoder: a name that `fastsimclr.encoder` takes, or a module that maps images (N, C, H, W) to (N, F) or
        (N, F, h, w). A module is trained in place.
    augmentation: recipe of the views; None uses the default recipe, that of the paper for ImageNet, without hue,
        saturation and grayscale if the images are not RGB.
    val: labeled images to measure kNN accuracy on, in the same forms as `data`; or the fraction of each class of the
        training images to hold out for it.
    output: folder of the run. The same call with the same folder resumes an interrupted run. None creates a new folder
        runs/DATA-ENCODER-TIME.
    callbacks: called during the run, in order; see `fastsimclr.training.callbacks`.
    options: options of `fastsimclr train` by name, those of its data section, too: batch_size=256, epochs=100,
        image_size=96, workers=4. The other sections are dicts: optim={"name": "sgd"}, loss={"temperature": 0.2}.

    Under torchrun every rank makes the same call. A stop signal saves a checkpoint. Then SIGINT raises
    KeyboardInterrupt, and SIGTERM, SIGUSR1, SIGHUP and the time limit raise SystemExit. A second SIGINT raises
    KeyboardInterrupt at once.
    Raises UserError, a ValueError, for invalid options and unusable data.
    """
    module = None if isinstance(encoder, str) else encoder
    config = _configure(data, encoder, augmentation, val, output, options)
    command = ["fastsimclr.pretrain"]
    # Not at the end of the run: torchrun's store still has the addresses of this process group, so a second one fails.
    atexit.register(distributed.stop)
    rgb_optional = augmentation is None and not options.keys() & {"hue", "saturation", "grayscale_prob"}
    with stop_signals() as stop:
        try:
            trainer = stop.run(
                lambda: train(
                    config,
                    command,
                    train=_object(data),
                    val=_object(val),
                    encoder=module,
                    callbacks=callbacks,
                    rgb_optional=rgb_optional,
                )
            )
        except Stopped:
            raise _interruption(stop.received, stop.success_code) from None
    if trainer.sync.stop_signal:
        raise _interruption(trainer.sync.stop_signal, stop.success_code)
    return Run(trainer.folder.path, module)


def train(config: Config, command: Sequence[str], **objects: Any) -> Trainer:
    """Run a Trainer to its last step, or until it is stopped, and return it.

    command: the command line, for the record. objects: arguments of Trainer.
    Raises Stopped if a stop signal is received before the training.
    """
    if config.time_limit is not None:
        stopping.active().set_time_limit(parse_duration(config.time_limit, "time_limit"))
    world = distributed.start(config.device)
    check_ranks(asdict(config), world)
    if world.device.type == "cpu":
        keep_freed_memory()
    with open_run(config, world) as folder, Watchdog(world, folder, config.stall_timeout) as watchdog:
        with Phase("starting", visible=world.is_rank_zero):
            trainer = Trainer(config, world, folder=folder, command=command, watchdog=watchdog, **objects)
        trainer.train()
        distributed.barrier(world)  # until rank 0 has written the last checkpoint
        return trainer


def _interruption(stop_signal: int, exit_code: int) -> BaseException:
    """Return what a stop signal raises in the user's program."""
    return KeyboardInterrupt() if stop_signal == signal.SIGINT else SystemExit(exit_code)


def _configure(
    data: Any,
    encoder: str | nn.Module,
    augmentation: Augmentation | None,
    val: Any,
    output: str | Path | None,
    options: dict[str, Any],
) -> Config:
    recipe = {f.name for f in fields(Augmentation)}
    of_data = {f.name for f in fields(DataConfig)} - {"train", "val"}
    section = {name: value for name, value in options.items() if name in of_data}
    if augmentation is not None:
        twice = sorted(recipe & set(section))
        if twice:
            raise UserError(f"{twice[0]}: got it in `augmentation` and as an option, expected one of them")
        section |= {name: getattr(augmentation, name) for name in recipe}
    sections = {name: value for name, value in options.items() if name not in of_data}
    is_option = val is None or isinstance(val, float)
    sections["data"] = section | {"train": describe(data), "val": val if is_option else describe(val)}
    model = sections.get("model", {})
    if "encoder" in model:
        raise UserError("model: got an encoder in it, expected it as the argument `encoder`")
    sections["model"] = model | {"encoder": encoder if isinstance(encoder, str) else describe(encoder)}
    if output is not None:
        sections["output"] = str(output)
    return from_options(sections)


def _object(data: Any) -> Any:
    """Return `data` unless the configuration names it."""
    return None if isinstance(data, float | str | Path) else data
