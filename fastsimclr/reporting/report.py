"""Read the runs of a report, run other commands for missing parts, and write the page."""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fastsimclr.config import Config
from fastsimclr.errors import UserError
from fastsimclr.reporting.page import GENERATOR, page
from fastsimclr.reporting.run_record import Missing, Run, read_evaluations, read_run
from fastsimclr.run_folder import RunFolder, check_output, write_atomically


class Part(NamedTuple):
    """A part of the page that another command makes. command: the arguments of `fastsimclr`."""

    what: str
    file: Path
    command: list[str]


def parts(run: RunFolder, knn_k: str) -> list[Part]:
    """List the parts of a run. knn_k: the number of neighbors of the run's own kNN curve."""
    checkpoint = ["--checkpoint", str(run.checkpoint)]
    preview = ["preview", "--config", str(run.config), "--output", str(run.preview)]
    return [
        Part("contact sheet of the views", run.preview, preview),
        Part("map of the embedding", run.map, ["embed", *checkpoint, "--images", "2000"]),
        Part("kNN evaluation", run.knn, ["evaluate", "knn", "--k", knn_k, *checkpoint]),
    ]


def write_report(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Write the page for the options of fastsimclr.report, and return the summary line to print."""
    folders = [RunFolder(folder) for folder in options.runs]
    runs = []
    for index, (folder, name) in enumerate(zip(folders, _names(folders), strict=True)):
        runs.append(replace(read_run(folder), name=name, index=index))
    output = _output(options, folders)  # before the missing parts are made, which takes long
    runs = [read_evaluations(replace(run, missing=_make_missing(run, make=not options.only_collect))) for run in runs]
    text = page(runs, f"{time.strftime('%Y-%m-%d %H:%M')}, by python -m fastsimclr.report {shlex.join(arguments)}")
    # A file name may hold bytes that are not text.
    write_atomically(output, lambda file: file.write_text(text, encoding="utf-8", errors="replace"))
    left_out = dict.fromkeys(missing.what for run in runs for missing in run.missing)
    without = f"; without {', '.join(left_out)} (the page gives the reasons)" if left_out else ""
    return f"{output}: {output.stat().st_size / 2**20:.1f} MiB, {', '.join(run.name for run in runs)}{without}"


def _output(options: argparse.Namespace, folders: Sequence[RunFolder]) -> Path:
    """The output file. Raises UserError if it is invalid, or would be overwritten without --force."""
    if options.output is None and len(folders) > 1:
        raise UserError(f"--output: got none, expected a file name for a report of {len(folders)} runs")
    own = folders[0].report
    output = Path(options.output) if options.output is not None else own
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output: got {output}, expected a file name that ends in .html")
    refreshed = len(folders) == 1 and output.resolve() == own.resolve() and _is_report(own)
    check_output(output, options.force or refreshed)
    return output


def _is_report(file: Path) -> bool:
    """Whether fastsimclr.report wrote this file."""
    return file.is_file() and f'<meta name="generator" content="{GENERATOR} '.encode() in file.read_bytes()[:1000]


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """Unique names of the runs: the last components of their paths, as many as necessary."""
    paths = [folder.path.resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise UserError(f"RUN_DIR: got {folders[index]} twice, expected each run once")
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _make_missing(run: Run, make: bool) -> list[Missing]:
    """Run the commands for the parts that a run lacks, if `make`; returns the parts that are still missing."""
    missing = []
    for what, file, command in parts(run.folder, run.config.get("knn_k", str(Config.knn_k))):
        if file.exists():
            continue
        line = f"python -m fastsimclr.{shlex.join(command)}"
        checkpoint = run.folder.checkpoint
        if str(checkpoint) in command and not checkpoint.exists():
            why = f"there is no {checkpoint.relative_to(run.folder.path)}"
        elif not make:
            why = "not made yet"
        else:
            print(f"fastsimclr.report: {line}", file=sys.stderr, flush=True)
            why = _run(command)
        if not file.exists():
            missing.append(Missing(what, file, why or f"{file} was not written", line))
    return missing


def _run(command: list[str]) -> str:
    """Run a fastsimclr command; returns the reason if it failed, else ""."""
    done = subprocess.run(
        [sys.executable, "-m", f"fastsimclr.{command[0]}", *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
    why = lines[-1].removeprefix(f"fastsimclr.{command[0]}: error: ")
    print(f"fastsimclr.report: skipped: {why}", file=sys.stderr, flush=True)
    return why
