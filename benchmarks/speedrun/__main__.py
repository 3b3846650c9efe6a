"""Accuracy against seconds: contenders train on CIFAR-10 within the same wall time, and are evaluated alike.

    python -m benchmarks.speedrun --budget 600 --train 'cifar10/train-*.tar' --test cifar10/test.tar --output DIR
    python -m benchmarks.speedrun --budget 600 --contenders ours --lever batch512="--batch_size=512" ...
    python -m benchmarks.speedrun --equal_steps 320 ...

Each run is a process of its own. Its time is from the start of the process to its end: imports, compiling, decoding
and saving the encoder included, with empty caches. The evaluation follows, outside the budget: kNN with 20 and 200
neighbors and logistic regression, on all test images. The contenders take turns, seed by seed.

The learning rate of every contender reaches its end when the budget ends. For that a trial, before a contender's first
run, measures its time per step (the mean of the second half of its steps) and the rest of its time; the run is planned
for as many steps as fit into 97 % of the budget. The trial, planned in the same way by a run of three steps, is not
part of the budget, and is recorded. Later runs are planned by what the run before measured. Runs that are slower than
planned are ended by the budget, without the end of their schedule, which the table marks; so are runs that take over
3 % longer than the budget.

--lever NAME=OPTIONS adds a contender: ours with more options. --equal_steps compares the paper's recipe in fastsimclr
and in lightly's loop at equal steps, on 4,000 images unless --images says otherwise.

Each run writes its record, OUTPUT/SETTING/NAME-seedN.json. The same command goes on with the missing ones. Every time,
OUTPUT/report.md and OUTPUT/speedrun.png are made of all records in OUTPUT.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.pretraining_gain import write_subset
from benchmarks.speedrun.contenders import (
    AT_EQUAL_STEPS,
    AT_EQUAL_TIME,
    CONFIG,
    Contender,
    Measured,
    is_installed,
    train,
)
from benchmarks.speedrun.evaluation import evaluate, load, open_images
from fastsimclr.environment import commit, installed
from fastsimclr.errors import UserError

PLANNED, OVERRUN = 0.97, 1.03  # fractions of the budget
FIRST_STEPS = 3  # of which the last two plan the trial
EQUAL_STEPS_IMAGES = 4000
CURVE_POINTS = 200
PACKAGES = ("torch", "torchvision", "lightly")


@dataclass(frozen=True)
class Speed:
    """What a run of a contender, such as its trial, has measured."""

    seconds: float
    steps: int
    step_s: float
    """Mean of the second half of the steps."""
    longest_s: float
    """The longest step, which is usually the first."""
    other_s: float
    """Time of the process beyond steps * step_s: imports, decoding, compiling, the first steps, saving."""

    @classmethod
    def of(cls, measured: Measured) -> "Speed":
        seconds = [record["step_ms"] / 1000 for record in measured.steps]
        step_s = statistics.mean(seconds[len(seconds) // 2 :])
        return cls(measured.seconds, len(seconds), step_s, max(seconds), measured.seconds - len(seconds) * step_s)

    def plan(self, budget_s: float) -> int:
        """Return the number of steps that fit into the budget, and that the limit does not end.

        The limit lets a step begin if there is time for two of the longest.
        """
        planned_s = min(PLANNED * budget_s, OVERRUN * budget_s - 2 * self.longest_s + self.step_s)
        return int((planned_s - self.other_s) / self.step_s)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--budget", type=float, metavar="SECONDS", help="wall time of each run")
    mode.add_argument("--equal_steps", type=int, metavar="STEPS", help="steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--train", default="cifar10", help="labeled images, as for fastsimclr.train (default: %(default)s)"
    )
    parser.add_argument("--test", help="labeled images to evaluate on (default: those of a built-in dataset)")
    parser.add_argument("--images", type=int, help="train on that many images, the same for all seeds (default: all)")
    parser.add_argument("--contenders", metavar="NAME,NAME", help="(default: all)")
    parser.add_argument("--lever", action="append", default=[], metavar="NAME=OPTIONS", help="ours with more options")
    parser.add_argument("--trial", type=float, metavar="SECONDS", help="(default: 15 %% of the budget, 30 to 120 s)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the records")
    options = parser.parse_args(arguments)
    if options.trial is None and options.budget is not None:
        options.trial = min(max(30.0, 0.15 * options.budget), 120.0)
    if options.images is None and options.equal_steps is not None:
        options.images = EQUAL_STEPS_IMAGES
    return options


def choose_contenders(options: argparse.Namespace) -> list[Contender]:
    """Return the contenders of the options. Those whose package is not installed are skipped, with a message."""
    chosen = {each.name: each for each in (AT_EQUAL_TIME if options.equal_steps is None else AT_EQUAL_STEPS)}
    if options.contenders is not None:
        names = list(filter(None, options.contenders.split(",")))
        if unknown := set(names) - set(chosen):
            raise UserError(f"--contenders: got {sorted(unknown)[0]}, expected some of {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in names}
    for lever in options.lever:
        name, equals, more = lever.partition("=")
        if not equals or not name or name in chosen:
            raise UserError(f"--lever: got {lever!r}, expected NAME=OPTIONS with a new name")
        chosen[name] = Contender(name, (CONFIG, *shlex.split(more)))
    for each in chosen.values():
        if not is_installed(each.requires):
            print(f"{each.name}: skipped, as {each.requires} is not installed", flush=True)
    return [each for each in chosen.values() if is_installed(each.requires)]


def run(options: argparse.Namespace) -> None:
    contenders = choose_contenders(options)
    setting = f"{options.budget:g}s" if options.equal_steps is None else f"{options.equal_steps}steps"
    folder = options.output / (setting if options.images is None else f"{setting}-{options.images}images")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        images = options.train
        if options.images is not None:
            images = write_subset(options.train, options.images, Path(scratch) / "images")
        for seed in range(options.seeds):
            for contender in contenders:
                file = folder / f"{slug(contender.name)}-seed{seed}.json"
                if file.exists():
                    check_same(file, contender)
                    continue
                record = train_and_evaluate(contender, seed, images, folder, Path(scratch), options)
                write_json(file, record)
                print(summary(record), flush=True)
                write_report(options.output)
    write_report(options.output)


def train_and_evaluate(
    contender: Contender, seed: int, images: str, folder: Path, scratch: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train and evaluate one contender, and return its record. folder: of the records, for the trial's."""
    budget, steps, speed = options.budget, options.equal_steps, None
    if budget is not None:
        speed = speed_of_run_before(contender, seed, folder)
        speed = speed or measure_trial(contender, images, folder, scratch, options.trial)
        steps = speed.plan(budget)
        if steps < 1:
            raise UserError(
                f"--budget: got {budget:g} s, in which {contender.name} has no time for a step of {speed.step_s:.1f} s "
                f"after {speed.other_s:.0f} s for the rest; expected a longer budget"
            )
    load_average = os.getloadavg()[0]
    output = scratch / "run"
    limit = None if budget is None else OVERRUN * budget
    measured = train(contender, images, output, seed=seed, steps=steps, limit_s=limit)
    started = time.monotonic()
    data = open_once(images, options.test)
    accuracy = evaluate(*load(contender, output), data)
    shutil.rmtree(output)
    return {
        "name": contender.name,
        "options": contender.recorded_options(),
        "seed": seed,
        "budget_s": budget,
        "train_images": len(data.train),
        "planned_by": speed and asdict(speed),
        "planned_steps": steps,
        "steps": len(measured.steps),
        "images_seen": sum(record["images"] for record in measured.steps),
        "seconds": measured.seconds,
        "speed": asdict(Speed.of(measured)),
        "cut": len(measured.steps) < steps,
        "overran": budget is not None and measured.seconds > OVERRUN * budget,
        "accuracy": accuracy,
        "curve": curve(measured),
        "evaluation_seconds": time.monotonic() - started,
        "load_average": load_average,
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


open_once = cache(open_images)


def speed_of_run_before(contender: Contender, seed: int, folder: Path) -> Speed | None:
    """Return what the run of the seed before has measured; None if there is none."""
    file = folder / f"{slug(contender.name)}-seed{seed - 1}.json"
    return Speed(**json.loads(file.read_text())["speed"]) if file.exists() else None


def measure_trial(contender: Contender, images: str, folder: Path, scratch: Path, seconds: float) -> Speed:
    """Return what the contender's trial measures, or has measured."""
    file = folder / f"{slug(contender.name)}-trial.json"
    if not file.exists():
        trial = try_steps(contender, FIRST_STEPS, images, scratch)
        if (steps := trial.plan(seconds)) > FIRST_STEPS:
            trial = try_steps(contender, steps, images, scratch)
        write_json(file, asdict(trial) | {"options": contender.recorded_options()})
        print(f"{contender.name}: {trial.step_s:.3g} s per step, {trial.other_s:.0f} s for the rest", flush=True)
    check_same(file, contender)
    record = json.loads(file.read_text())
    del record["options"]
    return Speed(**record)


def try_steps(contender: Contender, steps: int, images: str, scratch: Path) -> Speed:
    output = scratch / "trial"
    measured = train(contender, images, output, seed=0, steps=steps)
    shutil.rmtree(output)
    return Speed.of(measured)


def check_same(file: Path, contender: Contender) -> None:
    """Raise UserError if a record is of a contender with other options."""
    if json.loads(file.read_text())["options"] != contender.recorded_options():
        raise UserError(
            f"{file}: got a record of {contender.name} with other options; expected another name or --output"
        )


def curve(measured: Measured) -> dict[str, list[float]]:
    """Return the loss against the seconds since the start of the process, at up to CURVE_POINTS steps."""
    now = measured.seconds - sum(record["step_ms"] for record in measured.steps) / 1000
    seconds, losses = [], []
    for record in measured.steps:
        now += record["step_ms"] / 1000
        seconds.append(round(now, 2))
        losses.append(record["loss"])
    every = -(-len(losses) // CURVE_POINTS)
    return {"seconds": seconds[::-1][::every][::-1], "loss": losses[::-1][::every][::-1]}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")
    device = f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu
    versions = {name: installed(name) for name in PACKAGES}
    return {"device": device, "cores": len(os.sched_getaffinity(0)), "versions": versions}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def summary(record: dict[str, Any]) -> str:
    accuracy = ", ".join(f"{name} {value:.1%}" for name, value in record["accuracy"].items())
    steps = f"{record['steps']:,} of {record['planned_steps']:,} steps in {record['seconds']:.0f} s"
    return f"{record['name']}, seed {record['seed']}: {accuracy}; {steps}"


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Write the record in one go: a process that is killed leaves no part of it."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(file)


def write_report(output: Path) -> None:
    """Make the report of all records. Where Matplotlib is not installed, it is made later, by the same command."""
    if not is_installed("matplotlib"):
        return
    from benchmarks.speedrun.report import draw, report

    if records := [json.loads(file.read_text()) for file in sorted(output.glob("*/*-seed*.json"))]:
        (output / "report.md").write_text(report(records))
        draw(records, output / "speedrun.png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run in progress ends, too
    sys.exit(main())
