"""Measure what pre-training gains on a CPU: a small encoder on a subset of CIFAR-10, trained against untrained.

    python -m benchmarks.pretraining_gain --train 'cifar10/train-0.tar' --val cifar10/test.tar --json OUT.json

The seed determines the weights, the views and the order of the images; the images are the same for all seeds.
Everything runs through the package's own commands. Both encoders are evaluated by kNN (k=20) and logistic regression
(--solver lbfgs) on the representations h.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsimclr.data import open_source
from fastsimclr.data.sources import EncodedSource
from fastsimclr.data.subsets import class_balanced
from fastsimclr.environment import commit
from fastsimclr.precision import choose_precision

RECIPE = {
    "config": "cifar10",
    "model.stem": "imagenet",  # sixteen times fewer operations than the small stem
    "loss.temperature": 0.2,
    "optim.name": "adamw",  # LARS needs thousands of steps
    "optim.lr": 0.001,
    "optim.weight_decay": 1e-4,
    "optim.warmup_epochs": 1,
    "batch_size": 256,
    "knn_every": 0,
}
IMAGES, VAL_IMAGES, EPOCHS, SEEDS = 4000, 2000, 40, 3
MEASURES = {"knn": ["knn", "--k=20"], "linear": ["linear", "--solver=lbfgs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help=f"labeled images; {IMAGES} are used for training")
    parser.add_argument("--val", required=True, help=f"labeled images; {VAL_IMAGES} are used for evaluation")
    parser.add_argument("--json", type=Path, required=True, help="file to write the results to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train = write_subset(options.train, IMAGES, Path(folder) / "train")
        val = write_subset(options.val, VAL_IMAGES, Path(folder) / "val")
        rows = [run_seed(seed, train, val, Path(folder)) for seed in range(SEEDS)]
    record = {
        "what": "top-1 accuracy of representations, trained against untrained, ResNet-18 with ImageNet's stem on 32x32",
        "images": IMAGES,
        "val_images": VAL_IMAGES,
        "epochs": EPOCHS,
        "recipe": RECIPE,
        "device": f"{choose_precision('auto', torch.device('cpu')).why}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit(),
        "seeds": rows,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")


def write_subset(path: str, images: int, folder: Path) -> str:
    """Write a class-balanced subset (seed 0) as files in class folders; return the folder."""
    source = open_source(path)
    assert isinstance(source, EncodedSource)
    index = class_balanced(source, images / len(source), seed=0)
    for i in np.arange(len(source)) if index is None else index:
        file = folder / source.classes[source.labels[i]] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read(int(i)).tobytes())
    return str(folder)


def run_seed(seed: int, train: str, val: str, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"seed": seed}
    # With this learning rate the checkpoint contains an untrained encoder, except for its BatchNorm statistics. These
    # are from the views of one step, which favors the untrained encoder.
    for state, changes in {"untrained": {"max_steps": 1, "optim.lr": 1e-12}, "trained": {}}.items():
        run = folder / f"{state}-{seed}"
        recipe = RECIPE | {"data.train": train, "epochs": EPOCHS, "seed": seed, "output": run} | changes
        run_command("train", *(f"--{name}={value}" for name, value in recipe.items()))
        for measure in MEASURES.values():
            run_command("evaluate", *measure, f"--checkpoint={run}", f"--data.train={train}", f"--data.val={val}")
        results = [json.loads(file.read_text()) for file in sorted((run / "evaluate").glob("*.json"))]
        row[state] = {name: result["top1"] for name, result in zip(MEASURES, results, strict=True)}
        print(f"seed {seed}, {state}: {row[state]}", flush=True)
    return row


def run_command(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"fastsimclr.{module}", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
