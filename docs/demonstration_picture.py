"""Draw docs/images/demonstration.png from a run of the demonstration: python docs/demonstration_picture.py RUN"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.manifold import TSNE

from fastsimclr import Augmentation, load_encoder, open_views
from fastsimclr.data import open_source

OUTPUT = Path(__file__).parent / "images" / "demonstration.png"
IMAGES = 5


def main(run: Path) -> None:
    figure = plt.figure(figsize=(12, 3.9), dpi=100, layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[0.5, 1.3, 1.2])
    draw_views(left)
    draw_curve(middle, run)
    draw_map(right, run)
    figure.savefig(OUTPUT)


def draw_views(figure: plt.Figure) -> None:
    augmentation = Augmentation.preset("digits")
    batch = next(iter(open_views("digits", augmentation, IMAGES, seed=3)))
    figure.suptitle("Two views per image")
    axes = figure.subplots(IMAGES, 2)
    for column, views in zip(axes.T, batch.views, strict=True):
        for cell, view in zip(column, views, strict=True):
            cell.imshow(view[0], cmap="gray", vmin=-1, vmax=1)
            cell.axis("off")


def draw_curve(figure: plt.Figure, run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    full = max(record["images"] for record in steps)  # an epoch's last batch is smaller, and so is its loss
    losses = [(record["step"], record["loss"]) for record in steps if record["images"] == full]
    knn = [(record["step"], 100 * record["knn_accuracy"]) for record in records if "knn_accuracy" in record]
    figure.suptitle("NT-Xent loss and kNN accuracy")
    loss_axis = figure.subplots()
    loss_axis.plot(*zip(*losses, strict=True), color="tab:gray", linewidth=1)
    loss_axis.set(xlabel="step", ylabel="loss (gray)")
    accuracy_axis = loss_axis.twinx()
    accuracy_axis.plot(*zip(*knn, strict=True), color="tab:blue", marker="o")
    accuracy_axis.axhline(10, color="tab:blue", linestyle=":", linewidth=1)
    accuracy_axis.text(0, 12, "chance", color="tab:blue")
    for step, accuracy in (knn[0], knn[-1]):
        accuracy_axis.annotate(f"{accuracy:.0f} %", (step, accuracy), (0, -18), textcoords="offset points", ha="center")
    accuracy_axis.set(xlim=(-8, knn[-1][0] + 8), ylim=(0, 100), ylabel="kNN accuracy on held-out digits (%, blue)")


def draw_map(figure: plt.Figure, run: Path) -> None:
    source, encoder = open_source("digits", split="val"), load_encoder(run)
    with torch.inference_mode():
        images = torch.stack([encoder.transform(image.permute(2, 0, 1)) for image in source.images])
        h = torch.nn.functional.normalize(encoder(images)).numpy()
    points = TSNE(init="pca", random_state=0).fit_transform(h)
    figure.suptitle("Representations of held-out digits (t-SNE)")
    axis = figure.subplots()
    axis.axis("off")
    axis.scatter(*points.T, c=source.labels, cmap="tab10", s=14)
    for digit in range(10):
        axis.annotate(str(digit), np.median(points[source.labels == digit], axis=0), size=15, weight="bold")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
