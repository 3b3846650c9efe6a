"""python -m fastsimclr.plan: its arithmetic against values computed by hand, and the table of a real run."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastsimclr import train
from fastsimclr.plan import main
from fastsimclr.reporting.plan import read_runs
from fastsimclr.reporting.scaling import Cluster, Measured, Prediction, Setup, Step, find_limits, predict

MIB = 2**20
SETUP = Setup(
    encoder="resnet50",
    on_gpu=False,
    threads=1,
    images=1000,
    micro_batch_size=None,
    num_views=2,
    parameters=50 * MIB // 4,  # 52.4288e6 bytes: two buckets of 25 MiB
    parameter_bytes=4,
    optimizer="lars",
    synchronized_norms=0,
    projection_width=126,  # with two numbers for each projection: 512 bytes
    loss_backend="tiled",
    global_negatives=True,
    activation_mib_per_image=2.0,
)
STEP = Step(
    steps=20,
    batch_size=64,
    views_ms=4.0,
    forward_ms=10.0,
    backward_ms=20.0,
    loss_ms=2.0,
    optimizer_ms=3.0,
    other_ms=1.0,
    peak_mib=1000.0,
)
LINK = Cluster(bandwidth=1.0, latency_us=100.0)


def predicted(ranks: int, batch_size: int, cluster: Cluster = LINK, **changes: Any) -> Prediction:
    """The prediction from SETUP, with changes, and STEP."""
    measured = Measured(dataclasses.replace(SETUP, **changes), (STEP,))
    return predict(measured, cluster, ranks, batch_size, images=1000)


def test_one_rank_takes_what_was_measured() -> None:
    found = predicted(1, 64)
    assert found.parts_ms == {"views": 4, "encoder": 30, "loss": 2, "communication": 0, "optimizer": 3, "other": 1}
    assert found.step_ms == 40
    assert found.images_per_second == 1600
    assert found.epoch_seconds == pytest.approx(0.64)  # 16 steps, the last with 40 images
    assert found.efficiency == 1
    assert found.memory_mib == 1000


def test_four_ranks_with_as_many_images_each() -> None:
    found = predicted(4, 256)
    # Of 52.4288e6 bytes of gradients 2 * 3/4 are sent, of 512 projections of 512 bytes 3/4; 7 collectives have latency.
    communication = 78.6432 + 0.196608 + 0.7
    # Twice the work per pair of views, as one process uses the symmetry; and 4 times the pairs per rank.
    parts = {"views": 4, "encoder": 30, "loss": 16, "communication": communication, "optimizer": 3, "other": 1}
    assert found.parts_ms == pytest.approx(parts)
    assert found.step_ms == pytest.approx(133.539808)
    assert found.images_per_second == pytest.approx(256_000 / 133.539808)
    assert found.epoch_seconds == pytest.approx(4 * 0.133539808)
    assert found.efficiency == pytest.approx(40 / 133.539808)
    assert found.memory_mib == pytest.approx(1000 + 50 + 0.25)


def test_four_ranks_share_the_batch() -> None:
    found = predicted(4, 64)
    assert found.parts_ms["views"] == 1
    assert found.parts_ms["encoder"] == 7.5
    assert found.parts_ms["loss"] == 1  # half of 2 ms by the ranks' share of the rows, times 2 for the symmetry
    assert found.memory_mib == pytest.approx(1000 - 48 * 2 + 50 + 0.0625)


def test_the_largest_rank_sets_the_pace() -> None:
    assert predicted(3, 64).parts_ms["encoder"] == pytest.approx(30 * 22 / 64)


def test_ranks_that_share_cores_slow_every_part_down() -> None:
    shared, own = (predicted(8, 512, dataclasses.replace(LINK, cores=cores)) for cores in (2, 8))
    assert shared.parts_ms == pytest.approx({name: 4 * ms for name, ms in own.parts_ms.items()})
    assert own.parts_ms == predicted(8, 512).parts_ms
    assert predicted(2, 128, dataclasses.replace(LINK, cores=2), threads=2).parts_ms["encoder"] == 60


@pytest.mark.parametrize(
    ("bandwidth", "exposed"),
    [
        (1.0, 78.6432 + 0.2 - 20),  # the backward pass hides 20 ms
        (10.0, (7.86432 + 0.2) / 2),  # it hides all buckets but the last
    ],
)
def test_a_gpu_sends_gradients_during_the_backward_pass(bandwidth: float, exposed: float) -> None:
    found = predicted(4, 256, Cluster(bandwidth, 100.0), on_gpu=True, loss_backend="fused")
    assert found.parts_ms["communication"] == pytest.approx(exposed + 0.196608 / bandwidth + 0.5)
    assert found.parts_ms["loss"] == pytest.approx(2 * 4 * 1.2)


@pytest.mark.parametrize(
    ("changes", "collectives"),
    [
        ({}, 7),
        ({"synchronized_norms": 3}, 7 + 3 * 2),
        ({"synchronized_norms": 3, "micro_batch_size": 16}, 7 + 3 * 4 * 3),  # 4 micro-batches, two forward passes
        ({"num_views": 3}, 7 + 2 * 3),  # the loss of each pair of views gathers three times
        ({"global_negatives": False}, 4),
    ],
)
def test_each_collective_has_latency(changes: dict[str, Any], collectives: int) -> None:
    with_latency, without = (
        predicted(2, 128, Cluster(1.0, latency), **changes).parts_ms["communication"] for latency in (100.0, 0.0)
    )
    assert with_latency - without == pytest.approx(collectives * 0.1)


def test_local_negatives_cost_what_was_measured() -> None:
    found = predicted(4, 256, Cluster(1.0), global_negatives=False)
    assert found.parts_ms["loss"] == 2
    assert found.parts_ms["communication"] == pytest.approx(78.6432)
    assert found.memory_mib == 1050


def test_micro_batches_need_a_second_forward_pass() -> None:
    measured = Measured(dataclasses.replace(SETUP, micro_batch_size=16), (STEP,))
    assert predict(measured, LINK, 2, 64, 1000).parts_ms["encoder"] == 15
    assert predict(measured, LINK, 4, 64, 1000).parts_ms["encoder"] == (10 / 2 + 20) / 4
    assert predict(measured, LINK, 4, 256, 1000).memory_mib == pytest.approx(1050.25)  # 16 images at a time, as before


@pytest.mark.parametrize(("optimizer", "kept"), [("lars", 100), ("adamw", 150)])
def test_on_a_gpu_all_but_weights_and_optimizer_are_activations(optimizer: str, kept: float) -> None:
    found = predicted(4, 64, on_gpu=True, optimizer=optimizer, activation_mib_per_image=None)
    assert found.memory_mib == pytest.approx(kept + (1000 - kept) / 4 + 50 + 0.0625)


def test_the_memory_of_the_reference_loss_is_not_predicted() -> None:
    assert predicted(4, 64, loss_backend="reference").memory_mib is None


def test_two_runs_separate_what_does_not_depend_on_the_batch() -> None:
    half = dataclasses.replace(STEP, batch_size=32, forward_ms=6.0, backward_ms=20.0, loss_ms=1.25, optimizer_ms=2.0)
    found = predict(Measured(SETUP, (half, STEP)), LINK, 4, 4 * 128, 1000)
    assert found.parts_ms["encoder"] == pytest.approx(18 + 20)
    assert found.parts_ms["optimizer"] == 2.5
    # 2 ms at 64^2, 0.75 ms less at 32^2; here 2 * 128 * 512
    assert found.parts_ms["loss"] == pytest.approx(2 + 0.75 / 3072 * (131072 - 4096))
    assert found.efficiency == pytest.approx(2 * 40 / found.step_ms)


def test_limits_name_the_first_number_of_ranks() -> None:
    def prediction(ranks: int) -> Prediction:
        parts = {"loss": 1.0 * ranks, "communication": 5.0 * (ranks > 1)}  # of 50 ms
        return Prediction(ranks, 64, parts, 50, 0, 0, 1, None)

    assert find_limits(map(prediction, range(1, 6))) == [
        "communication and loss: at most a tenth of the step each, up to 5 ranks"
    ]
    assert find_limits(map(prediction, range(1, 9))) == [
        "loss: more than a tenth of the step from 6 ranks on (12.0 %); keep the global batch size from there on, or "
        "use --loss.precision medium"
    ]


# A real run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 18 steps of 16 digits."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    options = ["--data.train=digits", "--data.image_size=16", "--model.encoder=resnet18", "--model.width=0.125"]
    options += ["--model.hidden=16", "--model.out=8", "--batch_size=16", "--max_steps=18", "--knn_every=0"]
    assert train.main([*options, "--device=cpu", "--precision=fp32", f"--output={folder}"]) == 0
    return folder


def copy(run: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


def edit(file: Path, pattern: str, replacement: str) -> None:
    text, number = re.subn(pattern, replacement, file.read_text())
    assert number
    file.write_text(text)


def test_plan_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--ranks=1,2,8", "--bandwidth=10", "--images=1000", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main([str(run), "--ranks=1,2,8", "--bandwidth=10", "--images=1000"]) == 0
    measured, cluster, head, *rows, limit = capsys.readouterr().out.splitlines()
    assert f"{run}, resnet18, 13 steps of 16 images on a CPU" in measured
    assert cluster == "predicted: 10 GB/s, 0 µs per collective; parts in ms"
    assert head.split()[:3] == ["ranks", "batch", "views"]
    assert [row.split()[:2] for row in rows] == [["1", "16"], ["2", "32"], ["8", "128"]]
    assert limit.startswith(("loss", "communication"))

    setup, (step,) = plan["measured"]["setup"], plan["measured"]["steps"]
    one, two, _ = plan["predictions"]
    assert setup["images"] == 1433  # the digits without those held out
    assert setup["synchronized_norms"] == 22  # ResNet-18's 20 and the projector's 2
    assert setup["optimizer"] == "lars"
    assert one["step_ms"] == pytest.approx(sum(ms for name, ms in step.items() if name.endswith("_ms")))
    assert one["memory_mib"] == step["peak_mib"] > 100
    assert two["parts_ms"]["encoder"] == pytest.approx(step["forward_ms"] + step["backward_ms"])
    assert one["epoch_seconds"] == pytest.approx(63 * one["step_ms"] / 1000)


def test_the_measured_times_are_medians_of_the_steps_after_the_first(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stages = [line["stages_ms"] for line in lines if "loss" in line][5:]
    assert len(stages) == 13
    middle = sorted(each["forward"] for each in stages)[6]
    waits = sum(each["data_wait"] + each["views"] for each in stages) / 13
    measured, _ = read_runs([str(run)])
    assert measured.steps[0].forward_ms == middle
    assert measured.steps[0].views_ms == pytest.approx(waits)


def test_two_runs_are_ordered_by_batch_size(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = copy(run, tmp_path / "smaller")
    edit(smaller / "config.yaml", r"(?m)^batch_size: 16$", "batch_size: 8")
    edit(smaller / "metrics.jsonl", '"images": 16', '"images": 8')
    assert main([str(run), str(smaller), "--ranks=1", "--bandwidth=1"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "smaller" in first
    assert f"{run}, resnet18" in second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks=1,0"], "--ranks: got 0, expected at least 1"),
        (["--ranks=1,two"], "--ranks: got 'two', expected int"),
        (["--bandwidth=0"], "--bandwidth: got 0.0, expected a number above 0"),
        (["--batch_size=64", "--local_batch_size=8"], "not allowed with"),
        (["--batch_size=15", "--ranks=8"], "--batch_size: got 15 on 8 ranks, expected at least 2 images per rank"),
        (["--local_batch_size=1"], "--local_batch_size: got 1 on 8 ranks"),
    ],
)
def test_wrong_options_are_one_line(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--bandwidth=1", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def keep_steps(folder: Path, number: int) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "loss" not in line or json.loads(line)["step"] <= number]
    (folder / "metrics.jsonl").write_text("".join(kept))


DAMAGES = {
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "a folder without metrics.jsonl"),
    "no environment": (lambda run: (run / "environment.json").unlink(), "got no world_size, device, threads"),
    "too few steps": (lambda run: keep_steps(run, 14), "got 9 steps of 16 images after the first 5, expected at least"),
    "no stages": (
        lambda run: edit(run / "metrics.jsonl", '"stages_ms": {[^}]*}', '"stages_ms": {}'),
        "got no times of forward, backward, loss, optimizer",
    ),
    "several ranks": (
        lambda run: edit(run / "environment.json", '"world_size": 1', '"world_size": 2'),
        "got a run of 2 ranks, expected one of a single process",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_run_that_measured_too_little_is_one_line(
    run: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = DAMAGES[damage]
    folder = copy(run, tmp_path / "run")
    assert main([str(folder), "--bandwidth=1", "--ranks=1"]) == 0
    capsys.readouterr()
    change(folder)
    assert main([str(folder), "--bandwidth=1"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_runs_that_cannot_be_combined_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy(run, tmp_path / "other")
    assert main([str(run), str(other), "--bandwidth=1"]) == 2
    assert "got two runs of batch size 16, expected different ones" in capsys.readouterr().err
    edit(other / "environment.json", '"parameters": ', '"parameters": 1')
    assert main([str(run), str(other), "--bandwidth=1"]) == 2
    assert "got runs that differ in parameters" in capsys.readouterr().err
    assert main([*3 * [str(run)], "--bandwidth=1"]) == 2
    assert "got 3 runs, expected one or two" in capsys.readouterr().err
