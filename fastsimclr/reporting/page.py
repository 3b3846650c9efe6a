"""The page: one HTML file that needs nothing else, of one run or of several compared."""

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
WIDEST = 1600  # pixels of a picture
TALLEST = 16383  # of a WebP


def page(runs: Sequence[Run], made: str) -> str:
    """The whole page. made: when, and by what command."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
    )
    stages = [run.shares() for run in runs]
    script = _resource("page.js")
    return environment.from_string(_resource("page.html")).render(
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
        facts=[figures.facts(run) for run in runs],
        numbers=numbers,
        picture=_picture,
        results=results,
        settings=settings,
        skipped_file=SKIPPED_FILE,
    )


def _picture(file: Path) -> tuple[str, int, int] | str | None:
    """The picture in `file` as a data: URI, its width and height; why it can't be shown; or None if it is missing."""
    if not file.is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a sheet of a hundred images is that large
            image = Image.open(file).convert("RGB")
    except (OSError, ValueError) as error:
        return f"{file.name} could not be read ({error})."
    image.thumbnail((WIDEST, image.height))
    kind = "webp" if image.height <= TALLEST else "jpeg"
    packed = io.BytesIO()
    image.save(packed, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(packed.getvalue()).decode()}", *image.size


def _resource(name: str) -> str:
    return (files("fastsimclr.reporting") / name).read_text(encoding="utf-8")
