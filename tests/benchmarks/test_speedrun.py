"""python -m benchmarks.speedrun: real runs of a few steps, their records and the report of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.speedrun.__main__ import Speed, main, speed_of_run_before
from benchmarks.speedrun.contenders import LIGHTLY_LOOP, Contender, Measured, time_limit, train
from benchmarks.speedrun.evaluation import evaluate, load, open_images
from benchmarks.speedrun.report import draw, report

TINY = Path(__file__).parents[1] / "faults" / "tiny.py"
LEVER = (
    f"--lever=tiny=--model.encoder={TINY}:Tiny --model.weights=none --model.freeze=none --batch_size=16 --device=cpu"
)


def measured(seconds: float, *steps: float) -> Measured:
    return Measured(seconds, [{"step_ms": 1000 * each, "loss": 1.0, "images": 8} for each in steps])


def record(name: str, seed: int, knn: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "budget_s": 60.0,
        "train_images": 50000,
        "planned_steps": 100,
        "steps": 100,
        "images_seen": 25600,
        "seconds": 58.0,
        "cut": False,
        "overran": False,
        "accuracy": {"knn20": knn, "knn200": knn, "linear": knn},
        "curve": {"seconds": [10.0, 58.0], "loss": [5.0, 4.0]},
        "machine": {"device": "A CPU", "cores": 2, "versions": {"torch": "2.15.0", "lightly": None}},
        "commit": "c0ffee1",
    } | more


def image_folder(folder: Path, count: int) -> Path:
    """32x32 images of two classes, dark and bright."""
    rng = np.random.default_rng(count)
    for i in range(count):
        file = folder / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(128 * (i % 2))).save(file)
    return folder


def test_the_plan_ends_with_the_budget() -> None:
    speed = Speed.of(measured(20.0, 4.0, 1.0, 1.0, 1.0))
    assert (speed.step_s, speed.longest_s, speed.other_s) == (1.0, 4.0, 16.0)
    assert speed.plan(1000) == 954  # 97 % of 1000 s, less 16 s
    assert speed.plan(100) == 80  # the limit of 103 s lets no step begin after 95 s
    assert speed.plan(10) < 1


def test_a_run_is_planned_by_the_one_before(tmp_path: Path) -> None:
    contender, speed = Contender("A lever", ()), Speed.of(measured(20.0, 4.0, 1.0, 1.0, 1.0))
    (tmp_path / "a-lever-seed1.json").write_text(json.dumps({"speed": asdict(speed)}))
    assert [speed_of_run_before(contender, seed, tmp_path) for seed in range(4)] == [None, None, speed, None]


def test_the_time_limit_includes_the_margin_of_the_training_command() -> None:
    for seconds in (90.0, 5400.0):
        limit = time_limit(seconds)
        assert limit - min(limit / 10, 60) == pytest.approx(seconds)


def test_the_report_has_mean_spread_and_marks(tmp_path: Path) -> None:
    records = [record("slow", 0, 0.3, cut=True), record("slow", 1, 0.4), record("ours", 0, 0.51, overran=True)]
    records.append(record("ours", 0, 0.6, budget_s=600.0))
    text = report(records)
    short, long = text.split("## ")[1:]
    assert short.startswith("60 s on 50,000 images")
    assert long.startswith("600 s on 50,000 images")
    assert short.index("| ours ‡ | 1 | 51.0 | 51.0 |") < short.index("| slow † | 2 | 35.0 (30.0 to 40.0) |")
    assert "ended by the budget" in short
    assert "ended by the budget" not in long
    assert "A CPU, 2 cores; torch 2.15.0; commit c0ffee1" in short
    draw(records, tmp_path / "speedrun.png")
    with Image.open(tmp_path / "speedrun.png") as picture:
        assert picture.width > 1000


@pytest.mark.slow
def test_lightlys_loop_trains_until_its_last_step_or_the_limit(tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    images, test = image_folder(tmp_path / "train", 16), image_folder(tmp_path / "test", 8)
    runs = ("paper", "cifar", 5, None, [1, 2, 3, 4, 5]), ("lightly", "imagenet", 1000, 0.0, [1])
    for recipe, stem, steps, limit_s, expected in runs:
        contender = Contender(recipe, (f"--recipe={recipe}", f"--stem={stem}", "--batch_size=4"), LIGHTLY_LOOP)
        found = train(contender, str(images), tmp_path / recipe, seed=0, steps=steps, limit_s=limit_s)
        assert [step["step"] for step in found.steps] == expected
        assert sum(step["step_ms"] for step in found.steps) < 1000 * found.seconds
        accuracy = evaluate(*load(contender, tmp_path / recipe), open_images(str(images), str(test)))
        assert accuracy.keys() == {"knn20", "knn200", "linear"}
        assert all(0 <= value <= 1 for value in accuracy.values())


@pytest.mark.slow
def test_runs_that_are_missing_are_made_by_the_same_command(tmp_path: Path) -> None:
    images, test = image_folder(tmp_path / "train", 300), image_folder(tmp_path / "test", 20)
    output = tmp_path / "out"
    command = [f"--train={images}", f"--test={test}", "--equal_steps=4", "--images=200", f"--output={output}"]
    command += ["--contenders=", LEVER]
    assert main([*command, "--seeds=1"]) == 0
    first = output / "4steps-200images" / "tiny-seed0.json"
    before = first.stat()
    assert main([*command, "--seeds=2"]) == 0
    assert first.stat() == before  # not made again
    made = [json.loads(file.read_text()) for file in sorted(first.parent.iterdir())]
    assert [each["seed"] for each in made] == [0, 1]
    for each in made:
        assert (each["steps"], each["images_seen"], each["train_images"]) == (4, 64, 200)
        assert each["accuracy"]["linear"] > 0.9  # dark or bright
        assert str(Path(__file__).parents[2]) not in json.dumps(each)
    assert "| tiny | 2 |" in (output / "report.md").read_text()
    assert (output / "speedrun.png").is_file()


def test_a_record_of_other_options_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "4steps-4images" / "tiny-seed0.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"options": ["--batch_size=8"]}))
    command = ["--equal_steps=4", "--contenders=", LEVER, f"--output={tmp_path / 'out'}"]
    assert main([*command, f"--train={image_folder(tmp_path / 'train', 4)}", "--images=4"]) == 2
    assert "got a record of tiny with other options" in capsys.readouterr().err
