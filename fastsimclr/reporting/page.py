"""The page: one HTML file that needs nothing else, of one run or of several compared."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import jinja2
from markupsafe import Markup

from fastsimclr.reporting import figures, numbers, pieces, results, settings
from fastsimclr.reporting.charts import COLORS, DASHES, stage_colors
from fastsimclr.reporting.pictures import Picture, embedded
from fastsimclr.reporting.pieces import Missing
from fastsimclr.reporting.run_record import Run
from fastsimclr.version import __version__

GENERATOR = "fastsimclr.report"


@dataclass(frozen=True)
class Entry:
    """A run of the report. place: among those compared, from 0."""

    run: Run
    place: int
    missing: dict[str, Missing] = field(default_factory=dict)
    """The missing pieces, by their files."""

    def picture(self, file: str) -> Picture | str | None:
        """A picture of the run's folder; why it can't be shown; or None if the folder has none."""
        path = self.run.folder / file
        try:
            return embedded(path) if path.is_file() else None
        except (OSError, ValueError) as error:
            return f"{file} could not be read ({error})."


def page(entries: Sequence[Entry], made: str) -> str:
    """The whole page. made: when, and by what command."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
    )
    runs = [entry.run for entry in entries]
    stages = [run.shares() for run in runs]
    script = _resource("page.js")
    return environment.from_string(_resource("page.html")).render(
        entries=entries,
        runs=runs,
        several=len(runs) > 1,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        made=f"fastsimclr {__version__}, {made}",
        generator=f"{GENERATOR} {__version__}",
        css=Markup(_resource("page.css")),
        script=Markup(script),
        # The page may run no script but its own, whatever a run's files hold.
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=figures.curves(runs),
        stages=stages,
        stage_names=list(dict.fromkeys(name for each in stages for name in each)),
        stage_colors=stage_colors,
        environments=[settings.environment(run) for run in runs],
        dashes=DASHES,
        colors=len(COLORS),
        figures=figures,
        numbers=numbers,
        pieces=pieces,
        results=results,
        settings=settings,
    )


def _resource(name: str) -> str:
    return (files("fastsimclr.reporting") / name).read_text(encoding="utf-8")
