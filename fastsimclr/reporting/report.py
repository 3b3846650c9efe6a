"""Gathers what a report shows, and writes its page."""

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastsimclr.config import Config
from fastsimclr.errors import UserError
from fastsimclr.reporting.page import GENERATOR, Entry, page
from fastsimclr.reporting.pieces import gather
from fastsimclr.reporting.run_record import Run, read_run, with_evaluations
from fastsimclr.run_folder import check_new, write_whole


def write_report(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Write the page that the options of fastsimclr.report ask for; returns the summary line to print."""
    folders = [Path(folder) for folder in options.runs]
    output = _output(options, folders)
    runs = _told_apart([read_run(folder) for folder in folders])
    entries = []
    for place, each in enumerate(runs):
        missing = gather(each.folder, each.config.get("knn_k", str(Config.knn_k)), make=not options.only_collect)
        entries.append(Entry(with_evaluations(each), place, missing))
    made = f"{time.strftime('%Y-%m-%d %H:%M')}, by python -m fastsimclr.report {shlex.join(arguments)}"
    text = page(entries, made)
    # A file's name may be no text.
    write_whole(output, lambda file: file.write_text(text, encoding="utf-8", errors="replace"))
    left_out = [missing.what for entry in entries for missing in entry.missing.values()]
    without = f"; without {', '.join(dict.fromkeys(left_out))}: the page says why" if left_out else ""
    return f"{output}: {output.stat().st_size / 2**20:.1f} MiB, {', '.join(run.name for run in runs)}{without}"


def _output(options: argparse.Namespace, folders: Sequence[Path]) -> Path:
    """Where the page goes. Raises UserError if it must not go there."""
    if options.output is None and len(folders) > 1:
        raise UserError(f"--output: got none, expected a file name for a report of {len(folders)} runs")
    own = folders[0] / "report.html"
    output = Path(options.output) if options.output is not None else own
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output: got {output}, expected a file name that ends in .html")
    refreshed = len(folders) == 1 and output.resolve() == own.resolve() and _is_ours(own)
    check_new(output, options.force or refreshed)
    return output


def _is_ours(file: Path) -> bool:
    """Whether an earlier call has written it."""
    try:
        with open(file, "rb") as page:
            return f'<meta name="generator" content="{GENERATOR} '.encode() in page.read(1000)
    except OSError:
        return False


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs by names that differ: of their folders as many last parts as that takes."""
    paths = [run.folder.resolve() for run in runs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UserError(f"RUN_DIR: got {runs[place].folder} twice, expected each run once")
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
