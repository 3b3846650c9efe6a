"""Hardware counters of the loss's forward and backward kernels, read by Nsight Compute.

    python -m benchmarks.kernel_counters --json counters.json [--sizes 8192x128,32768x128,16384x256]

Needs `ncu` and the permission to read counters. The clocks stay as they are, so times vary as usual. Each kernel runs
once per size and precision, after a call that is not profiled.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SIZES = "8192x128,32768x128,16384x256"  # views x width
PRECISIONS = ("medium", "highest")
KERNELS = ("forward", "backward")  # in the order of their launches
METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "tensor_pipe_active_percent": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "tensor_instructions_percent": "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "shared_wavefronts_percent": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_active",
    "shared_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "issue_active_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
}


def parse_sizes(text: str) -> list[tuple[int, int]]:
    return [(int(views), int(width)) for views, width in (size.split("x") for size in text.split(","))]


def launch(sizes: Sequence[tuple[int, int]]) -> None:
    """Run every kernel once between cudaProfilerStart and cudaProfilerStop, in a process that ncu watches."""
    import torch

    from fastsimclr.loss import nt_xent

    for views, width in sizes:
        z1, z2 = (torch.randn(views // 2, width, device="cuda", requires_grad=True) for _ in range(2))
        for precision in PRECISIONS:
            torch.autograd.grad(nt_xent(z1, z2, 0.1, backend="fused", precision=precision), (z1, z2))
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.autograd.grad(nt_xent(z1, z2, 0.1, backend="fused", precision=precision), (z1, z2))
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def known_metrics(ncu: str) -> dict[str, str]:
    """Those of METRICS that this ncu has for this GPU: it refuses the whole run for one unknown name."""
    listed = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True)
    names = {line.split()[0] for line in listed.stdout.splitlines() if line.strip()}
    known = {name: metric for name, metric in METRICS.items() if metric.partition(".")[0] in names}
    return known or METRICS


def read_rows(log: str, metrics: dict[str, str]) -> list[dict[str, float | str | None]]:
    """One dict per profiled kernel, from the lines of ncu's output that are CSV: a header, the units, the kernels."""

    def number(text: str | None) -> float | None:
        try:
            return float((text or "").replace(",", ""))
        except ValueError:  # "n/a"
            return None

    rows = csv.DictReader(line for line in log.splitlines() if line.startswith('"'))
    return [
        {"kernel_name": row["Kernel Name"]} | {name: number(row.get(metric)) for name, metric in metrics.items()}
        for row in rows
        if row["ID"]  # the units have none
    ]


def assign(rows: Iterable[dict[str, Any]], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The rows with what they measured, known from the order of the launches."""
    rows = list(rows)
    cases = [
        {"views": views, "width": width, "precision": precision, "kernel": kernel}
        for views, width in sizes
        for precision in PRECISIONS
        for kernel in KERNELS
    ]
    matching = [case["kernel"] in row["kernel_name"] for case, row in zip(cases, rows, strict=False)]
    if len(rows) != len(cases) or not all(matching):
        raise SystemExit(f"got {[row['kernel_name'] for row in rows]}, expected the launches of {cases}")
    return [case | row for case, row in zip(cases, rows, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--json", type=Path, help="where to write the counters")
    parser.add_argument("--launch", action="store_true", help="only launch the kernels: what ncu watches")
    options = parser.parse_args(arguments)
    sizes = parse_sizes(options.sizes)
    if options.launch:
        return launch(sizes)
    if options.json is None:
        parser.error("expected --json FILE")
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("ncu is not in PATH: install Nsight Compute")
    metrics = known_metrics(ncu)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += ["--clock-control", "none", "--profile-from-start", "off"]
        command += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})_kernel", "--metrics", ",".join(metrics.values())]
        command += [sys.executable, "-m", "benchmarks.kernel_counters", "--launch", "--sizes", options.sizes]
        code = subprocess.run(command).returncode
        text = log.read_text() if log.exists() else ""
    rows = read_rows(text, metrics)
    if code or not rows:
        raise SystemExit(f"{text}\nncu failed with exit code {code}, after {len(rows)} kernels")
    result = {"metrics": metrics, "rows": assign(rows, sizes)}
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
