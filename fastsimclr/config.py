"""Every knob of a run, one documented field each: the command line, YAML and --help are made from these classes."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.backends import Backend
from fastsimclr.errors import UserError
from fastsimclr.presets import preset_file

Options = TypeVar("Options")

DEMONSTRATION = "digits"  # the preset of a run without --data.train
SWITCHES = ("--compile", "--force", "--profile")


@dataclass(frozen=True)
class DataConfig(Augmentation):
    """What is trained on, and how views are made of it."""

    train: str | None = None
    """A folder of class folders, a flat folder of images, tar shards ('train-{000..127}.tar', '*.tar'), digits,
    cifar10[:ROOT] or stl10[:ROOT]. Without it the built-in demonstration runs (preset digits)."""
    val: str | None = None
    """Labelled images to measure kNN accuracy on, in the same forms. Without it: the held-out part of digits and
    cifar10; of other labelled data the training images themselves, each without itself as a neighbour."""
    backend: Backend = "auto"
    """Who decodes and crops: dali, torchvision, or memory (images of one size, kept decoded on the device)."""
    workers: int | None = None
    """Processes (torchvision) or threads (dali) that read and decode, per rank; null chooses by the machine."""
    drop_last: bool = False
    """Leave out an epoch's last batch where it is smaller than the others."""
    max_bad: float = 0.01
    """Largest fraction of the image files that may be bad: those that do not decode are left out, and listed in
    output's skipped_images.txt. If more are, the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("max_bad", 0 <= self.max_bad <= 1, "a fraction from 0 to 1")

    def augmentation(self) -> Augmentation:
        """The recipe alone."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation)})


@dataclass(frozen=True)
class ModelConfig:
    """The encoder and the projection head."""

    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """torchvision's ResNet of that name."""
    width: float = 1
    """Multiplier of every layer's channels."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """First layers: imagenet (7x7, stride 2, pool) or small (3x3, stride 1); auto: small up to 64 pixels."""
    hidden: int | None = None
    """Features inside the projection head; null for the encoder's."""
    out: int = 128
    """Features of a projection."""
    layers: int = 2
    """Linear layers of the projection head: 2 or 3."""
    sync_bn: bool = True
    """With several ranks, normalise over the batch of all of them."""


@dataclass(frozen=True)
class LossConfig:
    """The NT-Xent loss."""

    temperature: float = 0.1
    """Divides the cosine similarities."""
    backend: Literal["auto", "fused", "tiled", "reference"] = "auto"
    """Who computes it; auto takes the fastest that is there."""
    precision: Literal["auto", "highest", "medium"] = "highest"
    """Of its products: highest (float32) or medium (bf16); auto by the projections' dtype."""
    decoupled: bool = False
    """Leave the positive out of the denominator (arXiv 2110.06848)."""
    global_negatives: bool = True
    """With several ranks, the views of all of them are negatives."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """lars as in the paper, sgd, or adamw."""
    lr: float | Literal["auto"] = "auto"
    """Peak learning rate; auto takes it from the batch size by lr_rule."""
    lr_rule: Literal["linear", "sqrt"] = "sqrt"
    """For lars: linear is 0.3 batch / 256, sqrt is 0.075 sqrt(batch). The same at 4096; sqrt is better below 1024."""
    momentum: float = 0.9
    """Momentum; beta 1 of adamw."""
    weight_decay: float = 1e-6
    """Weight decay; batch normalisation and biases are excluded."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up, at most a tenth of all."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters; null does not clip."""


@dataclass(frozen=True)
class Config:
    """A pre-training run. The defaults are the paper's for ImageNet."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_size: int = 256
    """Images a step, over all ranks; each gives data.views views."""
    micro_batch_size: int | None = None
    """Images a rank puts through the encoder at a time; the loss still sees the whole batch. Saves memory for a second
    forward pass; batch normalisation then is over the micro-batch. null: all at once."""
    epochs: int = 100
    """Passes over the data; the learning rate's schedule spans them."""
    max_steps: int | None = None
    """Stop after this many steps, wherever the schedule is; null runs all epochs."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Of the encoder: bf16 or fp16 autocast, float32 or float64. auto: bf16 where the hardware has it, else fp16 on a
    GPU with tensor cores (V100, T4), else float32. fp16 scales the gradients, and skips a step if they overflow."""
    device: str = "auto"
    """cuda, cpu or auto; under torchrun each rank takes its own GPU."""
    compile: bool = False
    """torch.compile the model."""
    profile: bool = False
    """Trace 20 steps by torch.profiler into output's trace.json.gz, for ui.perfetto.dev or chrome://tracing."""
    seed: int = 0
    """Of the weights, the order of images and every view."""
    resume: str = "auto"
    """auto: go on from output's checkpoint if there is one; never; or a checkpoint file."""
    output: str | None = None
    """Folder of the run; null makes runs/DATA-ENCODER-TIME, which no later run will find by itself."""
    checkpoint_every: float = 1.0
    """Epochs between checkpoints (0.1: ten an epoch). The end, SIGTERM and SIGINT write one too."""
    knn_every: int = 10
    """Epochs between measurements of kNN accuracy, if there are labels; 0 for none. The end always has one."""
    knn_k: int = 20
    """Neighbours that vote, weighted by exp(cosine / 0.07)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "epochs", "max_steps", "knn_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: got {value}, expected at least 1")
        for name, value in (("checkpoint_every", self.checkpoint_every), ("loss.temperature", self.loss.temperature)):
            if not value > 0:
                raise UserError(f"--{name}: got {value}, expected a number above 0")
        if self.optim.lr != "auto" and not self.optim.lr > 0:
            raise UserError(f"--optim.lr: got {self.optim.lr}, expected a number above 0, or auto")


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> Any:
        """One line in our own form of jsonargparse's several: which option, what was got, what is expected."""
        message = " ".join(message.split())
        wrong = re.match(r'Parser key "(.+?)": (.*?)(?:Given value type.*)?(?:Given|Got) value: (.*)', message)
        if wrong:
            option, reason, value = wrong.groups()
            expected = [kind or choices for kind, choices in re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", reason)]
            expected = list(dict.fromkeys("none" if kind == "NoneType" else kind for kind in expected))
            raise UserError(f"--{option}: got {value}, expected {' or '.join(expected)}")
        message = re.sub(r'Parser key "(.+?)":', r"--\1:", message)
        raise UserError(f"{message}; see {self.prog} --help")


def parse(arguments: Sequence[str] | None = None) -> tuple[Config, str]:
    """The configuration of a run that the command line (or `arguments`) asks for, and the same as YAML.

    Raises UserError for unknown options and values that do not fit.
    """
    about = "Pre-train an image encoder with SimCLR. Without --data.train: a demonstration on digits."
    arguments = sys.argv[1:] if arguments is None else arguments
    config, text = parse_as(Config, arguments, "train", about)
    if config.data.train is None:
        config, text = parse_as(Config, arguments, "train", about, preset=preset_file(DEMONSTRATION))
    return config, text


def parse_as(
    kind: type[Options],
    arguments: Sequence[str],
    program: str,
    about: str,
    *,
    preset: Path | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Options, str]:
    """The options of python -m fastsimclr.`program`, whose class is `kind`, and the same as YAML.

    preset: a YAML file, and defaults: values by option ("data.image_size"), in place of the class's defaults.
    Raises UserError for unknown options and values that do not fit.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=f"python -m fastsimclr.{program}",
        description=about,
        default_config_files=[str(preset)] if preset else None,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A YAML file of these options, or the name of a preset (digits, cifar10); those given after it win.",
    )
    parser.add_class_arguments(kind, nested_key=None)
    parser.set_defaults(defaults or {})
    namespace = parser.parse_args(_as_yaml(arguments))
    return _instantiate(kind, parser, namespace), parser.dump(namespace)


def _as_yaml(arguments: Sequence[str]) -> list[str]:
    """The arguments in jsonargparse's terms: "none" is YAML's null, a switch alone true, and a preset its file."""
    arguments = list(arguments)
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if argument == "none" or (option.startswith("--") and value == "none"):
            arguments[place] = argument.removesuffix("none") + "null"
        if argument in SWITCHES and arguments[place + 1 : place + 2] not in (["true"], ["false"]):
            arguments[place] = f"{argument}=true"
        if option == "--config" and value:
            arguments[place] = f"--config={_config_file(value)}"
        elif place > 0 and arguments[place - 1] == "--config":
            arguments[place] = str(_config_file(argument))
    return arguments


def _config_file(named: str) -> Path:
    return Path(named) if Path(named).is_file() else preset_file(named)


def _instantiate(kind: type[Options], parser: _Parser, namespace: Namespace) -> Options:
    try:
        values = parser.instantiate(namespace)
        return kind(**{f.name: values[f.name] for f in fields(kind)})  # type: ignore[arg-type]  # a dataclass
    except UserError:
        raise
    except ValueError as error:  # the checks of Views
        raise UserError(f"--data.{error}") from error
