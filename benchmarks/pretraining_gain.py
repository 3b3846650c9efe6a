"""What pre-training gains on a CPU: a small encoder on few images of CIFAR-10, against its untrained self, by seed.

    python -m benchmarks.pretraining_gain --train 'cifar10/train-0.tar' --val cifar10/test.tar --json OUT.json

Each seed has its own weights, views and order; the images are the same. The package's own commands do everything.
Both encoders are measured by kNN (k=20) and by logistic regression (--solver lbfgs), on representations h.
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
from fastsimclr.environment import commit
from fastsimclr.evaluation.labeled import class_balanced
from fastsimclr.precision import choose_precision

RECIPE = {
    "config": "cifar10",
    "model.stem": "imagenet",  # strides: sixteen times fewer operations than the small stem
    "loss.temperature": 0.2,
    "optim.name": "adamw",  # few steps: LARS wants thousands
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
    parser.add_argument("--train", required=True, help=f"images with labels, of which {IMAGES} are trained on")
    parser.add_argument("--val", required=True, help=f"images with labels, of which {VAL_IMAGES} are classified")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train = write_subset(options.train, IMAGES, Path(folder) / "train")
        val = write_subset(options.val, VAL_IMAGES, Path(folder) / "val")
        rows = [one_seed(seed, train, val, Path(folder)) for seed in range(SEEDS)]
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
    """As many images of each class, by seed 0, as files in class folders."""
    source = open_source(path)
    assert isinstance(source, EncodedSource)
    kept = class_balanced(source, images / len(source), seed=0)
    for i in np.arange(len(source)) if kept is None else kept:
        file = folder / source.classes[source.labels[i]] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read(int(i)).tobytes())
    return str(folder)


def one_seed(seed: int, train: str, val: str, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"seed": seed}
    # A learning rate this small leaves an untrained encoder in a checkpoint, except for its BatchNorm statistics, which
    # have seen one step's views, to the advantage of the untrained one.
    for state, changes in {"untrained": {"max_steps": 1, "optim.lr": 1e-12}, "trained": {}}.items():
        run = folder / f"{state}-{seed}"
        recipe = RECIPE | {"data.train": train, "epochs": EPOCHS, "seed": seed, "output": run} | changes
        command("train", *(f"--{name}={value}" for name, value in recipe.items()))
        for measure in MEASURES.values():
            command("evaluate", *measure, f"--checkpoint={run}", f"--data.train={train}", f"--data.val={val}")
        found = [json.loads(file.read_text()) for file in sorted((run / "evaluate").glob("*.json"))]
        row[state] = {name: result["top1"] for name, result in zip(MEASURES, found, strict=True)}
        print(f"seed {seed}, {state}: {row[state]}", flush=True)
    return row


def command(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"fastsimclr.{module}", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
