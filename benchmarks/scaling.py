"""Compare what `fastsimclr plan` predicts with runs of 1, 2, 4 and 8 gloo ranks on the cores of this machine.

    python -m benchmarks.scaling --json benchmarks/results/scaling-cpu.json

In each round, two runs of one process predict the others, which follow: with 64 images per rank ("weak"), with 64
images over all ranks ("strong"), and weak with synchronized batch normalization. Each rank has one thread. The ranks
are pinned to the cores in turn; above the number of cores they share them, which is what `--cores` is for. Bandwidth
and latency, the other inputs, are those of gloo's all-reduce between two ranks on two cores, measured in each round.
The model is ResNet-10 of half the width with the imagenet stem, trained by Muon on two views of random images of 32x32.

A run during which other processes took over a tenth of the machine's time is repeated, up to --tries times. The last
try counts, and the record has the share that they took.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import fastsimclr.training.pretrain  # noqa: F401 # before the ranks are forked
from fastsimclr import train
from fastsimclr.environment import commit
from fastsimclr.metrics_file import read_records
from fastsimclr.reporting.plan import WARM_UP_STEPS, make_plan
from fastsimclr.reporting.scaling import Cluster, Prediction
from fastsimclr.run_folder import RunFolder

CORES = sorted(os.sched_getaffinity(0))
RANKS, IMAGES, BATCH = (1, 2, 4, 8), 8192, 64
RECIPE = (
    *("--config=cifar10_fast", "--model.stem=imagenet", "--model.weights=none", "--model.freeze=none"),
    *("--data.num_views=2", "--loss.hardness=0", "--optim.lr=0.01"),
)
MAX_OTHERS = 0.1
ALL_REDUCE_BYTES = 25 * 2**20  # a bucket of DistributedDataParallel
SMALL_BYTES = 1024  # the statistics of a batch normalization
WARM_UP, REPEATS, EXCHANGES = 1, 7, 10


@dataclass(frozen=True)
class Mode:
    """How the batch size depends on the number of ranks."""

    measured: tuple[int, int]
    """Batch sizes of the runs that predict."""
    per_rank: bool
    """Whether there are BATCH images per rank, or over all."""
    sync_bn: str


MODES = {
    "weak": Mode((64, 256), True, "false"),
    "strong": Mode((8, 64), False, "false"),
    "weak, sync_bn": Mode((64, 256), True, "true"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to, after each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        rounds.append(run_round(options))
        summary = [summarize(rounds, mode, ranks) for mode in options.modes for ranks in options.ranks]
        if options.json:
            record = {
                "what": "step times by fastsimclr plan and of gloo ranks; ResNet-10 x0.5, 32x32",
                "cpu": f"{cpu_name()}, {len(CORES)} cores",
                "torch": torch.__version__,
                "commit": commit(),
                "steps": options.steps,
                "summary": summary,
                "rounds": rounds,
            }
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(*summary, sep="\n")


def run_round(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the link and the runs of one process, predict the other runs and measure them."""
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_ranks(2, measure_link, folder / "link.json")
        bandwidth, latency_us = json.loads((folder / "link.json").read_text())
        cluster = Cluster(bandwidth, latency_us, len(CORES))
        print(cluster, flush=True)
        np.save(folder / "images", np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8))
        for mode_name in options.modes:
            mode = MODES[mode_name]
            single = []
            for batch_size in mode.measured:
                run, others = train_undisturbed(1, batch_size, mode, folder, options)
                single.append(str(run))
                print(f"{mode_name}: one process, {batch_size} images; others took {others:.0%}", flush=True)
            for ranks in options.ranks:
                batch_size = BATCH * ranks if mode.per_rank else BATCH
                run, others = train_undisturbed(ranks, batch_size, mode, folder, options)
                prediction = make_plan(single, cluster, [ranks], batch_size=batch_size).predictions[0]
                runs.append({"mode": mode_name, "ranks": ranks, "others": round(others, 3)})
                runs[-1] |= compare(prediction, run)
                print(json.dumps(runs[-1]), flush=True)
    return {"bandwidth": bandwidth, "latency_us": latency_us, "runs": runs}


def train_undisturbed(
    ranks: int, batch_size: int, mode: Mode, folder: Path, options: argparse.Namespace
) -> tuple[RunFolder, float]:
    """Train, again if other processes disturb. Returns the run and the share of the machine's time that they took."""
    for _ in range(options.tries):
        run = tempfile.mkdtemp(dir=folder)
        words = [*RECIPE, "--device=cpu", "--log=none", "--checkpoint_every=1000", f"--output={run}"]
        words += [f"--data.train={folder / 'images.npy'}", f"--batch_size={batch_size}"]
        words += [f"--max_steps={options.steps}", f"--model.sync_bn={mode.sync_bn}"]
        busy, own = cpu_seconds()
        started = time.perf_counter()
        run_ranks(ranks, train_rank, words)
        busy_after, own_after = cpu_seconds()
        others = (busy_after - busy - (own_after - own)) / (time.perf_counter() - started) / len(CORES)
        if others < MAX_OTHERS:
            break
    return RunFolder(run), others


def train_rank(words: list[str]) -> None:
    with open(os.devnull, "w") as null:
        sys.stdout = null
        if train.main(words) != 0:
            raise RuntimeError(f"fastsimclr train {' '.join(words)} failed")


def cpu_seconds() -> tuple[float, float]:
    """Return the busy seconds of all cores, and those of this process's children that have ended."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    times = os.times()
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy, times.children_user + times.children_system


def compare(predicted: Prediction, run: RunFolder) -> dict[str, Any]:
    """Return the predicted step, and what rank zero of the run has measured."""
    records = list(read_records(run.metrics))
    steps = [record for record in records if record.get("images") == predicted.batch_size][WARM_UP_STEPS:]
    step_ms = [record["step_ms"] for record in steps]
    names = dict.fromkeys(name for record in steps for name in record["stages_ms"])
    stages = {name: statistics.median(record["stages_ms"].get(name, 0.0) for record in steps) for name in names}
    return {
        "predicted_ms": round(predicted.step_ms, 2),
        "measured_ms": round(statistics.median(step_ms), 2),
        "measured_quartiles_ms": [round(float(each), 2) for each in np.quantile(step_ms, (0.25, 0.75))],
        "predicted_parts_ms": {name: round(ms, 2) for name, ms in predicted.parts_ms.items()},
        "measured_stages_ms": {name: round(ms, 2) for name, ms in stages.items()},
        "predicted_mib": round(predicted.memory_mib or 0.0),
        "measured_mib": round(max(record["peak_mib"] for record in records if record.get("peak_mib"))),
    }


def summarize(rounds: Sequence[dict[str, Any]], mode: str, ranks: int) -> dict[str, Any]:
    """Return the medians over the rounds."""
    runs = [run for each in rounds for run in each["runs"] if (run["mode"], run["ranks"]) == (mode, ranks)]
    errors = [round(run["predicted_ms"] / run["measured_ms"] - 1, 3) for run in runs]
    columns = ("predicted_ms", "measured_ms", "predicted_mib", "measured_mib")
    medians = {column: statistics.median(run[column] for run in runs) for column in columns}
    return {"mode": mode, "ranks": ranks, **medians, "error": statistics.median(errors), "errors": errors}


def run_ranks(ranks: int, function: Callable[..., None], *args: Any) -> None:
    """Call function(*args) on this many ranks, as under torchrun, but forked from this process and pinned to a core."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, ranks, port, function, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode != 0 for process in processes):
        raise RuntimeError(f"exit codes of the ranks: {[process.exitcode for process in processes]}")


def _rank(rank: int, ranks: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.sched_setaffinity(0, {CORES[rank % len(CORES)]})
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in variables.items()})
    function(*args)


def measure_link(file: Path) -> None:
    """Write the bandwidth of an all-reduce between the ranks in GB/s, and the time of a small one in microseconds.

    As in a training step, the ranks compute between the exchanges, and no barrier precedes one: gloo's small all-reduce
    takes 1.4 ms that way, and 0.2 ms after a barrier.
    """
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    matrix = torch.rand(256, 256)

    def seconds(size: int) -> float:
        tensor, times = torch.zeros(size // 4), []
        for _ in range(WARM_UP + REPEATS):
            started = time.perf_counter()
            for _ in range(EXCHANGES):
                matrix @ matrix
                if size:
                    dist.all_reduce(tensor)
            times.append((time.perf_counter() - started) / EXCHANGES)
        return statistics.median(times[WARM_UP:])

    alone, small, large = seconds(0), seconds(SMALL_BYTES), seconds(ALL_REDUCE_BYTES)
    dist.destroy_process_group()
    if rank == 0:
        bandwidth = 2 * (ranks - 1) / ranks * ALL_REDUCE_BYTES / (large - small) / 1e9
        file.write_text(json.dumps([bandwidth, 1e6 * (small - alone)]))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
