"""The page: one HTML file that needs nothing else, of one run or of several compared."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from fastsimclr.reporting import results
from fastsimclr.reporting.charts import swatch
from fastsimclr.reporting.figures import curves, stages, summary_table, tiles
from fastsimclr.reporting.markup import Child, Html, element, join
from fastsimclr.reporting.numbers import count
from fastsimclr.reporting.pictures import embedded
from fastsimclr.reporting.pieces import EMBEDDING, KNN, VIEWS, Missing
from fastsimclr.reporting.run_record import Run
from fastsimclr.reporting.settings import configuration, differences, environment
from fastsimclr.version import __version__

GENERATOR = "fastsimclr.report"


@dataclass(frozen=True)
class Entry:
    """A run of the report. place: among those compared, from 0."""

    run: Run
    place: int
    missing: dict[str, Missing] = field(default_factory=dict)
    """By their files, the pieces that are not there."""


def page(entries: Sequence[Entry], made: str) -> str:
    """The whole page. made: when, and by what command."""
    runs = [entry.run for entry in entries]
    one = len(runs) == 1
    sections: list[tuple[str, str, Child]] = [
        ("curves", "Curves", curves(runs)),
        ("time", "Where a step’s time goes", None if one else stages(runs)),
        ("evaluation", "Evaluation", _evaluation(entries)),
        ("embedding", "Embedding", _embedding(entries)),
        ("views", "Views", _views(entries)),
        ("configuration", "Configuration", configuration(runs)),
        ("environment", "Environment", environment(runs)),
    ]
    if not one:
        sections.insert(0, ("differences", "What differs", differences(runs)))
    title = runs[0].name if one else f"{len(runs)} runs compared"
    body = element(
        "body",
        element(
            "header",
            element("p", "SimCLR pre-training", class_="eyebrow"),
            element("h1", title),
            _subtitle(runs[0]) if one else None,
            element("nav", [element("a", name, href=f"#{key}") for key, name, content in sections if content],
                    aria_label="Sections"),
        ),
        element("main",
            tiles(runs[0]) if one else summary_table(runs),
            [_quiet(f"{run.name}: {complaint}.") for run in runs for complaint in run.complaints],
            [element("section", element("h2", name), content, id=key) for key, name, content in sections if content],
        ),
        element("footer", f"fastsimclr {__version__}, {made}"),
        _script(),
    )  # fmt: skip
    return "<!doctype html>\n" + element("html", _head(title), body, lang="en") + "\n"


def _head(title: str) -> Html:
    # The page asks nobody for anything, and runs no script but its own, whatever a run's files hold.
    digest = base64.b64encode(hashlib.sha256(_resource("page.js").encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=f"{GENERATOR} {__version__}"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} · fastsimclr"),
        element("link", rel="icon", href="data:,"),
        element("style", Html(_resource("page.css"))),
    )


def _script() -> Html:
    return element("script", Html(_resource("page.js")))


def _resource(name: str) -> str:
    return (files("fastsimclr.reporting") / name).read_text(encoding="utf-8")


def _subtitle(run: Run) -> Html:
    config = run.config
    about = [config.get("data.train"), config.get("model.encoder")]
    about += [f"batch {config['batch_size']}"] if "batch_size" in config else []
    about += [f"temperature {config['loss.temperature']}"] if "loss.temperature" in config else []
    about += [f"commit {run.environment['commit']}"] if run.environment.get("commit") else []
    return element(
        "p",
        " · ".join(each for each in about if each),
        element("br"),
        element("code", str(run.folder)),
        class_="soft",
    )


def _quiet(*said: Child) -> Html:
    return element("p", said, class_="quiet")


def _absent(entry: Entry, file: str, several: bool) -> Html | None:
    """A sentence on a piece that is not there."""
    if file not in entry.missing:
        return None
    missing = entry.missing[file]
    of = f" of {entry.run.name}" if several else ""
    return _quiet(f"No {missing.what}{of}: {missing.why.rstrip('.')}. To make it: ", element("code", missing.command))


def _evaluation(entries: Sequence[Entry]) -> Html | None:
    several = len(entries) > 1
    rows = [(_named(entry), evaluation) for entry in entries for evaluation in entry.run.evaluations]
    parts: list[Child] = []
    if rows:
        parts.append(results.accuracies(rows, "run" if several else None))
    for entry in entries:
        for place, evaluation in enumerate(entry.run.evaluations):
            title = f"{entry.run.name}: {evaluation.name}" if several else evaluation.name
            parts.append(results.details(evaluation, title, opened=not several and place == 0))
        parts.append(_absent(entry, KNN.file, several))
    return join(parts) or None


def _embedding(entries: Sequence[Entry]) -> Html | None:
    several = len(entries) > 1
    maps: list[Child] = []
    others: list[Child] = []
    for entry in entries:
        name = entry.run.name
        drawn = _picture(entry, EMBEDDING.file, f"Map of the embedding by {name}")
        gallery = _picture(entry, "embed/gallery.png", f"Some images and their nearest neighbours by {name}", "tall")
        if drawn and several:
            drawn = element("figure", element("figcaption", _named(entry)), drawn)
        if gallery and several:
            gallery = element("details", element("summary", "Nearest neighbours: ", _named(entry)), gallery)
        maps.append(drawn)
        others += [gallery, _absent(entry, EMBEDDING.file, several)]
    return join([element("div", maps, class_="pair") if several and any(maps) else maps, others]) or None


def _views(entries: Sequence[Entry]) -> Html | None:
    several = len(entries) > 1
    parts: list[Child] = []
    for entry in entries:
        sheet = _picture(entry, VIEWS.file, f"Images and the views of them that {entry.run.name} trains on", "tall")
        if sheet and several:
            parts.append(element("details", element("summary", _named(entry)), sheet))
        else:
            parts.append(sheet)
        parts.append(_absent(entry, VIEWS.file, several))
        parts.append(_skipped(entry, several))
    return join(parts) or None


def _picture(entry: Entry, file: str, alt: str, class_: str = "") -> Html | None:
    path = entry.run.folder / file
    if not path.is_file():
        return None
    try:
        picture = embedded(path)
    except (OSError, ValueError) as error:
        return _quiet(f"{file} could not be read ({error}).")
    image = element("img", src=picture.uri, width=picture.width, height=picture.height, alt=alt)
    return element("div", image, class_=f"scroll sheet {class_}", tabindex=0, role="region", aria_label=alt)


def _skipped(entry: Entry, several: bool) -> Html | None:
    skipped = entry.run.skipped_images
    if skipped is None:
        return None
    of = f"{entry.run.name}: " if several else ""
    if skipped == 0:
        return _quiet(f"{of}Every image file could be decoded.")
    many, names = (count(skipped, "image file"), "it" if skipped == 1 else "them")
    return _quiet(f"{of}{many} left out, as unusable: skipped_images.txt in the run’s folder names {names}.")


def _named(entry: Entry) -> Html:
    """A run's name with its line."""
    return element("span", swatch(entry.place), " ", entry.run.name, class_="run")
