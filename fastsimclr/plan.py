"""Predict the step time, memory and epoch time of a run on several GPUs or ranks, from a short run on one device:

    python -m fastsimclr.train --data.train photos/ --batch_size 256 --max_steps 50 --knn_every 0 --output runs/short
    python -m fastsimclr.plan runs/short --ranks 1,2,4,8 --bandwidth 100

docs/scaling.md explains the model and compares it with measurements. Exit codes are those of fastsimclr.train.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from fastsimclr.cli import Parser, exit_code
from fastsimclr.ranges import Count, NonNegative, Positive, number
from fastsimclr.stopping import run_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("plan", lambda: print(run(_options(arguments))))


def run(options: argparse.Namespace) -> str:
    """Return the plan to print."""
    from fastsimclr.reporting.plan import make_plan  # imports torch: not for --help
    from fastsimclr.reporting.scaling import Cluster

    plan = make_plan(
        options.runs,
        Cluster(options.bandwidth, options.latency_us, options.cores),
        options.ranks,
        batch_size=options.batch_size,
        local_batch_size=options.local_batch_size,
        images=options.images,
    )
    return json.dumps(asdict(plan), indent=2) if options.json else plan.describe()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m fastsimclr.plan", description=(__doc__ or "").split(":")[0], allow_abbrev=False)
    count = number(Count)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a short run on one device; two of different batch sizes predict better"
    )
    parser.add_argument(
        "--ranks", type=_ranks, default=(1, 2, 4, 8), metavar="N,N", help="numbers of ranks; default: 1,2,4,8"
    )
    parser.add_argument(
        "--bandwidth",
        type=number(Positive),
        required=True,
        metavar="GB/S",
        help="of the slowest link between two ranks, in one direction, in 10^9 bytes per second",
    )
    parser.add_argument(
        "--latency_us",
        type=number(NonNegative),
        default=0.0,
        metavar="US",
        help="time that a collective of 1 KiB adds to a step, in microseconds; default: 0",
    )
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch_size", type=count, metavar="N", help="images per step over all ranks")
    batch.add_argument(
        "--local_batch_size", type=count, metavar="N", help="images per step and rank; default: of the larger run"
    )
    parser.add_argument("--images", type=count, metavar="N", help="images per epoch; default: of the runs")
    parser.add_argument("--cores", type=count, metavar="N", help="CPU cores that all ranks share; default: unlimited")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(int(number(Count)(each)) for each in text.split(","))


if __name__ == "__main__":
    run_process(main)
