"""python -m fastsimclr.report: one page of a run, or of several compared; it shows what is there, fetches nothing."""

import base64
import dataclasses
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from browser import PROGRAM, Browser, Page
from pictures import jpeg, photo, write
from PIL import Image

from fastsimclr import train
from fastsimclr.config import Config
from fastsimclr.progress_bar import duration
from fastsimclr.report import MAX_RUNS, main
from fastsimclr.reporting.charts import BOTTOM, COLORS, DASHES, TOP
from fastsimclr.reporting.curves import MOST, reduce
from fastsimclr.reporting.numbers import number
from fastsimclr.reporting.report import parts
from fastsimclr.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
EVIL = '<script>alert("x")</script>&\'"><img src=http://example.com/x onerror=alert(1)>'
VOID = {"br", "img", "link", "meta"}
FETCHED = ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background")
pytestmark = pytest.mark.usefixtures("one_thread")


# Folders as train, evaluate and embed leave them


def metrics(steps: int, *, per_epoch: int = 10, **changes: Any) -> list[dict[str, Any]]:
    """Lines of a run whose loss falls, with kNN accuracy before the first epoch and after each."""
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0, "knn_accuracy": 0.25}]
    for step in range(1, steps + 1):
        epoch = (step - 1) // per_epoch
        line = {"step": step, "epoch": epoch, "lr": 0.1 / step, "data_wait": 0.01, "images_per_second": 640.0}
        lines.append(line | {"step_ms": 100.0, "images": 64, "loss": 4 + 2 / step} | changes)
        if step % per_epoch == 0:
            knn, probe = 0.75 - 0.25 / (epoch + 1), 0.5 + 0.125 * epoch
            lines.append({"step": step, "epoch": epoch + 1, "knn_accuracy": knn, "probe_accuracy": probe})
    return lines


def run_folder(folder: Path, lines: list[dict[str, Any]] | None = None, **options: Any) -> Path:
    """A run with its least: configuration and metrics. options: dots as double underscores."""
    folder.mkdir(parents=True)
    config = dataclasses.asdict(Config(epochs=3, batch_size=64, output=str(folder)))
    for name, value in options.items():
        *groups, last = name.split("__")
        at = config
        for group in groups:
            at = at[group]
        at[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines or metrics(30)))
    return folder


def evaluation(classes: list[str], protocol: str = "knn", hits: int = 8) -> dict[str, Any]:
    """Ten images a class, of which `hits` are right and the others taken for the next class."""
    confusion = np.eye(len(classes), dtype=int) * hits + np.roll(np.eye(len(classes), dtype=int), 1, 1) * (10 - hits)
    return {
        "protocol": protocol,
        "origin": "fastsimclr run, step 30",
        "train": {"path": "photos", "images": 143, "of": 1430},
        "val": {"path": "val", "images": 10 * len(classes)},
        "classes": classes,
        "top1": hits / 10,
        "top5": 0.975,
        "per_class": dict.fromkeys(classes, hits / 10),
        "confusion": confusion.tolist(),
        "settings": {"k": 20},
    }


def add(folder: Path, files: dict[str, Any]) -> Path:
    """Files of a run: pixels as PNG, else JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, np.ndarray):
            Image.fromarray(content).save(folder / name)
        else:
            (folder / name).write_text(json.dumps(content))
    return folder


def full_folder(folder: Path, name: str = EVIL, **options: Any) -> Path:
    """A run with all that a report shows, and names that are no HTML."""
    stages = {"data_wait": 10.0, "forward": 30.0, "loss": 5.0, "backward": 45.0}
    run_folder(folder, [{"step": 0, "epoch": 0, "skipped_images": 3}, *metrics(30, stages_ms=stages)], **options)
    environment = {"device": "cuda", "world_size": 8, "gpus": [{"name": f"H100 {name}", "capability": "9.0"}] * 8}
    environment |= {"commit": "0123abcd", "started": "2026-01-02T03:04:05+00:00", "command": ["train.py", "--x", name]}
    classes = [name, "daisy", "rose", "tulip"]
    return add(
        folder,
        {
            "environment.json": environment,
            "preview.png": photo(900, 1700),
            "embed/map.png": photo(500, 800),
            "embed/gallery.png": photo(900, 700),
            "evaluate/knn.json": evaluation(classes),
            "evaluate/linear.json": evaluation(classes, "linear", 9),
        },
    )


# Reading a page


@dataclasses.dataclass
class Node:
    """An element: its children are elements and text."""

    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator["Node"]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child

    def all(self, tag: str, **attributes: str) -> list["Node"]:
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        found = [node for node in self if node.tag == tag]
        return [node for node in found if all(v in node.attributes.get(k, "").split() for k, v in wanted.items())]

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join("".join(f"{part} " for part in parts).split())

    def rows(self) -> list[list[str]]:
        """Of a table: the text of each cell."""
        return [[n.text for n in row.children if isinstance(n, Node)] for row in self.all("tr")]


class Reader(HTMLParser):
    """An HTML file as nodes; it must close all that it opens."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]
        self.feed(file.read_text(encoding="utf-8"))
        assert [node.tag for node in self.open] == [""]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {key: value or "" for key, value in attributes})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(file: Path) -> Node:
    return Reader(file).open[0]


def section(page: Node, key: str) -> Node:
    return next(node for node in page.all("section") if node.attributes.get("id") == key)


def tiles(page: Node) -> dict[str, str]:
    (grid,) = page.all("dl", class_="tiles")
    return {
        tile.all("dt")[0].text: " | ".join(each.text for each in tile.all("dd"))
        for tile in grid.children
        if isinstance(tile, Node)
    }


def charts(page: Node) -> dict[str, Node]:
    return {figure.all("h3")[0].text: figure for figure in page.all("figure", class_="chart")}


def points(chart: Node) -> list[tuple[list[float], list[float]]]:
    """What a chart shows under the pointer: x and y of each line."""
    return [(line["x"], line["y"]) for line in numbers_of(chart)["lines"]]


def heights(path: Node) -> list[float]:
    """y of a path's points."""
    return [float(y) for y in path.attributes["d"].split()[2::3]]


def numbers_of(chart: Node) -> dict[str, Any]:
    return json.loads(chart.all("script")[0].text)


def collect(*arguments: Path | str) -> Node:
    """The page of the folders as they are; of one run it is in its folder, else the last argument is the page."""
    *folders, output = map(str, arguments) if len(arguments) > 1 else (str(arguments[0]), f"{arguments[0]}/report.html")
    assert main([*folders, "--only_collect", "--output", output, "--force"]) == 0
    return read(Path(output))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run that already has a map; 210 photographs: the kNN evaluation uses 200 neighbors."""
    folder = tmp_path_factory.mktemp("real")
    write(folder / "photos", {f"{'ab'[i % 2]}/{i:03}.jpg": jpeg(photo(24, 24, seed=i)) for i in range(210)})
    options = ["--data.image_size=16", "--model.encoder=resnet18", "--model.stem=imagenet", "--model.hidden=32"]
    options += ["--batch_size=64", "--epochs=2", "--knn_every=1", "--knn_at_start", "--device=cpu", "--precision=fp32"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as one_thread does, for longer
    assert train.main([*options, f"--data.train={folder / 'photos'}", f"--output={folder / 'run'}"]) == 0
    torch.set_num_threads(threads)
    return add(folder / "run", {"embed/map.png": photo(60, 80)})


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pages of a run with everything, and of two such compared."""
    folder = tmp_path_factory.mktemp("full")
    runs = [full_folder(folder / name, optim__lr=lr) for name, lr in (("a" * 60, 0.1), ("b", 0.2))]
    collect(runs[0])
    collect(*runs, folder / "all.html")
    return [runs[0] / "report.html", folder / "all.html"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("needs chromium or google-chrome in PATH")
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


# A run


@pytest.mark.slow
def test_what_is_missing_is_made_and_shown(
    real: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    drawn = (real / "embed" / "map.png").read_bytes()
    assert main([str(real)]) == 0
    said = capsys.readouterr()
    assert re.findall(r"python -m fastsimclr\.(\w+)", said.err) == ["preview", "evaluate"]
    assert said.out.startswith(f"{real / 'report.html'}: ")
    assert (real / "embed" / "map.png").read_bytes() == drawn  # it was there

    page = read(real / "report.html")
    lines = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    knn = [line["knn_accuracy"] for line in lines if "knn_accuracy" in line]
    shown = tiles(page)
    assert shown["Final loss"].startswith(f"{losses[-1]:.4g} ")
    assert shown["kNN accuracy"].startswith(f"{knn[-1]:.1%} | {knn[0]:.1%} untrained".replace("%", " %"))
    assert shown["Trained"] == "2 epochs | 8 steps"
    assert shown["Parameters"].startswith("11.2 M")
    assert "cpu" in shown["Device"]
    curve = charts(page)["kNN accuracy"]
    assert points(curve)[0][0] == [0, 1, 2]
    assert "Bars: ± 2 standard errors (binomial, 210 images)" in curve.text
    assert "chance: 50 %" in curve.all("svg")[0].attributes["aria-label"]
    assert points(charts(page)["Loss"])[0][1] == pytest.approx(losses, rel=1e-3)

    top1 = json.loads((real / "evaluate" / "knn.json").read_text())["top1"]
    assert f"{100 * top1:.1f} %" in section(page, "evaluation").all("table")[0].rows()[1]
    assert [image.attributes["alt"][:6] for image in page.all("img")] == ["Map of", "Images"]
    assert not page.all("p", class_="quiet"), "no image was replaced"


def test_each_piece_is_asked_for_in_options_that_its_command_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", data__train=str(tmp_path / "gone"))
    add(folder, {"checkpoints/last.pt": "no checkpoint"})
    for part in parts(RunFolder(folder), "20"):
        module, *arguments = part.command
        assert importlib.import_module(f"fastsimclr.{module}").main(arguments) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "gone") in said or str(folder / "checkpoints" / "last.pt") in said, said


def test_a_run_of_nothing_but_its_record_says_what_would_make_the_rest(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "it's here")
    page = collect(folder)
    said = [node.text for node in page.all("p", class_="quiet")]
    assert len(said) == 3
    for part in parts(RunFolder(folder), "20"):
        (sentence,) = (each for each in said if part.what in each)
        command = sentence.split("python -m fastsimclr.")[1]
        assert shlex.split(command) == part.command
        assert ("no checkpoints/last.pt" if "--checkpoint" in command else "not made yet") in sentence
    assert "Device" not in tiles(page)
    shown = charts(page)
    probe = "Accuracy of the online probe"
    assert [*shown] == ["Loss", "kNN accuracy", probe, "Throughput", "Learning rate", "Where a step’s time goes"]
    assert tiles(page)["Online probe"].startswith("75.0 % | linear")
    assert points(shown[probe])[0] == ([1, 2, 3], [50, 62.5, 75])
    assert not page.all("img")


@pytest.mark.slow
def test_what_cannot_be_made_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", data__train=str(tmp_path / "gone"))
    assert main([str(folder)]) == 0
    said = capsys.readouterr()
    assert "without contact sheet of the views, map of the embedding, kNN evaluation" in said.out
    sentence = next(n.text for n in read(folder / "report.html").all("p", class_="quiet") if "contact sheet" in n.text)
    assert f"{tmp_path / 'gone'}: got nothing" in sentence
    assert "fastsimclr.preview: error" not in sentence


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    add(folder, {"evaluate/knn.json": {"top1": 1}, "evaluate/linear.json": evaluation(["a", "b"], "linear")})
    (folder / "environment.json").write_text("{")
    (folder / "preview.png").write_text("no image")
    page = collect(folder)
    said = " ".join(node.text for node in page.all("p", class_="quiet"))
    for words in ("environment.json could not", "evaluate/knn.json could not", "preview.png could not"):
        assert words in said
    assert section(page, "evaluation").all("table")[0].rows()[1][:2] == ["linear", "80.0 %"]


def test_a_torn_last_line_is_not_counted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "epoch": 3, "lr": 0.0')
    assert tiles(collect(folder))["Trained"] == "3 epochs | 30 steps"


def test_damaged_lines_are_not_counted_but_mentioned(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[4], lines[9] = b"\0" * 512 + b"\n", lines[9][:20] + b"\n"
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    page = collect(folder)
    assert tiles(page)["Trained"] == "3 epochs | 30 steps"
    assert any("metrics.jsonl has 2 damaged lines" in node.text for node in page.all("p", class_="quiet"))


def test_a_run_that_is_not_done_says_so(tmp_path: Path) -> None:
    assert tiles(collect(run_folder(tmp_path / "a", metrics(15))))["Trained"] == "1.5 of 3 epochs | 15 steps"
    assert tiles(collect(run_folder(tmp_path / "b", metrics(5))))["Trained"] == "part of 3 epochs | 5 steps"
    assert tiles(collect(run_folder(tmp_path / "c", metrics(1))))["Trained"] == "part of 3 epochs | 1 step"
    assert tiles(collect(run_folder(tmp_path / "d", metrics(15), steps=20)))["Trained"] == "part of 20 steps | 15 steps"
    assert tiles(collect(run_folder(tmp_path / "e", metrics(15), steps=15)))["Trained"] == "1.50 epochs | 15 steps"


def test_stages_add_up_to_the_step(tmp_path: Path) -> None:
    stages = {"data_wait": 10.0, "forward": 30.0, "backward": 50.0}  # of 100 ms
    lines = metrics(30)
    for line in lines[3:]:
        line |= {"stages_ms": stages} if "loss" in line else {}
    chart = charts(collect(run_folder(tmp_path / "run", lines)))["Where a step’s time goes"]
    assert chart.all("ul")[0].text == "data wait 10.0 % forward 30.0 % backward 50.0 % other 10.0 %"
    assert [y for _, y in points(chart)] == [[share] * 28 for share in (10, 30, 50, 10)]
    areas = [path for path in chart.all("path") if path.attributes.get("style", "").startswith("fill: var(--")]
    tops, bottoms = zip(*[(min(heights(area)), max(heights(area))) for area in areas], strict=True)
    for edge, shares in ((tops, (10, 40, 90, 100)), (bottoms, (0, 10, 40, 90))):
        assert list(edge) == pytest.approx([BOTTOM - (BOTTOM - TOP) * share / 100 for share in shares], abs=0.1)

    plain = charts(collect(run_folder(tmp_path / "plain")))["Where a step’s time goes"]
    assert plain.all("ul")[0].text == "data wait 10.0 % compute 90.0 %"


@pytest.mark.slow
def test_half_a_million_steps_make_a_small_page_that_keeps_the_extremes(tmp_path: Path) -> None:
    steps = 500_000
    loss = 3 + np.exp(-np.arange(steps) / 1e5)
    loss[123_456], loss[345_678] = 99, 0.25
    folder = run_folder(tmp_path / "run")
    rest = '"lr": 0.1, "data_wait": 0.01, "images_per_second": 64, "step_ms": 100, "images": 64}\n'
    with open(folder / "metrics.jsonl", "w") as file:
        for i, value in enumerate(loss):
            file.write(f'{{"step": {i + 1}, "epoch": {i // 5000}, "loss": {value:.4f}, {rest}')
    page = collect(folder)
    assert (folder / "report.html").stat().st_size < 250_000
    assert tiles(page)["Trained"] == "100 of 3 epochs | 500,000 steps"
    chart = charts(page)["Loss"]
    for x, y in points(chart):
        assert len(x) == len(y) <= MOST
    assert "lowest 0.25, highest 99" in chart.all("svg")[0].attributes["aria-label"]


def test_a_reduced_curve_is_bins_of_equal_count() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=12_345)
    y[77] = np.nan
    curve = reduce(np.arange(12_345.0), y)
    assert len(curve.y) == MOST
    assert (curve.low.min(), curve.high.max()) == (np.nanmin(y), np.nanmax(y))
    assert (curve.low <= curve.y).all()
    assert (curve.y <= curve.high).all()
    assert curve.y.mean() == pytest.approx(np.nanmean(y), abs=0.01)
    assert curve.ends == (0, 12_344)
    assert abs(np.diff(curve.smooth)).mean() < 0.3 * abs(np.diff(curve.y)).mean()
    flat = reduce(np.arange(40.0), np.full(40, 2.5))
    assert flat.smooth == pytest.approx(2.5)  # at its ends too


# Several runs


def test_of_several_runs_what_differs_is_listed_and_nothing_else(tmp_path: Path) -> None:
    changes = [
        {},
        {"loss__temperature": 0.5, "optim__lr": 0.3},
        {"data__scale": [0.2, 1.0], "optim__lr": 0.3},
    ]
    folders = [run_folder(tmp_path / name, **options) for name, options in zip("abc", changes, strict=True)]
    for number_, folder in enumerate(folders):
        add(folder, {"environment.json": {"torch": "2.9", "device": "cpu", "commit": f"{number_}"}})
    page = collect(*folders, tmp_path / "all.html")
    assert section(page, "differences").all("table")[0].rows() == [
        ["", "a", "b", "c"],
        ["data.scale", "[0.08, 1.0]", "[0.08, 1.0]", "[0.2, 1.0]"],
        ["loss.temperature", "0.1", "0.5", "0.1"],
        ["optim.lr", "auto", "0.3", "0.3"],
    ]
    assert section(page, "environment").all("table")[0].rows() == [["", "a", "b", "c"], ["commit", "0", "1", "2"]]
    (summary,) = [table for table in page.all("table") if "kNN accuracy" in table.rows()[0]]
    assert [row[0] for row in summary.rows()] == ["run", "a", "b", "c"]
    for chart in charts(page).values():
        assert [line["name"] for line in numbers_of(chart)["lines"]] == ["a", "b", "c"]
        drawn = [group.all("path")[0].attributes["style"] for group in chart.all("g", class_="line")]
        assert [re.findall(r"var\(--c\d\)|dasharray: [\d ,]+", style) for style in drawn] == [
            ["var(--c0)"],
            ["dasharray: 7,4", "var(--c1)"],
            ["dasharray: 2,4", "var(--c2)"],
        ]


def test_as_many_runs_are_compared_as_differ_in_color_or_dash() -> None:
    assert len({(place % len(COLORS), place % len(DASHES)) for place in range(MAX_RUNS)}) == MAX_RUNS


def test_runs_that_are_alike_say_so(tmp_path: Path) -> None:
    page = collect(run_folder(tmp_path / "a"), run_folder(tmp_path / "b"), tmp_path / "all.html")
    assert not section(page, "differences").all("table")
    assert "The configurations are the same" in section(page, "differences").text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    page = collect(run_folder(tmp_path / "x" / "run"), run_folder(tmp_path / "y" / "run"), tmp_path / "all.html")
    assert [row[0] for row in page.all("table")[0].rows()] == ["run", "x/run", "y/run"]


def test_runs_with_unlike_epochs_are_compared_by_epoch(tmp_path: Path) -> None:
    short = run_folder(tmp_path / "short", metrics(30, per_epoch=10))
    long = run_folder(tmp_path / "long", metrics(90, per_epoch=30))
    chart = charts(collect(short, long, tmp_path / "all.html"))["Loss"]
    assert numbers_of(chart)["x"] == "epoch"
    assert [x[-1] for x, _ in points(chart)] == [3, 3]


# Evaluations


def test_classes_are_sorted_and_their_confusions_counted(tmp_path: Path) -> None:
    scores = evaluation(["a", "b", "c"])
    scores["per_class"] = {"a": 0.5, "b": None, "c": 0.9}
    page = section(collect(add(run_folder(tmp_path / "run"), {"evaluate/knn.json": scores})), "evaluation")
    accuracies, bars, matrix = page.all("table")
    assert accuracies.rows()[1] == [
        "knn", "80.0 %", "143 of 1,430 images", "30 images", "k 20", "fastsimclr run, step 30",
    ]  # fmt: skip
    assert [row[0] for row in bars.rows()] == ["class", "c", "a"]
    assert "Without validation images: 1 class." in page.text
    assert matrix.rows() == [["", "a", "b", "c"], ["a", "8", "2", ""], ["b", "", "8", "2"], ["c", "2", "", "8"]]


def test_of_many_classes_the_best_the_worst_and_the_mistakes_are_shown(tmp_path: Path) -> None:
    classes = [f"class {i}" for i in range(1000)]
    scores = evaluation(classes)
    scores["per_class"] = {name: i / 1000 for i, name in enumerate(classes)}
    scores["confusion"][7][9] = 12
    folder = add(run_folder(tmp_path / "run"), {"evaluate/knn.json": scores})
    _, bars, pairs = section(collect(folder), "evaluation").all("table")
    names = [row[0] for row in bars.rows()][1:]
    best, worst = ([f"class {i}" for i in range(first, first - 10, -1)] for first in (999, 9))
    assert names == [*best, "… 980 more", *worst]
    assert pairs.rows()[1] == ["class 7", "class 9", "12", "54.5 %"]
    assert len(pairs.rows()) == 1 + 20
    assert (folder / "report.html").stat().st_size < 200_000


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_left_out_with_at_most_five_classes(tmp_path: Path, classes: int) -> None:
    scores = evaluation([f"class {i}" for i in range(classes)], "linear")
    page = collect(add(run_folder(tmp_path / "run"), {"evaluate/linear.json": scores}))
    table = section(page, "evaluation").all("table")[0].rows()
    assert ("top-5" in table[0]) == (classes > 5)
    assert tiles(page)["Linear top-1"] == ("80.0 % | top-5 97.5 %" if classes > 5 else "80.0 %")


SETTINGS = {
    "solver": "lbfgs",
    "lr": 0.004687500000000001,
    "temperature": None,
    "leave_one_out": False,
    "held_out_accuracy": {f"1e-0{i}": 1 / (i + 2) for i in range(9)},
    "epoch_losses": [2.345678, *[1 / 3] * 88, 0.1234567],
}


def test_settings_are_a_list_of_names_and_rounded_values(tmp_path: Path) -> None:
    scores = evaluation(["a", "b"], "linear") | {"settings": SETTINGS}
    page = section(collect(add(run_folder(tmp_path / "run"), {"evaluate/linear.json": scores})), "evaluation")
    (listed,) = page.all("dl", class_="pairs")
    names, values = ([node.text for node in listed.all(tag)] for tag in ("dt", "dd"))
    assert dict(zip(names, values, strict=True)) == {
        "solver": "lbfgs",
        "lr": "0.004688",
        "temperature": "none",
        "held out accuracy": "1e-00: 0.5, 1e-01: 0.3333, 1e-02: 0.25, 1e-03: 0.2, 1e-04: 0.1667, 1e-05: 0.1429, "
        "1e-06: 0.125, 1e-07: 0.1111, 1e-08: 0.1",
        "epoch losses": "2.346 → 0.1235 (90 values)",
    }


def test_long_settings_wrap_within_the_page(browser: Browser, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    collect(add(folder, {"evaluate/linear.json": evaluation(["a", "b"], "linear") | {"settings": SETTINGS}}))
    page = browser.open(folder / "report.html", 1280)
    table = "document.querySelector('#evaluation .scroll')"
    assert page.evaluate(f"{table}.scrollWidth <= {table}.clientWidth")


def knn_of(folder: Path, images: int, classes: int, **data: str) -> Path:
    """Add a kNN evaluation of `images` validation images. data: its options; by default those of the run."""
    scores = evaluation([f"class {i}" for i in range(classes)])
    options = {"data": {"train": "photos", "val": "val"} | data}
    return add(folder, {"evaluate/knn.json": scores | {"val": {"images": images}, "options": options}})


def test_the_knn_curve_is_shown_with_chance_and_standard_errors(tmp_path: Path) -> None:
    lines = metrics(30)
    for line, accuracy in zip([line for line in lines if "knn_accuracy" in line], (0.39, 0.4, 0.5, 0.41), strict=True):
        line["knn_accuracy"] = accuracy
    folder = run_folder(tmp_path / "run", lines, data__train="photos", data__val="val")
    chart = charts(collect(knn_of(folder, 100, 4)))["kNN accuracy"]
    assert "chance 25 %" in chart.text
    assert "Bars: ± 2 standard errors (binomial, 100 images)" in chart.text

    height = BOTTOM - TOP
    (curve,) = (heights(group.all("path")[0]) for group in chart.all("g", class_="line"))
    bars = [heights(path) for path in chart.all("path") if "0.45" in path.attributes.get("style", "")]
    per_percent = (curve[0] - curve[2]) / 11  # from 39 to 50 %
    assert BOTTOM - curve[0] == pytest.approx(39 * per_percent, abs=1)  # the axis begins at 0
    assert [abs(a - b) / per_percent for a, b in bars][2] == pytest.approx(4 * 5, abs=0.3)  # sqrt(0.5 * 0.5 / 100): 5 %
    dashes = [heights(path) for path in chart.all("path") if "dasharray: 6,3" in path.attributes.get("style", "")]
    assert dashes == [pytest.approx([BOTTOM - 25 * per_percent] * 2, abs=0.3)]
    assert per_percent * 55 < height


def test_chance_is_not_shown_for_an_evaluation_of_other_data(tmp_path: Path) -> None:
    folder = knn_of(run_folder(tmp_path / "run", data__train="photos", data__val="val"), 100, 4, val="other")
    chart = charts(collect(folder))["kNN accuracy"]
    assert "chance" not in chart.text
    assert "standard errors" not in chart.text


@pytest.mark.parametrize(
    ("loss", "options", "is_reported"),
    [
        (4.9, {}, True),  # ln(2 * 64 - 1) is 4.844
        (4.8, {}, False),
        (4.84, {"loss__decoupled": True}, True),  # ln(2 * 64 - 2) is 4.836
        (3.5, {"loss__global_negatives": False}, True),  # ln(2 * 16 - 1) is 3.434
    ],
)
def test_a_loss_above_that_of_uniform_similarities_is_reported(
    tmp_path: Path, loss: float, options: dict[str, Any], is_reported: bool
) -> None:
    folder = run_folder(tmp_path / "run", metrics(30, loss=loss), **options)
    add(folder, {"environment.json": {"world_size": 4}})
    note = tiles(collect(folder))["Final loss"]
    assert ("training has likely diverged, or the learning rate is too high" in note) == is_reported


def test_a_loss_that_still_falls_is_not_called_diverged(tmp_path: Path) -> None:
    falling = metrics(30)
    for line in falling:
        line |= {"loss": 9 - line["step"] / 10} if "loss" in line else {}
    for name, lines in (("first epoch", metrics(5, loss=9.0)), ("falling", falling)):
        note = tiles(collect(run_folder(tmp_path / name, lines)))["Final loss"]
        assert note.endswith("Above 4.844, the loss of uniform similarities")


def test_the_command_for_tensorboard_is_shown(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "it's here")
    assert "tensorboard" not in section(collect(folder), "curves").text
    (folder / "tensorboard").mkdir()
    commands = [code.text for code in section(collect(folder), "curves").all("code")]
    assert [shlex.split(command) for command in commands] == [["tensorboard", "--logdir", f"{folder}/tensorboard"]]


# The page


def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    folder = full_folder(tmp_path / "<i>&\"run'", data__train=EVIL)
    page = collect(folder)
    assert len(page.all("script")) == 1 + len(charts(page))  # ours, and the charts' numbers
    assert not [node for node in page if any(key.startswith("on") for key in node.attributes)]
    assert page.all("h1")[0].text == "<i>&\"run'"
    assert section(page, "evaluation").text.count(EVIL) >= 2
    assert EVIL in section(page, "environment").text
    assert EVIL in page.all("header")[0].text


def test_pictures_are_inside_and_no_wider_than_shown(tmp_path: Path) -> None:
    page = collect(full_folder(tmp_path / "run"))
    for image, size in zip(page.all("img"), [(800, 500), (700, 900), (1600, 847)], strict=True):
        kind, data = re.fullmatch(r"data:image/(png|webp|jpeg);base64,(.*)", image.attributes["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            assert opened.format.lower() == kind
            assert opened.size == size == (int(image.attributes["width"]), int(image.attributes["height"]))


@pytest.mark.slow
def test_nothing_is_fetched_and_everything_has_a_name(full: list[Path]) -> None:
    for page in map(read, full):
        for node in page:
            for key in FETCHED:
                assert node.attributes.get(key, "data:").startswith(("data:", "#")), (node.tag, key)
            assert "url(" not in node.attributes.get("style", "")
        css = page.all("style")[0].text
        assert css.count("{") == css.count("}") > 50
        assert not re.search(r"url\(|@import|https?:", css)
        ids = [node.attributes["id"] for node in page if "id" in node.attributes]
        assert len(set(ids)) == len(ids)
        links = {link.attributes["href"][1:] for link in page.all("nav")[0].all("a")}
        assert links == {node.attributes["id"] for node in page.all("section") if "id" in node.attributes}
        for figure in charts(page).values():
            (picture,) = figure.all("svg", role="img")
            assert re.search(r"from \S+ to|Of all steps", picture.attributes["aria-label"])
        assert all(image.attributes["alt"] for image in page.all("img"))
        linked = [link for link in page.all("a") if link.all("img")]
        assert len(linked) == len(page.all("img"))
        assert {link.attributes["href"][1:] for link in linked} <= set(ids)
        assert all(cell.attributes["scope"] in ("row", "col") for cell in page.all("th"))
        assert all(node.attributes["aria-label"] for node in page.all("div", role="region"))


def width_of(page: Page) -> int:
    """Of the page with all that is folded opened. A phone's window grows with the page: it is no measure."""
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    return page.evaluate("document.documentElement.scrollWidth")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.slow
def test_a_browser_shows_it_at_any_width_and_asks_for_nothing(
    browser: Browser, full: list[Path], width: int, dark: bool
) -> None:
    for file in full:
        page = browser.open(file, width, dark=dark)
        assert width_of(page) == width
        assert page.complaints() == []
        assert page.requests() == [file.as_uri()]
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.evaluate("[...document.querySelectorAll('.line path')].every(line => line.getTotalLength() > 0)")
        with Image.open(io.BytesIO(page.screenshot(whole=False))) as image:
            paper = sum(image.convert("RGB").getpixel((2, 2))) / 3
        assert paper < 60 if dark else paper > 200


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.slow
def test_a_picture_is_shown_by_itself_at_full_size(browser: Browser, full: list[Path], width: int) -> None:
    page = browser.open(full[0], width)
    for key in ("map-0", "gallery-0", "preview-0"):
        page.evaluate(f"document.querySelector('#{key} a[title]').click()")
        left, top, shown, natural = page.evaluate(
            f"(() => {{ const box = document.querySelector('#{key}-full'), image = box.querySelector('img');"
            "return [box.getBoundingClientRect().left, box.getBoundingClientRect().top, image.width,"
            "image.naturalWidth]; })()"
        )
        assert (left, top, shown) == (0, 0, natural)
        page.evaluate(f"document.querySelector('#{key} .back').click()")
        assert page.evaluate(f"document.querySelector('#{key}-full').getBoundingClientRect().left") > 0
    assert page.complaints() == []


def test_a_browser_that_finds_faults_would_say_so(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>console.error("x")</script>')
    with open(file, "a") as more:
        more.write('<details><div style="width: 3000px">wide</div></details>')
    page = browser.open(file, 390)
    assert page.complaints()
    assert page.requests() == [file.as_uri(), "http://127.0.0.1:9/x.png"]
    assert width_of(page) > 390


def test_the_values_under_the_pointer_are_shown(browser: Browser, tmp_path: Path) -> None:
    evil = EVIL.replace("/", "|")  # as the name of a folder may be
    folders = [run_folder(tmp_path / name, metrics(21, per_epoch=7)) for name in ("a", evil)]
    collect(*folders, tmp_path / "all.html")
    page = browser.open(tmp_path / "all.html", 1280)
    page.evaluate("document.querySelector('.plot').scrollIntoView({behavior: 'instant', block: 'center'})")
    left, top, width = page.evaluate(
        "(() => { const box = document.querySelector('.line').getBoundingClientRect();"
        "return [box.left, box.top, box.width]; })()"
    )
    assert page.evaluate("[...document.querySelectorAll('.tip')].every(tip => tip.hidden)")
    page.move(left + 0.5 * width, top + 20)  # of steps 1 to 21
    shown = page.evaluate("document.querySelector('.tip').innerText")
    assert shown.split("\n") == ["step 11", "a 4.182", f"{evil} 4.182"]
    page.move(2, 2)
    assert page.evaluate("document.querySelector('.tip').hidden")
    assert page.complaints() == []


# The command line


def test_its_own_page_is_refreshed_and_nothing_else_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run")
    own, other = folder / "report.html", tmp_path / "other.html"
    assert main([str(folder), "--only_collect"]) == 0
    first = own.read_text()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(20)))
    assert main([str(folder), "--only_collect"]) == 0
    assert own.read_text() != first

    other.write_text(first)  # ours, but not where ours are
    own.write_text("dear")
    for arguments in ([str(folder)], [str(folder), "--output", str(other)]):
        capsys.readouterr()
        assert main([*arguments, "--only_collect"]) == 2
        assert "--force" in capsys.readouterr().err
    assert (own.read_text(), other.read_text()) == ("dear", first)
    assert main([str(folder), "--only_collect", "--force"]) == 0
    assert tiles(read(own))["Trained"] == "2 of 3 epochs | 20 steps"
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["RUN_DIR"]),
        (["nowhere"], ["nowhere", "got nothing there", "--output of fastsimclr.train"]),
        (["empty"], ["empty", "without config.yaml"]),
        (["run/config.yaml"], ["got a file", "run's folder"]),
        (["no-steps"], ["metrics.jsonl", "got no step"]),
        (["no-metrics"], ["metrics.jsonl", "got no step"]),
        (["damaged"], ["metrics.jsonl", "got no step"]),
        (["no-yaml"], ["config.yaml", "YAML"]),
        (["run", "other"], ["--output", "2 runs"]),
        (["run", "run/", "--output=x.html"], ["run twice"]),
        (["run", "--output=x.pdf"], ["x.pdf", ".html"]),
        (["run", "--output=/dev/null/x.html"], ["/dev/null/x.html", "cannot be written"]),
        (["run", "--palette=red"], ["--palette", "--help"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "no-steps", "no-metrics", "damaged", "no-yaml"):
        run_folder(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-steps" / "metrics.jsonl").write_text('{"step": 0, "epoch": 0, "knn_accuracy": 0.2}\n')
    (tmp_path / "no-metrics" / "metrics.jsonl").write_text("")
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"step": "one", "loss": 4}\n')
    (tmp_path / "no-yaml" / "config.yaml").write_text("a: [")
    assert main([*arguments, "--only_collect"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsimclr.report: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not list(tmp_path.rglob("*.html"))


def test_the_package_holds_what_the_page_is_made_of(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    files = {file.name for file in (ROOT / "fastsimclr" / "reporting").iterdir() if file.is_file()}
    assert {"page.css", "page.js", "page.py"} < files
    assert {file.name for file in (tmp_path / "fastsimclr" / "reporting").iterdir()} == files


# Numbers


def test_numbers_are_short() -> None:
    values = (4.43671, 1433, 123456.7, 0.00005, float("nan"))
    assert [number(value) for value in values] == ["4.437", "1,433", "123,457", "5e-5", "–"]
    seconds = (3.21, 59.7, 103, 3600, 11_520, 200_000)
    assert [duration(s) for s in seconds] == ["3.2 s", "1 min", "1 min 43 s", "1 h", "3 h 12 min", "2 d 7 h"]
