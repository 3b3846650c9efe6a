"""Measure how fast the preset cifar10_resnet18 learns: seconds per epoch, and kNN accuracy after 2, 10 and 30 minutes.

    python -m benchmarks.learning --cifar10 DIR --seconds 500 --json learning.json

DIR contains cifar-10-batches-py, or tar shards train-*.tar and test.tar. Each duration is a separate run, whose
schedule ends with it. Durations that do not fit into the remaining --seconds are skipped. Start-up, decoding and kNN
are not part of a run's minutes: allow 30 s for each run. First, a trial run of two epochs measures the seconds per
epoch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OVERHEAD_SECONDS = 30
TRIAL_EPOCHS = 2  # the first includes compilation and tuning


def data_options(folder: Path) -> list[str]:
    if (folder / "test.tar").is_file():
        return [f"--data.train={folder}/train-*.tar", f"--data.val={folder}/test.tar"]
    if (folder / "cifar-10-batches-py").is_dir():
        return [f"--data.train=cifar10:{folder}", f"--data.val=cifar10:{folder}"]
    raise SystemExit(f"--cifar10: got {folder}, expected a folder with cifar-10-batches-py or train-*.tar and test.tar")


def train(output: Path, *options: str) -> list[dict[str, Any]]:
    """Run fastsimclr.train and return the lines of its metrics."""
    command = [sys.executable, "-m", "fastsimclr.train", *options, f"--output={output}"]
    subprocess.run(command, check=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def seconds_per_epoch(metrics: list[dict[str, Any]]) -> float:
    """Return the seconds of the last epoch."""
    steps = [line for line in metrics if "step_ms" in line]
    last = max(line["epoch"] for line in steps)
    return sum(line["step_ms"] for line in steps if line["epoch"] == last) / 1000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--seconds", type=float, required=True, help="time limit of all runs together")
    parser.add_argument("--minutes", default="2,10,30", help="training times, one run each (default: %(default)s)")
    parser.add_argument("--config", default="cifar10_resnet18", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="file to write the results to")
    options, train_options = parser.parse_known_args(arguments)
    started = time.monotonic()
    common = [f"--config={options.config}", *data_options(options.cifar10), *train_options]
    record: dict[str, Any] = {"what": f"learning with the preset {options.config}", "options": common, "runs": []}

    def write_record() -> None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        metrics = train(Path(folder, "trial"), *common, f"--epochs={TRIAL_EPOCHS}", "--knn_every=0")
        record["environment"] = json.loads(Path(folder, "trial", "environment.json").read_text())
        record["seconds_per_epoch"] = epoch = seconds_per_epoch(metrics)
        write_record()
        print(f"{epoch:.2f} s per epoch", flush=True)
        for minutes in map(float, options.minutes.split(",")):
            left = options.seconds - (time.monotonic() - started)
            if left < 60 * minutes + OVERHEAD_SECONDS:
                print(f"{minutes:g} minutes: skipped, as only {left:.0f} s are left", flush=True)
                continue
            epochs = max(1, int(60 * minutes / epoch))
            # kNN accuracy only at the start and the end.
            knn_options = [f"--knn_every={epochs + 1}", "--knn_at_start"]
            metrics = train(Path(folder, f"{minutes:g}"), *common, f"--epochs={epochs}", *knn_options)
            knn = [line["knn_accuracy"] for line in metrics if "knn_accuracy" in line]
            run = {"minutes": minutes, "epochs": epochs, "knn_untrained": knn[0], "knn": knn[-1]}
            record["runs"].append(run | {"seconds_per_epoch": seconds_per_epoch(metrics)})
            write_record()
            print(f"{minutes:g} minutes, {epochs} epochs: kNN {knn[-1]:.1%} (untrained {knn[0]:.1%})", flush=True)


if __name__ == "__main__":
    main()
