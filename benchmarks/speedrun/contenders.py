"""The contenders of the speedrun, and a run of one in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsimclr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TRAIN, LIGHTLY_LOOP = "fastsimclr.train", "benchmarks.speedrun.lightly_loop"
CONFIG = "--config=cifar10_fast"
# No measurements, logs and checkpoints during the run.
UNTIMED = ("--knn_every=0", "--log=none", "--checkpoint_every=1000000", "--resume=never")
# scripts/pretrain/cifar/simclr.yaml of solo-learn. Its LARS, with clip_lr, is SGD of rate 0.4 whose step is limited, in
# each layer, to 0.02 of the norm of the weights. fastsimclr's LARS scales every step to the norm, so this is SGD.
SOLO_LEARN = (
    "--config=cifar10",
    *(
        "--data.brightness=0.8",
        "--data.contrast=0.8",
        "--data.saturation=0.8",
        "--data.hue=0.2",
        "--data.blur_prob=0.5",
    ),
    *("--model.hidden=2048", "--model.out=256", "--loss.temperature=0.2", "--batch_size=256"),
    *("--optim.name=sgd", "--optim.lr=0.4", "--optim.weight_decay=1e-4"),
)
LOG_LINES = 15  # of a failed run that are shown


@dataclass(frozen=True)
class Contender:
    """A recipe, and the program that trains with it. requires: package that it needs."""

    name: str
    options: tuple[str, ...]
    program: str = TRAIN
    requires: str = "fastsimclr"

    def recorded_options(self) -> list[str]:
        """Return the options with paths relative to the checkout."""
        return [option.replace(f"{ROOT}/", "") for option in self.options]

    def option(self, name: str) -> str | None:
        """Return the value of an option that is given as --NAME=VALUE, else None."""
        values = [option.partition("=")[2] for option in self.options if option.startswith(f"--{name}=")]
        return values[-1] if values else None


AT_EQUAL_TIME = (
    Contender("ours", (CONFIG,)),
    Contender("paper", ("--config=cifar10",)),
    Contender("lightly", ("--recipe=lightly",), LIGHTLY_LOOP, "lightly"),
    Contender("lightly with ImageNet stem", ("--recipe=lightly", "--stem=imagenet"), LIGHTLY_LOOP, "lightly"),
    Contender("solo-learn", SOLO_LEARN),
)
# With bilinear interpolation, float32 and without the last, smaller batch of an epoch, as in lightly's loop. The
# ImageNet stem and batches of 256, instead of the paper's small stem and 512, take a 32nd of the operations.
SMALLER = "--batch_size=256"
IN_LIGHTLYS_WAY = ("--data.interpolation=bilinear", "--data.drop_last", "--precision=fp32")
AT_EQUAL_STEPS = (
    Contender("paper in fastsimclr", ("--config=cifar10", "--model.stem=imagenet", SMALLER, *IN_LIGHTLYS_WAY)),
    Contender("paper in lightly's loop", ("--recipe=paper", "--stem=imagenet", SMALLER), LIGHTLY_LOOP, "lightly"),
)


@dataclass(frozen=True)
class Measured:
    """A finished run."""

    seconds: float
    """From the start of the process to its end."""
    steps: list[dict[str, Any]]
    """Records of the steps, with "loss", "step_ms" and "images"."""


def train(
    contender: Contender, images: str, folder: Path, *, seed: int, steps: int, limit_s: float | None = None
) -> Measured:
    """Train in a new process, whose encoder `folder` then has. Raises UserError if it fails.

    limit_s: seconds from the start of the process after which it ends, whatever steps are left, with the encoder.
    """
    folder.mkdir(parents=True)
    options = [*contender.options, f"--data.train={images}", f"--steps={steps}", f"--seed={seed}", f"--output={folder}"]
    if contender.program == TRAIN:
        options += [*UNTIMED, f"--data.cache={folder / 'cache'}"]
        options += [] if limit_s is None else [f"--time_limit={round(time_limit(limit_s))}s"]
    elif limit_s is not None:
        options.append(f"--deadline={time.monotonic() + limit_s}")
    # Nothing that an earlier run has compiled.
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    environment = os.environ | {name: str(folder / "compiled" / name.lower()) for name in caches}
    log = folder / "log"
    with log.open("wb") as file:
        started = time.monotonic()
        command = [sys.executable, "-m", contender.program, *options]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        seconds = time.monotonic() - started
    if code:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise UserError(f"{contender.name}: got exit code {code}, expected 0\n{last}")
    return Measured(seconds, read_steps((folder / "metrics.jsonl").read_text().splitlines()))


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def time_limit(seconds: float) -> float:
    """Return the --time_limit that ends a run within `seconds`: it subtracts a tenth, at most a minute, as a margin."""
    return min(seconds / 0.9, seconds + 60)


def read_steps(lines: Iterable[str]) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, lines) if "loss" in record]
