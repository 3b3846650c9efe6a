"""Peak memory of a training step against the batch size: whole batches, micro-batches, and checkpointed stages.

    python -m benchmarks.step_memory --json benchmarks/results/step_memory-cpu.json --chart docs/images/step_memory.png

Each measurement is of two steps in a process of their own on the CPU: the largest resident memory, beyond that before
the first step. It includes the views, the gradients and the optimizer's momentum, but not the model.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_contenders import simclr
from fastsimclr.environment import commit
from fastsimclr.loss import NTXentLoss
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.memory import watch_peak
from fastsimclr.optim import build_optimizer
from fastsimclr.precision import choose_precision
from fastsimclr.training.step import Step

MICRO = 32
MODES = {
    "whole batch": {},
    "checkpoint_stages": {"checkpoint_stages": True},
    f"micro_batch_size {MICRO}": {"micro_batch_size": MICRO},
    f"micro_batch_size {MICRO}, checkpoint_stages": {"micro_batch_size": MICRO, "checkpoint_stages": True},
}
ENCODER, IMAGE_SIZE, PRECISION = "resnet50", 64, "fp32"
BATCH_SIZES = (16, 32, 64, 128, 256)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--chart", type=Path, help="PNG file to draw the chart to")
    parser.add_argument("--step", nargs=2, metavar=("MODE", "BATCH_SIZE"), help="print the peak of one step, in MiB")
    options = parser.parse_args()
    if options.step is not None:
        print(measure(options.step[0], int(options.step[1])))
        return
    peaks: dict[str, list[float]] = {mode: [] for mode in MODES}
    for batch_size in BATCH_SIZES:
        for mode, measured in peaks.items():
            command = [sys.executable, "-m", "benchmarks.step_memory", "--step", mode, str(batch_size)]
            measured.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"{mode}, {batch_size} images: {measured[-1]:.0f} MiB", flush=True)
    record = {
        "what": f"peak memory of a training step of {ENCODER}, two views of {IMAGE_SIZE}x{IMAGE_SIZE} per image, MiB",
        "precision": PRECISION,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "batch_sizes": BATCH_SIZES,
        "peak_mib": peaks,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    draw(record, options.chart)


def measure(mode: str, batch_size: int) -> float:
    """Return the peak of a step in this process, in MiB."""
    keep_freed_memory()  # as in training
    model = simclr(ENCODER, "imagenet", IMAGE_SIZE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.encoder.set_grad_checkpointing(MODES[mode].get("checkpoint_stages", False))  # type: ignore[operator]
    precision = choose_precision(PRECISION, CPU)
    step = Step(
        model,
        NTXentLoss(),
        precision,
        MODES[mode].get("micro_batch_size"),
        precision.grad_scaler(CPU),
        recomputes=MODES[mode].get("checkpoint_stages", False),
    )
    optimizer = build_optimizer("lars", model.parameters(), 0.1, 0.9, 1e-6)

    peak = watch_peak(CPU)
    for _ in range(2):
        views = [torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE) for _ in range(2)]
        step.backward(views, batch_size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak() / 2**20


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = ("#D55E00", "#E69F00", "#0072B2", "#56B4E9")  # the Okabe-Ito palette, as in charts.py
    for (mode, peaks), color in zip(record["peak_mib"].items(), colors, strict=True):
        axes.plot(record["batch_sizes"], [peak / 1024 for peak in peaks], marker="o", color=color, label=mode)
    axes.set_xlabel("batch size (images)")
    axes.set_ylabel("peak memory of a step (GiB)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xticks(record["batch_sizes"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"{ENCODER}, two views of {IMAGE_SIZE}x{IMAGE_SIZE}, {record['precision']}, CPU", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    main()
