"""Options of a run as dataclasses; options.py makes the command line, the YAML files and --help of their fields."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.backends import Backend
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.storage_options import StorageOptions
from fastsimclr.data.urls import without_query
from fastsimclr.errors import UserError
from fastsimclr.options import from_dict, parse_as, plain
from fastsimclr.presets import preset_file
from fastsimclr.ranges import (
    Count,
    Index,
    NonNegative,
    Positive,
    Probability,
    Range,
    Seed,
    Workers,
    check_fields,
    parse_duration,
)

LOGGERS = ("tensorboard", "wandb", "mlflow")
Width = Annotated[float, Range(0, 64, above=True)]
Features = Annotated[int, Range(1, 2**20)]
DEMONSTRATION = "digits"  # preset of a run without --data.train


@dataclass(frozen=True)
class DataConfig(StorageOptions, PixelOptions, Augmentation):
    """Training and validation data, data loading and the augmentation."""

    _prefix: ClassVar[str] = "--data."

    train: str | None = None
    """Training images: a folder of class folders, a flat folder of images, tar shards ('train-{000..127}.tar',
    '*.tar'), digits, cifar10[:ROOT], stl10[:ROOT], array.npy of (N, H, W, C), or mydata.py:NAME or package.module:NAME,
    a Dataset or array of your own code or a function that returns one. Tar shards and folders also at s3://, gs:// and
    hf://datasets/, tar shards at https://. If not given, the built-in demonstration runs
    (preset digits)."""
    val: Annotated[float, Range(0, 1, above=True, below=True)] | str | None = None
    """Labeled images to measure kNN accuracy on, in the same forms; or a fraction such as 0.1: that part of each class
    of the training images, chosen by seed, is held out of training. If not given, built-in datasets use their held-out
    images; other labeled data uses the training images, each excluded from its own neighbors."""
    backend: Backend = "auto"
    """Backend that decodes and crops the images: dali, torchvision, or memory (images of one size, decoded once and
    kept on the device). auto picks by the images and the device."""
    workers: Workers | None = None
    """Worker processes (torchvision) or threads (dali) per rank that read and decode images; null picks by the number
    of CPU cores."""
    drop_last: bool = False
    """Drop the last batch of an epoch if it is smaller than the others."""
    max_bad: Probability = 0.01
    """Largest fraction of images that may be unusable, of those met so far, after 1,000 or an epoch. They are replaced
    by others and listed in skipped_images.txt in the run's folder; if there are more, the run stops with a
    checkpoint."""
    cache: str | None = None
    """Folder shared by all runs, for lists of files and results of `fastsimclr doctor --data`; null uses
    $XDG_CACHE_HOME/fastsimclr or ~/.cache/fastsimclr."""

    def __post_init__(self) -> None:
        Augmentation.__post_init__(self)  # checks all fields
        PixelOptions.__post_init__(self)
        for name in ("train", "val"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, without_query(path))  # so that no record of the run has it

    def augmentation(self) -> Augmentation:
        """Return only the augmentation."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation)})


@dataclass(frozen=True)
class ModelConfig:
    """The encoder and the projection head."""

    encoder: str = "resnet50"
    """Encoder: resnet10, resnet18, resnet34, resnet50, resnet101 or resnet152; timm/NAME or torchvision/NAME for any
    image backbone of timm or torchvision, listed by `fastsimclr doctor --encoders`; or FILE.py:NAME or
    PACKAGE.MODULE:NAME for an nn.Module of your own, its class or a function that returns it."""
    width: Width = 1
    """Width multiplier: multiplies the number of channels of every layer. A multiple of 1/64, such as 0.5 or 2."""
    stem: Literal["auto", "imagenet", "medium", "small"] = "auto"
    """First layers of the encoder: imagenet (7x7 convolution of stride 2, max-pooling), medium (5x5 convolution of
    stride 2, no pooling), which takes about 4 times the operations, or small (3x3 convolution of stride 1, no pooling),
    which takes about 16 times. auto picks small for images of up to 40 pixels, otherwise imagenet."""
    hidden: Features | None = None
    """Hidden features of the projection head; null uses the encoder's number of features."""
    out: Features = 128
    """Output features of the projection head."""
    layers: Annotated[int, Range(2, 3)] = 2
    """Number of linear layers in the projection head: 2 or 3."""
    weights: str | None = None
    """Weights to start the encoder from: imagenet (published by torchvision or timm), a file or run that
    fastsimclr.load_encoder reads, or dct: cosine filters in the first convolution of our ResNets, which short runs do
    better not to train (freeze: conv1). null: random. A resumed run takes its weights from the checkpoint."""
    freeze: str | None = None
    """Modules or parameters of the encoder that do not train, separated by commas, such as conv1,bn1,layer1. Their
    batch normalization uses its running statistics."""
    freeze_epochs: Index = 0
    """Number of epochs, at the start, in which the whole encoder is frozen and only the projection head trains."""
    frozen_bn: bool = False
    """Let the batch normalization of the encoder apply its running statistics, and never update them; its weights and
    biases still train. For pretrained weights: random ones have no statistics. Micro-batches of the encoder then give
    the same representations as the whole batch."""
    sync_bn: bool = True
    """Synchronize batch normalization statistics across ranks."""
    bn_group: Count | None = None
    """Number of neighboring ranks that synchronize these statistics, such as those of a host; it must divide the number
    of ranks. The running statistics are then those of the first group. null: all ranks."""
    checkpoint_stages: bool = False
    """Keep only the input of each residual stage for the backward pass, which computes the stage again. Saves memory at
    the cost of most of a forward pass; gradients and statistics stay the same. For our ResNets, and models of timm
    that support it (set_grad_checkpointing). Not with compile."""


@dataclass(frozen=True)
class LossConfig:
    """The NT-Xent loss."""

    temperature: Positive = 0.1
    """Temperature; the cosine similarities are divided by it."""
    backend: Literal["auto", "fused", "tiled", "reference"] = "auto"
    """Implementation of the loss: fused (CUDA kernels), tiled (PyTorch, O(N D) memory) or reference (PyTorch, O(N^2)
    memory). auto picks the fastest available."""
    precision: Literal["auto", "highest", "medium"] = "highest"
    """Precision of the matrix products in the loss: highest (float32) or medium (bf16). auto: medium for bf16 and fp16
    projections, otherwise highest."""
    decoupled: bool = False
    """Use the decoupled loss, which leaves the positive out of the denominator (arXiv 2110.06848)."""
    hardness: NonNegative = 0.0
    """Weight negatives by exp(hardness * similarity / temperature), so that similar ones count more (beta of arXiv
    2010.04592). The loss then takes twice the time. 0: all count alike."""
    global_negatives: bool = True
    """Use the views of all ranks as negatives."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning-rate schedule."""

    name: Literal["auto", "lars", "sgd", "adamw", "muon"] = "auto"
    """Optimizer: lars (as in the paper), sgd, adamw, or muon (orthogonalized momentum, for short runs). auto: adamw for
    encoders with layer normalization or attention or without batch normalization (ViT, ConvNeXt), otherwise lars."""
    lr: Positive | Literal["auto"] = "auto"
    """Peak learning rate; auto scales it with the batch size as set by lr_rule."""
    lr_rule: Literal["auto", "linear", "sqrt"] = "auto"
    """Scaling of the learning rate with the batch size. For lars: linear is 0.3 * batch_size / 256 and sqrt is 0.075 *
    sqrt(batch_size). Both are equal at 4096; sqrt is better below 1024. auto: for adamw on the encoders named above,
    linear, which is MoCo v3's 1.5e-4 * batch_size / 256; otherwise sqrt."""
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Momentum; beta1 for adamw, and in muon for parameters other than weights."""
    weight_decay: NonNegative | Literal["auto"] = "auto"
    """Weight decay; not applied to normalization parameters, biases, scales, position embeddings and class tokens.
    auto: 0.1 for adamw on the encoders named above, as in MoCo v3; otherwise 1e-6, as in SimCLR."""
    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up, limited to a tenth of all epochs."""
    clip_grad: Positive | None = None
    """Maximum norm of the gradient over all parameters; null disables clipping."""


@dataclass(frozen=True)
class Config:
    """Options of a pre-training run. The defaults are the paper's for ImageNet."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: Count = 256
    """Global batch size: images per step over all ranks. Each image yields data.num_views views."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Images that a rank encodes at a time; the loss still covers the whole batch. Saves memory at the cost of a second
    forward pass. Batch normalization then normalizes each micro-batch by its own statistics; together they move the
    running statistics as one batch does. null encodes the whole batch at once. auto: the largest number that fits in
    memory, found by trials before the first step and recorded in config.yaml; a resumed run uses that of its
    checkpoint."""
    epochs: Count = 100
    """Number of epochs; the learning-rate schedule spans them."""
    steps: Count | None = None
    """Number of steps instead of epochs; the learning-rate schedule spans them. null: epochs."""
    max_steps: Count | None = None
    """Stop after this many steps, without changing the schedule; null runs to its end."""
    max_skipped: Count = 10
    """Stop after this many steps in a row whose loss or gradient is not finite. Each is skipped: it leaves the weights
    unchanged."""
    time_limit: str | None = None
    """Time from the start of the command, such as 4h, 1h30m or 90s, within which the run ends with a checkpoint. It
    stops earlier by a tenth of that time, at most a minute, and by twice the longest step or checkpoint. null: no
    limit."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Precision of the encoder: autocast to bf16 or fp16, or float32 or float64 throughout. auto: bf16 if the hardware
    supports it, else fp16 on a GPU with tensor cores (V100, T4), else float32. fp16 scales the gradients and skips a
    step if they overflow."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks train one model: ddp: each has all of it; fsdp: each keeps a part of the weights, of their
    gradients and of the optimizer's state, which saves memory. Both compute the same. A resumed run may use the other
    one."""
    device: str = "auto"
    """Device: cuda, cpu or auto (cuda if available). Under torchrun each rank uses its own GPU."""
    compile: bool = False
    """Compile the model with torch.compile."""
    profile: bool = False
    """Trace 20 steps with torch.profiler to trace.json.gz in the run's folder, for ui.perfetto.dev or chrome://tracing."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the images and the random parameters of the views."""
    resume: str = "auto"
    """Checkpoint to resume from: auto (the checkpoint in output, if there is one), never, or a checkpoint file."""
    resume_changed: bool = False
    """Resume even if options of the recipe differ from those of the checkpoint: the augmentation, the loss, the
    optimizer, the precision, the seed. They change after the step of the checkpoint. The architecture, the batch size
    and the number of images cannot change."""
    stall_timeout: Positive = 600.0
    """Seconds after which a run of several ranks ends if one of them gives no sign of life, or if a batch or a step
    takes that long."""
    output: str | None = None
    """Folder of the run. null creates a new folder runs/DATA-ENCODER-TIME each time, so resume=auto finds no
    checkpoint."""
    checkpoint_every: Positive = 1.0
    """Epochs between checkpoints (0.1: ten per epoch). One is also written at the end, and when a signal (SIGTERM,
    SIGINT, SIGUSR1, SIGHUP) or time_limit stops the run."""
    keep_every: Count | None = None
    """Keep the checkpoint of every N-th epoch as checkpoints/epoch-0010.pt; null keeps only the last one."""
    keep_best: Literal["knn"] | None = None
    """Keep the checkpoint with the highest kNN accuracy as checkpoints/best.pt: knn, or null for none. It is compared
    when it is measured; see knn_every."""
    log: str | None = "tensorboard"
    """Loggers of the metrics, besides metrics.jsonl: tensorboard, wandb, mlflow, several separated by commas, or null.
    pip install 'fastsimclr[wandb,mlflow]' installs the last two."""
    knn_every: Index = 10
    """Epochs between measurements of kNN accuracy, if there are labels. It is also measured at the end. 0: never."""
    knn_k: Count = 20
    """Number of neighbors that vote in kNN, weighted by exp(cosine / 0.07)."""
    knn_images: Count | None = 50_000
    """Largest number of training images, and of validation images, in kNN; more are sampled by seed, the same share of
    each class. null: all. Each rank keeps its part of the representations, in float16."""
    knn_at_start: bool = False
    """Measure kNN accuracy before the first step, too, to compare with the untrained encoder."""

    health: bool = True
    """Measure contrastive accuracy, alignment, uniformity, effective ranks and dead dimensions up to four times per
    epoch, and warn if the encoder collapses or does not learn."""
    probe: bool = True
    """Train a linear classifier of the representations beside the encoder, without a gradient into it. Its accuracy on
    the validation images is measured together with kNN accuracy; without that, or without labels, there is no probe."""

    def __post_init__(self) -> None:
        check_fields(self, "--")
        if self.time_limit is not None:
            parse_duration(self.time_limit, "time_limit")
        if self.model.freeze_epochs >= self.epochs:
            raise UserError(f"--model.freeze_epochs: got {self.model.freeze_epochs}, expected 0 to --epochs minus 1")
        if self.compile and self.model.checkpoint_stages:
            raise UserError("--model.checkpoint_stages: got true with --compile, expected only one of them")
        if self.distributed == "fsdp" and self.micro_batch_size == "auto":
            raise UserError("--micro_batch_size: got auto with --distributed fsdp, expected a number or none")
        if self.output is not None and not self.output.isprintable():  # TensorBoard and others cannot write there
            raise UserError(f"--output: got {self.output!r}, expected a name in UTF-8 without control characters")
        if self.keep_best is not None and self.knn_every == 0:
            raise UserError("--keep_best: got knn with knn_every 0; expected knn_every of at least 1")
        if unknown := set(self.loggers) - set(LOGGERS):
            raise UserError(f"--log: got {self.log} with {sorted(unknown)[0]!r}, expected {', '.join(LOGGERS)} or none")

    @property
    def loggers(self) -> list[str]:
        """The names of the loggers."""
        return [] if self.log is None else list(dict.fromkeys(name.strip() for name in self.log.split(",")))


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Return the configuration given by the command line (or `arguments`).

    Raises UserError for unknown options and invalid values.
    """
    about = "Pre-train an image encoder with SimCLR. Without --data.train, runs a demonstration on digits."
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse_as(Config, arguments, "train", about)
    if config.data.train is None:
        config = parse_as(Config, arguments, "train", about, preset=preset_file(DEMONSTRATION))
    return config


def from_options(options: dict[str, Any]) -> Config:
    """Return the configuration with these options; sections are dicts. The other options have their defaults.

    Raises UserError, whose text has no "--" before an option, for unknown options and invalid values.
    """
    return from_dict(Config, options, "train")


def to_yaml(options: Any) -> str:
    """Return the options (a dataclass of dataclasses) as YAML, which --config reads."""
    import yaml  # here, so that --help does not wait for it

    return yaml.safe_dump(plain(asdict(options)), sort_keys=False)
