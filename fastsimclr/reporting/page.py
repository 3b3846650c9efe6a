"""Render the report: one self-contained HTML page of one run, or of several compared."""

import base64
import hashlib
import io
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from fastsimclr.data.scan import SKIPPED_FILE
from fastsimclr.reporting import figures, numbers, results, settings
from fastsimclr.reporting.charts import COLORS, DASHES, stage_colors
from fastsimclr.reporting.run_record import Run
from fastsimclr.version import __version__

GENERATOR = "fastsimclr.report"
MAX_WIDTH = 1600  # pixels of an embedded picture
MAX_WEBP_HEIGHT = 16383  # pixels, a limit of the format


def page(runs: Sequence[Run], made: str) -> str:
    """Render the page. made: when and by which command, for the footer."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
    )
    stages = [run.shares() for run in runs]
    evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    script = _resource("page.js")
    return environment.from_string(_resource("page.html")).render(
        runs=runs,
        several=len(runs) > 1,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        made=f"fastsimclr {__version__}, {made}",
        generator=f"{GENERATOR} {__version__}",
        css=Markup(_resource("page.css")),
        script=Markup(script),
        # The content security policy allows only this script, whatever a run's files contain.
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=figures.curves(runs),
        stages=stages,
        stage_names=list(dict.fromkeys(name for each in stages for name in each)),
        stage_colors=stage_colors,
        environments=[settings.environment(run) for run in runs],
        dashes=DASHES,
        colors=len(COLORS),
        facts=[figures.facts(run) for run in runs],
        has_top5=any(evaluation.top5 is not None for evaluation in evaluations),
        numbers=numbers,
        picture=_picture,
        results=results,
        settings=settings,
        skipped_file=SKIPPED_FILE,
    )


def _picture(file: Path) -> tuple[str, int, int] | str | None:
    """Return the picture as (data: URI, width, height), the reason if it cannot be read, or None if it is missing."""
    if not file.is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a contact sheet may be that large
            image = Image.open(file).convert("RGB")
    except (OSError, ValueError) as error:
        return f"{file.name} could not be read ({error})."
    image.thumbnail((MAX_WIDTH, image.height))
    kind = "webp" if image.height <= MAX_WEBP_HEIGHT else "jpeg"
    packed = io.BytesIO()
    image.save(packed, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(packed.getvalue()).decode()}", *image.size


def _resource(name: str) -> str:
    return (files("fastsimclr.reporting") / name).read_text(encoding="utf-8")
