"""The sheet of `fastsimclr.preview`: images, their crops, and their views with what was drawn for each."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsimclr.config import parse
from fastsimclr.data import Source, ViewLoader, choose_backend, open_source, open_views
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.sources import NO_LABEL
from fastsimclr.data.torchvision import decoded
from fastsimclr.reporting.contact_sheet import Cell, Head, Pixels, draw_grid
from fastsimclr.reporting.numbers import count
from fastsimclr.run_folder import check_new, write_atomically

SHOWN = 224  # a view of up to half this side is enlarged by a whole number, one far larger is reduced to it
TEXT_WIDTH = 220  # of a column at least: two changes of color on a line


@dataclass(frozen=True)
class Row:
    """An image of the sheet."""

    name: str
    label: str
    original: Pixels
    views: list[Pixels]
    drawn: list[np.void]
    """What was drawn for each view, of dtype DRAW."""


def write_preview(options: argparse.Namespace, others: list[str]) -> str:
    """Write the sheet; returns the summary line to print.

    options: of fastsimclr.preview. others: options of train.
    """
    check_new(Path(options.output), options.force)
    given = {"data.train": options.data, "data.backend": options.backend, "seed": options.seed}
    config, _ = parse(
        [f"--config={options.config}"] * (options.config is not None)
        + others
        + [f"--{name}={value}" for name, value in given.items() if value is not None]
    )
    assert config.data.train is not None  # the preset of the demonstration names one
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, augmentation = open_source(config.data.train), config.data.augmentation()
    loader = open_views(
        source,
        augmentation,
        min(options.images, len(source)),
        backend=config.data.backend,
        device=device,
        seed=config.seed,
        shuffle=not options.unshuffled,
        workers=config.data.workers or 0,  # one batch: a worker would take longer to start than it does to make it
    )
    try:
        rows = take(loader, config.seed, options.epoch)
    finally:
        loader.close()
    why = choose_backend(source, device)[1] if config.data.backend == "auto" else "as asked"
    by = f"views by {loader.backend} ({why})"
    title = f"{config.data.train}: {len(rows)} of {len(source)} images" + (", unshuffled" if options.unshuffled else "")
    recipe = options.config or ("the defaults" if options.data else "digits, the demonstration's")
    changes = re.split(r" (?=--)", " ".join(others)) if others else []
    notes = [
        [f"recipe: {recipe}", *changes, f"seed {config.seed}", f"epoch {options.epoch}", by],
        describe_recipe(augmentation),
        ["under a view: its crop, width×height at left,top", "then what is done to its colors, in that order"],
    ]
    png, (width, height) = draw_sheet(title, notes, rows, augmentation)
    write_atomically(Path(options.output), lambda file: file.write_bytes(png))
    return (
        f"{options.output}: {width}x{height} pixels, {len(png) / 2**20:.1f} MiB; "
        f"{len(rows)} images of {config.data.train}, {count(augmentation.num_views, 'view')} each; {by}"
    )


# What is on the sheet


def take(loader: ViewLoader, seed: int, epoch: int) -> list[Row]:
    """The first batch of the epoch, with its images as they are and what was drawn for them."""
    source, recipe = loader.source, loader.augmentation
    loader.set_epoch(epoch)
    batches = iter(loader)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator: the loader is to make no more
    index = batch.index.cpu().numpy()
    originals = [decoded(source, i).permute(1, 2, 0).numpy() for i in index]
    sizes = np.array([original.shape[:2] for original in originals])
    params = sample_batch_params(recipe, seed, epoch, index, sizes)
    views = [
        [to_levels(view, of_view) for view in made] for made, of_view in zip(batch.views, recipe.recipes, strict=True)
    ]
    return [
        Row(
            name=source.name(i),
            label=_label(source, int(batch.label[row])),
            original=originals[row],
            views=[of_view[row] for of_view in views],
            drawn=[of_view[row] for of_view in params],
        )
        for row, i in enumerate(index)
    ]


def to_levels(view: Tensor, recipe: Augmentation) -> Pixels:
    """A view (3, S, S) as the encoder gets it, back as levels (S, S, 3) uint8: its normalisation undone."""
    scale, shift = torch.tensor(recipe.std) * 255, torch.tensor(recipe.mean) * 255
    levels = view.to("cpu", torch.float32).permute(1, 2, 0) * scale + shift
    return levels.round().clamp(0, 255).to(torch.uint8).numpy()


def parameters(drawn: np.void, recipe: Augmentation) -> list[list[str]]:
    """What was drawn for a view, in phrases: of the crop; of the jitter, in the order applied; of what comes after it.

    120×98 at 30,12 is the crop's width and height and its left and top, in pixels of the image. An amount of jitter
    that the recipe leaves at 0 is not named.
    """
    top, left, height, width = drawn["box"].tolist()
    crop = [f"{width}×{height} at {left},{top}"] + ["flipped"] * bool(drawn["flip"])
    jitter = []
    if drawn["jitter"]:
        factors = drawn["factors"].tolist()
        strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        names = ("brightness ×{:.2f}", "contrast ×{:.2f}", "saturation ×{:.2f}", "hue {:+.2f}")
        jitter = [names[change].format(factors[change]) for change in drawn["order"] if strengths[change] > 0]
    elif recipe.jitter_prob > 0:
        jitter = ["no jitter"]
    others = ["grayscale"] * bool(drawn["grayscale"])
    others += [f"blur σ {drawn['sigma']:.2g}"] if drawn["sigma"] > 0 else []
    others += ["solarized"] * bool(drawn["solarize"])
    return [crop, jitter, others]


def describe_recipe(recipe: Augmentation) -> list[str]:
    """What all views have in common, in phrases: probabilities, and amounts."""
    phrases = [f"crop of the central {recipe.center_fraction:.4g}"]
    if recipe.crop == "random":
        phrases = [f"crop of {_value(recipe.scale)} of the area, aspect ratio {_value(recipe.ratio)}"]
    phrases[0] += f", {recipe.interpolation} to {recipe.image_size}×{recipe.image_size}"
    amounts = [f"{name} {getattr(recipe, name):.4g}" for name in ("brightness", "contrast", "saturation", "hue")]
    for name, amount in (
        ("flip", ""),
        ("jitter", f" ({', '.join(amounts)})"),
        ("grayscale", ""),
        ("blur", f" (σ {_value(recipe.blur_sigma)})"),
        ("solarize", ""),
    ):
        p = getattr(recipe, f"{name}_prob")
        phrases.append(f"{name} {p:.4g}{amount}" if p > 0 else f"no {name}")
    return phrases


def _own_changes(recipe: Augmentation, view: int) -> list[str]:
    """What differs for this view, but for its size."""
    changes = recipe.per_view[view] if recipe.per_view else {}
    return [f"{name} {_value(value)}" for name, value in changes.items() if name != "image_size"]


def _value(value: Any) -> str:
    """An option's value for people: a range as 0.08–1."""
    if isinstance(value, list | tuple):
        return ("–" if len(value) == 2 else ", ").join(map(_value, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _label(source: Source, label: int) -> str:
    if label == NO_LABEL:
        return ""
    # A tar's classes may be numbers with gaps, which their own place does not find.
    name = source.classes[label] if label < len(source.classes) else ""
    return f", label {label}" + (f" ({name})" if name and not name.isdigit() else "")


# How it is drawn


def draw_sheet(
    title: str, notes: list[list[str]], rows: list[Row], recipe: Augmentation
) -> tuple[bytes, tuple[int, int]]:
    """The sheet as a PNG file's bytes, and its width and height."""
    zoom = _zoom(max(of_view.image_size for of_view in recipe.recipes))  # one for all: a small view looks small
    heads = [Head("image and crops")]
    for view, of_view in enumerate(recipe.recipes):
        shown = [f"shown ×{zoom:.2g}"] if zoom != 1 else []
        size = f"{of_view.image_size}×{of_view.image_size}"
        heads.append(Head(f"view {view + 1}: {size}", shown + _own_changes(recipe, view), view))
    cells = []
    for row in rows:
        height, width = row.original.shape[:2]
        faint = [[row.name], [f"{width}×{height}{row.label}"]]
        boxes = [drawn["box"] for drawn in row.drawn]
        of_row = [Cell(row.original, faint=faint, zoom=_zoom(height, width), crops=boxes)]
        for pixels, drawn, of_view in zip(row.views, row.drawn, recipe.recipes, strict=True):
            of_row.append(Cell(pixels, parameters(drawn, of_view), zoom=zoom))
        cells.append(of_row)
    return draw_grid(title, notes, heads, cells, TEXT_WIDTH)


def _zoom(height: int, width: int | None = None) -> float:
    """How many times its size a picture is shown: a whole number where it is enlarged, so that its pixels stay even."""
    room = min(SHOWN / height, 1.5 * SHOWN / (width or height))
    return float(int(room)) if room >= 1 else 1.0 if room > 0.77 else room
