"""The options of each evaluation protocol, with the paper's defaults, and the choices of the embed command."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastsimclr.config import DataConfig, Width
from fastsimclr.ranges import Count, Fraction, NonNegative, Positive, Range, Seed, check_fields


@dataclass(frozen=True)
class EvaluationConfig(ABC):
    """Options that all protocols share."""

    checkpoint: str | None = None
    """A run's folder or checkpoint, an export, or another project's checkpoint. Its training data
    and augmentation are the defaults of the --data options."""
    encoder: str | None = None
    """Expected encoder of the checkpoint, such as resnet50 or timm/NAME; null accepts any. For weights of a module of
    your own: the function that makes it, such as mymodel.py:make_encoder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Labeled images. Of the augmentation, only crops and flips are used."""
    batch_size: Count = 256
    """Images per step, over all ranks."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Precision of the encoder: bf16 or fp16 autocast, float32 or float64. auto: bf16 where the hardware supports it,
    else fp16 on a GPU with tensor cores (V100, T4), else float32."""
    device: str = "auto"
    """cuda, cpu or auto; under torchrun each rank uses its own GPU."""
    seed: Seed = 0
    """Random seed of the subset of labels, new weights, the order of images, crops and flips."""
    output: str | None = None
    """Output folder; null: evaluate/ in the run's folder."""
    force: bool = False
    """Overwrite existing results."""

    def __post_init__(self) -> None:
        check_fields(self, "--")

    @abstractmethod
    def name(self) -> str:
        """Name of the result files, without suffix."""


@dataclass(frozen=True)
class KnnConfig(EvaluationConfig):
    """Classify each image by its k nearest neighbors among the training images. Nothing is trained.

    Without --data.val, each training image is classified by the other training images.
    """

    k: Count = 200
    """Number of neighbors."""
    temperature: Positive | None = 0.07
    """Each neighbor's vote has weight exp(cosine / temperature); null: weight 1."""

    def name(self) -> str:
        return "knn"


@dataclass(frozen=True)
class _WithLabels(EvaluationConfig):
    labels: Fraction | str = 1.0
    """Labels of --data.train to use: a fraction such as 0.01 (the same number per class, chosen by seed), or a file
    that lists the images, such as the public 1 % and 10 % lists of ImageNet."""

    def _suffix(self) -> str:
        return "" if self.labels == 1 else "-labels" if isinstance(self.labels, str) else f"-{self.labels:g}"


@dataclass(frozen=True)
class LinearConfig(_WithLabels):
    """Train a linear classifier on the frozen encoder's representations (arXiv 2002.05709, appendix B.6)."""

    solver: Literal["sgd", "lbfgs"] = "sgd"
    """sgd: the paper's protocol, with random crops and flips; lbfgs: logistic regression, solved to convergence on
    representations that are computed once."""
    epochs: Count = 90
    """sgd: number of epochs."""
    lr: Positive | Literal["auto"] = "auto"
    """sgd: peak learning rate; auto: 0.1 batch_size / 256."""
    weight_decay: NonNegative = 0.0
    """sgd: weight decay."""
    c: Positive | Literal["auto"] = "auto"
    """lbfgs: inverse regularization strength, as scikit-learn's C; auto selects the best of 1e-6 to 100 on a held-out
    fifth of the training images, then fits all of them."""

    def name(self) -> str:
        return "linear" + ("-lbfgs" if self.solver == "lbfgs" else "") + self._suffix()


@dataclass(frozen=True)
class FinetuneConfig(_WithLabels):
    """Fine-tune the whole encoder with labels (arXiv 2002.05709, appendix B.5). Transformers and ConvNeXt train with
    AdamW, as in DeiT (arXiv 2012.12877): lr 5e-4 batch_size / 512, weight decay 0.05."""

    epochs: Count | Literal["auto"] = "auto"
    """Number of epochs; auto: 60 with at most 2 % of the labels, else 30."""
    lr: Positive | Literal["auto"] = "auto"
    """Peak learning rate; auto: 0.05 batch_size / 256, or DeiT's for transformers and ConvNeXt."""
    weight_decay: NonNegative | Literal["auto"] = "auto"
    """Weight decay; norms, biases and position embeddings are excluded. auto: 0, or DeiT's."""

    def name(self) -> str:
        return "finetune" + self._suffix()


@dataclass(frozen=True)
class SupervisedConfig(_WithLabels):
    """Train the same encoder from scratch with labels: the paper's supervised baseline. Only the architecture of
    --checkpoint is used; --encoder, --width and --stem specify it without a checkpoint. Transformers and ConvNeXt train
    with AdamW, as in DeiT (arXiv 2012.12877): lr 5e-4 batch_size / 512, weight decay 0.05."""

    width: Width = 1
    """Without --checkpoint: width multiplier of all layers."""
    stem: Literal["auto", "imagenet", "medium", "small"] = "auto"
    """Without --checkpoint: first layers; auto: small for images of up to 40 pixels, else imagenet."""
    epochs: Count = 90
    """Number of epochs."""
    lr: Positive | Literal["auto"] = "auto"
    """Peak learning rate; auto: 0.1 batch_size / 256, or DeiT's for transformers and ConvNeXt."""
    weight_decay: NonNegative | Literal["auto"] = "auto"
    """Weight decay; norms, biases and position embeddings are excluded. auto: 1e-4, or DeiT's."""
    warmup_epochs: NonNegative = 5.0
    """Epochs of linear warm-up, at most a tenth of all epochs."""

    def name(self) -> str:
        return "supervised" + self._suffix()


PROTOCOLS: dict[str, type[EvaluationConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "finetune": FinetuneConfig,
    "supervised": SupervisedConfig,
}

FEATURE_FORMATS = ("npy", "safetensors")
"""File formats of embed's features."""
MAP_METHODS = ("umap", "tsne", "pca")
"""Projection methods of embed's map."""
Queries = Annotated[int, Range(0, 100)]
"""Number of rows of embed's gallery."""
PREPROCESSING = ("image_size", "center_fraction", "interpolation", "mean", "std")
"""Fields of Augmentation that affect how an image is prepared for embedding."""
