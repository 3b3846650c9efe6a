"""Measure the encoder in the middle of a run: kNN accuracy, and that of the online probe."""

from typing import Protocol

from fastsimclr.data import ViewLoader
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import Pair
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.evaluation.knn import measure
from fastsimclr.precision import Precision
from fastsimclr.progress_bar import Phase
from fastsimclr.stopping import Stopped
from fastsimclr.training.callbacks import TrainerInterface
from fastsimclr.training.metrics import Metrics
from fastsimclr.training.probe import OnlineProbe
from fastsimclr.training.rank_sync import RankSync


class ValidatedTrainer(TrainerInterface, Protocol):
    """The parts of `Trainer` that a measurement needs."""

    augmentation: Augmentation
    data: Pair
    loader: ViewLoader
    loader_config: LoaderConfig
    metrics: Metrics
    precision: Precision
    probe: OnlineProbe | None
    sync: RankSync


def measure_accuracy(trainer: ValidatedTrainer) -> dict[str, float] | None:
    """Measure and log accuracies, fractions: "knn_accuracy", on the validation images, or leave-one-out on the training
    images, and "probe_accuracy", on the validation images, after the first step.

    Returns None if a stop signal interrupted it.
    """
    data, probe, progress = trainer.data, trainer.probe, trainer.progress
    data.train.bad = dict(trainer.loader.bad)  # these are not read again
    try:
        with Phase("measuring kNN accuracy", visible=False):
            measured = measure(
                trainer.encoder(),  # type: ignore[arg-type]
                data.train,
                data.val,
                trainer.augmentation,
                trainer.loader_config,
                trainer.config.knn_k,
                images=trainer.config.knn_images,
                autocast=trainer.precision.autocast,
                classify=probe.classify if probe is not None and progress.step > 0 else None,
                sync=trainer.sync.poll,
            )
    except Stopped:
        return None
    accuracies = {"knn_accuracy": measured.knn}
    if measured.classifier is not None:
        accuracies["probe_accuracy"] = measured.classifier
    trainer.metrics.event({"step": progress.step, "epoch": progress.epoch} | accuracies)
    return accuracies
