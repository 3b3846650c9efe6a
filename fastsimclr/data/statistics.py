"""Measure the mean and the standard deviation of a source's channels."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.pixels import count_channels
from fastsimclr.data.sources import Source, WrongForm, decoded
from fastsimclr.distributed import SINGLE_PROCESS, World, gather_objects, run_on_all_ranks
from fastsimclr.errors import UserError

MAX_IMAGES = 1000


def with_statistics(
    augmentation: Augmentation, source: Source, world: World = SINGLE_PROCESS
) -> tuple[Augmentation, str | None]:
    """Replace a `mean` or `std` of "auto" by the source's, and return a line that states them; None if both are given.

    ImageNet's values, the defaults, are replaced too if the images do not have three channels.
    Up to 1,000 images, evenly spaced in the source, are measured, without bad ones. The ranks share
    them, and all return the same result.
    """
    channels = source.pixels.channels
    why = ""
    if channels != 3 and (augmentation.mean, augmentation.std) == (Augmentation.mean, Augmentation.std):
        augmentation = replace(augmentation, mean="auto", std="auto")
        why = f", as the images have {count_channels(channels)}"
    if "auto" not in (augmentation.mean, augmentation.std):
        return augmentation, None
    mean, std, images = measure(source, world)
    if augmentation.std == "auto" and min(std) == 0:
        raise UserError(
            f"--data.std: got auto, but channel {std.index(0)} has the same value in all {images} images measured; "
            "expected channels that differ: remove it, or give --data.mean and --data.std"
        )
    measured = {name: value for name, value in (("mean", mean), ("std", std)) if getattr(augmentation, name) == "auto"}
    values = ", ".join(f"{name} {' '.join(f'{x:.4g}' for x in value)}" for name, value in measured.items())
    augmentation = replace(augmentation, **measured)  # type: ignore[arg-type]  # only these two
    return augmentation, f"channels: {values} (measured on {images} images{why})"


def measure(source: Source, world: World = SINGLE_PROCESS) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Return mean and standard deviation of each channel in [0, 1], and the number of images measured."""
    selected = np.linspace(0, len(source) - 1, min(len(source), MAX_IMAGES)).astype(np.int64)
    own = selected[world.rank :: world.world_size]

    def moments(index: int) -> NDArray[np.float64]:
        try:
            if index in source.bad:
                raise UserError(source.bad[index])
            pixels = source.pixels.to_unit(decoded(source, index)).flatten(1).double()
        except WrongForm:
            raise
        except UserError:  # replaced when it is met
            return np.full((2, source.pixels.channels), np.nan)
        return torch.stack([pixels.mean(1), pixels.square().mean(1)]).numpy()

    def measure_own() -> NDArray[np.float64]:
        cores = len(os.sched_getaffinity(0)) if source.thread_safe else 1
        with ThreadPoolExecutor(cores, thread_name_prefix="fastsimclr-measure") as threads:
            return np.array(list(threads.map(moments, own.tolist())))

    parts = gather_objects(run_on_all_ranks(measure_own, world), world)
    of_images = np.empty((len(selected), 2, source.pixels.channels))
    for rank, part in enumerate(parts):  # in the order of the images, so that the sum is the same for any ranks
        of_images[rank :: world.world_size] = part.reshape(-1, *of_images.shape[1:])
    of_images = of_images[~np.isnan(of_images[:, 0, 0])]
    if not len(of_images):
        raise UserError(f"data: got {len(selected)} images to measure mean and std on, none of which can be used")
    mean, square = of_images.mean(0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    std[std < 1e-6] = 0  # rounding errors of a constant
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist()), len(of_images)
