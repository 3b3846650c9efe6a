"""The options of each protocol, one documented field each, whose defaults are the paper's; and what embed offers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from fastsimclr.config import DataConfig
from fastsimclr.errors import UserError


@dataclass(frozen=True)
class EvaluationConfig(ABC):
    """What every protocol has."""

    checkpoint: str | None = None
    """A run's folder or checkpoint, an export, or another project's checkpoint. It says the options of --data that are
    not given: the images that it was trained on, and the views' size and normalisation."""
    encoder: str | None = None
    """Architecture that is expected of the checkpoint (resnet50); null takes it as it is."""
    data: DataConfig = field(default_factory=DataConfig)
    """Labelled images; of the recipe of views, only crops and flips are used here."""
    batch_size: int = 256
    """Images a step, over all ranks."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Of the encoder: bf16 or fp16 autocast, float32 or float64. auto: bf16 where the hardware has it, else fp16 on a
    GPU with tensor cores (V100, T4), else float32."""
    device: str = "auto"
    """cuda, cpu or auto; under torchrun each rank takes its own GPU."""
    seed: int = 0
    """Of the subset of labels, new weights, the order of images, crops and flips."""
    output: str | None = None
    """Folder of the results; null: evaluate/ in the run's folder."""
    force: bool = False
    """Overwrite the results that are there."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "k", "epochs"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"--{name}: got {value}, expected at least 1")
        for name in ("lr", "c", "temperature"):
            value = getattr(self, name, None)
            if isinstance(value, float | int) and not value > 0:
                raise UserError(f"--{name}: got {value}, expected a number above 0")

    @abstractmethod
    def name(self) -> str:
        """Of the files of the results."""


@dataclass(frozen=True)
class KnnConfig(EvaluationConfig):
    """The k nearest neighbours of each image among the training images vote for its class. Nothing is trained.

    Without --data.val each training image is classified by all the others.
    """

    k: int = 200
    """Neighbours that vote."""
    temperature: float | None = 0.07
    """A vote is worth exp(cosine / temperature); null: one each, plain k nearest neighbours."""

    def name(self) -> str:
        return "knn"


@dataclass(frozen=True)
class _WithLabels(EvaluationConfig):
    labels: float | str = 1.0
    """How many labels of --data.train are used: a fraction (0.01; as many of each class, chosen by seed), or a file
    that lists the images, such as the public 1 % and 10 % lists of ImageNet."""

    def _suffix(self) -> str:
        return "" if self.labels == 1 else "-labels" if isinstance(self.labels, str) else f"-{self.labels:g}"


@dataclass(frozen=True)
class LinearConfig(_WithLabels):
    """A linear classifier on the frozen encoder's representations (arXiv 2002.05709, appendix B.6)."""

    solver: Literal["sgd", "lbfgs"] = "sgd"
    """sgd: the paper's protocol, with crops and flips; lbfgs: exact logistic regression on representations that are
    computed once."""
    epochs: int = 90
    """sgd: passes over the data."""
    lr: float | Literal["auto"] = "auto"
    """sgd: peak learning rate; auto: 0.1 batch_size / 256."""
    weight_decay: float = 0.0
    """sgd: weight decay."""
    c: float | Literal["auto"] = "auto"
    """lbfgs: inverse strength of the regularisation, as scikit-learn's C; auto takes the best of 1e-6 to 100 on a
    fifth of the training images that is held out, and then fits all of them."""

    def name(self) -> str:
        return "linear" + ("-lbfgs" if self.solver == "lbfgs" else "") + self._suffix()


@dataclass(frozen=True)
class FinetuneConfig(_WithLabels):
    """The whole encoder trained on with labels (arXiv 2002.05709, appendix B.5)."""

    epochs: int | Literal["auto"] = "auto"
    """Passes over the data; auto: 60 with at most 2 % of the labels, else 30."""
    lr: float | Literal["auto"] = "auto"
    """Peak learning rate; auto: 0.05 batch_size / 256."""
    weight_decay: float = 0.0
    """Weight decay; batch normalisation and biases are excluded."""

    def name(self) -> str:
        return "finetune" + self._suffix()


@dataclass(frozen=True)
class SupervisedConfig(_WithLabels):
    """The same encoder from scratch with labels: what the paper compares with. Of --checkpoint only the architecture
    is taken; --encoder, --width and --stem can say it instead."""

    width: float = 1
    """Without --checkpoint: multiplier of every layer's channels."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """Without --checkpoint: first layers; auto: small up to 64 pixels."""
    epochs: int = 90
    """Passes over the data."""
    lr: float | Literal["auto"] = "auto"
    """Peak learning rate; auto: 0.1 batch_size / 256."""
    weight_decay: float = 1e-4
    """Weight decay; batch normalisation and biases are excluded."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up, at most a tenth of all."""

    def name(self) -> str:
        return "supervised" + self._suffix()


PROTOCOLS: dict[str, type[EvaluationConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "finetune": FinetuneConfig,
    "supervised": SupervisedConfig,
}

FEATURE_FORMATS = ("npy", "safetensors")
"""Of embed's features."""
MAP_METHODS = ("umap", "tsne", "pca")
"""Of embed's map."""
MAX_QUERIES = 100
"""Rows of embed's gallery."""
PREPARATION = ("image_size", "center_fraction", "interpolation", "mean", "std")
"""The fields of the recipe that change an image when it is embedded."""
