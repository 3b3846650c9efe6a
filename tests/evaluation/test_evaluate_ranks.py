"""The evaluations on two ranks: the same metrics and weights as on one rank, and one error raised on all ranks."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from fastsimclr.distributed import World
from fastsimclr.errors import UserError
from fastsimclr.evaluate import configure
from fastsimclr.evaluation.protocols import Evaluation
from fastsimclr.train import main as train

pytestmark = pytest.mark.slow

COMMANDS = {
    "knn": ["knn", "--k=20"],
    "linear-lbfgs": ["linear", "--solver=lbfgs", "--c=0.1"],
    # 47 images of each class are 470: batches of 403 and 67, split over the ranks into 202 and 201, 34 and 33.
    "linear-0.33": ["linear", "--labels=0.33", "--epochs=2", "--batch_size=403", "--lr=0.5"],
    "finetune-0.33": ["finetune", "--labels=0.33", "--epochs=2", "--batch_size=403"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--max_steps=3", "--knn_every=0", "--data.image_size=16", "--device=cpu", "--precision=fp32"]
    assert train([*options, f"--output={folder}"]) == 0
    return folder


def evaluate_all(rank: int, world_size: int, run: Path, output: Path) -> str:
    """Run every command; return what this rank printed."""
    printed = io.StringIO()
    world = World(rank, world_size, torch.device("cpu"))
    for command in COMMANDS.values():
        arguments = [*command, f"--checkpoint={run}", f"--output={output}", "--precision=fp64"]
        with contextlib.redirect_stdout(printed):
            Evaluation(*configure(arguments), world).run()
    return printed.getvalue()


def test_two_ranks_give_the_same_results_as_one(run: Path, tmp_path: Path) -> None:
    printed = run_ranks(2, evaluate_all, 2, run, tmp_path / "two")
    assert [text.count("\n") for text in printed] == [len(COMMANDS), 0]
    evaluate_all(0, 1, run, tmp_path / "one")
    for name in COMMANDS:
        one, two = (json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in ("one", "two"))
        for key in ("top1", "top5", "confusion", "settings"):
            expected = pytest.approx(one[key]) if isinstance(one[key], float) else one[key]
            if key == "settings":
                assert one[key].pop("epoch_losses", []) == pytest.approx(two[key].pop("epoch_losses", []))
            assert two[key] == expected, (name, key)
        # LBFGS weights are not compared: it stops where the gradient is small, and features that hardly vary have
        # large weights whose digits depend on rounding.
        if name in ("linear-0.33", "finetune-0.33"):
            states = [torch.load(tmp_path / folder / f"{name}.pt", weights_only=True) for folder in ("one", "two")]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-8, msg=f"{name}: {key}")


def evaluate_with_missing_data(rank: int, run: Path, folder: Path) -> Any:
    data = "digits" if rank == 0 else str(folder / "nowhere")
    arguments = ["knn", f"--checkpoint={run}", f"--output={folder}", f"--data.train={data}", "--data.val=digits"]
    try:
        Evaluation(*configure(arguments), World(rank, 2, torch.device("cpu"))).run()
    except UserError as error:
        return str(error)


def test_error_on_one_rank_is_raised_on_all(run: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, evaluate_with_missing_data, run, tmp_path)
    assert first == second
    assert "nowhere" in first
