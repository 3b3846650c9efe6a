"""The contact sheet of fastsimclr.preview: images, their crops, and their views with the sampled parameters."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsimclr.config import parse
from fastsimclr.data import Source, ViewLoader, choose_backend, open_source, open_views
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import print_notes
from fastsimclr.data.detect import detect_pixels
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.sources import NO_LABEL, ArraySource, decoded
from fastsimclr.errors import UserError
from fastsimclr.reporting.contact_sheet import Cell, Head, Pixels, draw_grid
from fastsimclr.reporting.numbers import count
from fastsimclr.run_folder import check_output, write_atomically

SHOWN = 224  # pixels; smaller views are enlarged by a whole number, much larger ones are reduced to it
TEXT_WIDTH = 220  # minimum column width in pixels: two color operations per line


@dataclass(frozen=True)
class Row:
    """A row of the sheet: an image and its views."""

    name: str
    label: str
    original: Pixels
    views: list[Pixels]
    params: list[np.void]
    """The sampled parameters of each view, of dtype VIEW_PARAMS."""


def write_preview(options: argparse.Namespace, others: list[str]) -> str:
    """Write the sheet and return the summary line to print.

    options: of fastsimclr.preview; others: command line options of train.
    """
    check_output(Path(options.output), options.force)
    given = {"data.train": options.data, "data.backend": options.backend, "seed": options.seed}
    config = parse(
        [f"--config={options.config}"] * (options.config is not None)
        + others
        + [f"--{name}={value}" for name, value in given.items() if value is not None]
    )
    assert config.data.train is not None  # parse() sets it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, augmentation = open_source(config.data.train), config.data.augmentation()
    detect_pixels(source, config.data.pixel_options())
    print_notes(source, config.data.train)
    backend, why = (
        choose_backend(source, device) if config.data.backend == "auto" else (config.data.backend, "as requested")
    )
    if backend == "memory" and not isinstance(source, ArraySource):
        backend, why = "torchvision", "it reads only the images shown"
    shown = _shown_channels(options.show_channels, source.pixels.channels)
    loader = open_views(
        source,
        augmentation,
        min(options.images, len(source)),
        backend=backend,
        device=device,
        pixels=config.data.pixel_options(),
        seed=config.seed,
        shuffle=not options.unshuffled,
        workers=config.data.workers or 0,  # a worker would take longer to start than to load one batch
    )
    try:
        rows = first_batch(loader, config.seed, options.epoch, shown)
        augmentation = loader.augmentation
    finally:
        loader.close()
    by = f"loaded by {loader.backend} ({why})"
    title = f"{config.data.train}: {len(rows)} of {len(source)} images" + (", unshuffled" if options.unshuffled else "")
    config_name = options.config or ("the defaults" if options.data else "digits, of the demonstration")
    changes = re.split(r" (?=--)", " ".join(others)) if others else []
    notes = [
        [f"configuration: {config_name}", *changes, f"seed {config.seed}", f"epoch {options.epoch}", by],
        describe_augmentation(augmentation),
        ["below a view: its crop, width×height at left,top", "then its color operations, in the order applied"],
    ]
    png, (width, height) = draw_sheet(title, notes, rows, augmentation)
    write_atomically(Path(options.output), lambda file: file.write_bytes(png))
    return (
        f"{options.output}: {width}x{height} pixels, {len(png) / 2**20:.1f} MiB; "
        f"{len(rows)} images of {config.data.train}, {count(augmentation.num_views, 'view')} each; {by}"
    )


# Content of the sheet


def first_batch(loader: ViewLoader, seed: int, epoch: int, shown: Sequence[int] = (0, 1, 2)) -> list[Row]:
    """Return the first batch of the epoch, with the original images and the sampled parameters.

    shown: the channels that are shown as red, green and blue.
    """
    source, augmentation = loader.source, loader.augmentation
    loader.set_epoch(epoch)
    batches = iter(loader)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator: stop the loader
    index = batch.index.cpu().numpy()
    originals = [source.pixels.for_display(decoded(source, i), shown).numpy() for i in index]
    sizes = np.array([original.shape[:2] for original in originals])
    params = sample_batch_params(augmentation, seed, epoch, index, sizes)
    views = [
        [to_levels(view, of_view, shown) for view in batch_of_view]
        for batch_of_view, of_view in zip(batch.views, augmentation.recipes, strict=True)
    ]
    return [
        Row(
            name=source.name(i),
            label=_label(source, int(batch.label[row])),
            original=originals[row],
            views=[of_view[row] for of_view in views],
            params=[of_view[row] for of_view in params],
        )
        for row, i in enumerate(index)
    ]


def to_levels(view: Tensor, augmentation: Augmentation, shown: Sequence[int] = (0, 1, 2)) -> Pixels:
    """Convert the channels `shown` of a normalized view (C, S, S) to pixels (S, S, 3) uint8."""
    shift, scale = (torch.tensor(values) * 255 for values in augmentation.statistics)
    levels = view.to("cpu", torch.float32).permute(1, 2, 0) * scale + shift
    return levels[..., list(shown)].round().clamp(0, 255).to(torch.uint8).numpy()


def _shown_channels(asked: tuple[int, ...] | None, channels: int) -> tuple[int, ...]:
    if asked is None:
        return (0, 1, 2) if channels >= 3 else (0, 0, 0)
    if max(asked) >= channels:
        raise UserError(f"--show_channels: got {max(asked)}, expected 0 to {channels - 1}")
    return asked


def describe_params(params: np.void, augmentation: Augmentation) -> list[list[str]]:
    """Describe the sampled parameters of a view in phrases: the crop, the jitter in the order applied, the rest.

    120×98 at 30,12 is the crop's width and height, left and top, in pixels of the image. Kinds of jitter whose strength
    is 0 are left out.
    """
    top, left, height, width = params["box"].tolist()
    crop = [f"{width}×{height} at {left},{top}"] + ["flipped"] * bool(params["flip"])
    crop += ["flipped vertically"] * bool(params["vertical_flip"])
    crop += [f"rotated by {90 * int(params['quarter_turns'])}°"] if params["quarter_turns"] else []
    jitter = []
    if params["jitter"]:
        factors = params["factors"].tolist()
        strengths = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
        names = ("brightness ×{:.2f}", "contrast ×{:.2f}", "saturation ×{:.2f}", "hue {:+.2f}")
        jitter = [names[kind].format(factors[kind]) for kind in params["order"] if strengths[kind] > 0]
    elif augmentation.jitter_prob > 0:
        jitter = ["no jitter"]
    if augmentation.gain > 0:
        jitter.append("gain " + " ".join(f"×{factor:.2f}" for factor in params["gain"][: augmentation.channels]))
    others = ["grayscale"] * bool(params["grayscale"])
    others += [f"blur σ {params['sigma']:.2g}"] if params["sigma"] > 0 else []
    others += ["solarized"] * bool(params["solarize"])
    others += [f"channel {params['dropped'] - 1} dropped"] if params["dropped"] else []
    return [crop, jitter, others]


def describe_augmentation(augmentation: Augmentation) -> list[str]:
    """Describe what all views have in common in phrases: probabilities and strengths."""
    phrases = [f"crop of the central {augmentation.center_fraction:.4g}"]
    if augmentation.crop == "random":
        phrases = [f"crop of {_value(augmentation.scale)} of the area, aspect ratio {_value(augmentation.ratio)}"]
    phrases[0] += f", {augmentation.interpolation} to {augmentation.image_size}×{augmentation.image_size}"
    jitter = [f"{name} {getattr(augmentation, name):.4g}" for name in ("brightness", "contrast", "saturation", "hue")]
    for name, details in (
        ("flip", ""),
        ("jitter", f" ({', '.join(jitter)})"),
        ("grayscale", ""),
        ("blur", f" (σ {_value(augmentation.blur_sigma)})"),
        ("solarize", ""),
    ):
        p = getattr(augmentation, f"{name}_prob")
        phrases.append(f"{name} {p:.4g}{details}" if p > 0 else f"no {name}")
    new = ("vertical_flip_prob", "rotate90_prob", "gain", "channel_drop_prob")
    phrases += [f"{name} {getattr(augmentation, name):.4g}" for name in new if getattr(augmentation, name) > 0]
    return phrases


def _describe_overrides(augmentation: Augmentation, view: int) -> list[str]:
    """Describe the options that this view overrides, except its size."""
    overrides = augmentation.per_view[view] if augmentation.per_view else {}
    return [f"{name} {_value(value)}" for name, value in overrides.items() if name != "image_size"]


def _value(value: Any) -> str:
    """Format an option's value; a range as 0.08–1."""
    if isinstance(value, list | tuple):
        return ("–" if len(value) == 2 else ", ").join(map(_value, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _label(source: Source, label: int) -> str:
    if label == NO_LABEL:
        return ""
    # The labels of tar shards may have gaps, so that they do not index the classes.
    name = source.classes[label] if label < len(source.classes) else ""
    return f", label {label}" + (f" ({name})" if name and not name.isdigit() else "")


# Layout of the sheet


def draw_sheet(
    title: str, notes: list[list[str]], rows: list[Row], augmentation: Augmentation
) -> tuple[bytes, tuple[int, int]]:
    """Draw the sheet; returns a PNG file's bytes, and its width and height."""
    # The same for all views, so that small views look small.
    zoom = _zoom(max(of_view.image_size for of_view in augmentation.recipes))
    heads = [Head("image and crops")]
    for view, of_view in enumerate(augmentation.recipes):
        shown = [f"shown ×{zoom:.2g}"] if zoom != 1 else []
        size = f"{of_view.image_size}×{of_view.image_size}"
        heads.append(Head(f"view {view + 1}: {size}", shown + _describe_overrides(augmentation, view), view))
    cells = []
    for row in rows:
        height, width = row.original.shape[:2]
        faint = [[row.name], [f"{width}×{height}{row.label}"]]
        boxes = [params["box"] for params in row.params]
        of_row = [Cell(row.original, faint=faint, zoom=_zoom(height, width), crops=boxes)]
        for pixels, params, of_view in zip(row.views, row.params, augmentation.recipes, strict=True):
            of_row.append(Cell(pixels, describe_params(params, of_view), zoom=zoom))
        cells.append(of_row)
    return draw_grid(title, notes, heads, cells, TEXT_WIDTH)


def _zoom(height: int, width: int | None = None) -> float:
    """The zoom factor of a picture: a whole number if enlarged, so that all pixels have the same size."""
    room = min(SHOWN / height, 1.5 * SHOWN / (width or height))
    return float(int(room)) if room >= 1 else 1.0 if room > 0.77 else room
