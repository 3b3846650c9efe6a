"""The images of a run: open and check them, and set the options that depend on them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsimclr import distributed
from fastsimclr.config import Config
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import Pair, check_augmentation, open_pair
from fastsimclr.data.names import Names
from fastsimclr.data.paths import absolute_path
from fastsimclr.data.pixels import RGB8, dtype_name
from fastsimclr.data.sources import EncodedSource, Source
from fastsimclr.data.statistics import with_statistics
from fastsimclr.data.subsets import check_classes
from fastsimclr.distributed import World, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.run_folder import RunFolder, replace_atomically


def open_images(config: Config, train: Any, val: Any, world: World, *, rgb_optional: bool) -> tuple[Pair, Config]:
    """Open the training and validation images without decoding files; return them and the configuration.

    train, val: objects to open instead of the paths of the configuration, or None.
    rgb_optional: turn off hue, saturation and grayscale for images that are not RGB; otherwise they are an error.
    Raises UserError on all ranks if the images do not fit each other or the augmentation.
    """
    train = config.data.train if train is None else train
    val = config.data.val if val is None else val
    data, needs_labels = config.data, config.knn_every > 0 or val is not None
    pair = open_pair(
        train,
        val,
        world,
        data.pixel_options(),
        data.workers,
        config.seed,
        labels=needs_labels,
        storage=data.storage_options(),
        cache=data.cache,
    )
    channels = pair[0].pixels.channels
    if rgb_optional and channels != 3:
        config = replace(config, data=config.data.without_rgb())
        if world.is_rank_zero:
            print(f"augmentation: no hue, saturation and grayscale, because the images have {channels} channels")

    def check() -> None:
        opened, held_out = pair
        check_augmentation(config.data.augmentation(), opened)
        if val is None or held_out is None:
            return
        if not (opened.has_labels and held_out.has_labels):
            raise UserError("--data.val: got images without labels in it or in --data.train; kNN accuracy needs both")
        check_classes(opened.classes, held_out.classes)

    run_on_all_ranks(check, world)
    return pair, config


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths of the images and the output, for the record."""
    data, output = config.data, config.output
    assert data.train is not None
    val = absolute_path(data.val) if isinstance(data.val, str) else data.val
    data = replace(data, train=absolute_path(data.train), val=val)
    return replace(config, data=data, output=None if output is None else os.path.abspath(output))


def record_images(source: Source, folder: RunFolder) -> None:
    """Record which images a run is for, so that it can be resumed after files have appeared or vanished."""
    if not isinstance(source, EncodedSource):
        return
    text, ends = source.keys().arrays()
    class_text, class_ends = Names.of(source.classes).arrays()
    with replace_atomically(folder.images) as partial, open(partial, "wb") as file:
        np.savez_compressed(
            file,
            digest=np.frombuffer(source.digest(), np.uint8),
            text=text,
            ends=ends,
            labels=source.labels,
            class_text=class_text,
            class_ends=class_ends,
        )


def as_recorded(source: Source, checkpoint: Path | None, world: World) -> Source:
    """Return the images in the order of the run that is resumed from `checkpoint`: the same unless files have changed.

    Only rank zero needs to see the run's folder.
    """
    run = RunFolder.of(checkpoint)
    if run is None or not isinstance(source, EncodedSource):
        return source
    is_recorded = distributed.broadcast_object(run.images.exists(), world)
    if not is_recorded:
        return source

    def load(*names: str) -> Any:
        return run_on_all_ranks(lambda: _load(run.images, names) if world.is_rank_zero else None, world)

    digest = distributed.broadcast_object(load("digest"), world)[0].tobytes()
    if all(distributed.gather_objects(digest == source.digest(), world)):
        return source
    names = "text", "ends", "labels", "class_text", "class_ends"
    text, ends, labels, class_text, class_ends = distributed.broadcast_object(load(*names), world)
    aligned = source.aligned(Names(text, ends), labels, list(Names(class_text, class_ends)))
    if world.is_rank_zero:
        for note in aligned.notes[len(source.notes) :]:
            print(f"data: {note}", flush=True)
    return aligned


def _load(file: Path, names: Sequence[str]) -> list[NDArray[Any]]:
    """Return arrays of the record of a run's images. Raises UserError if the file is damaged."""
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except Exception as error:  # of zipfile, zlib or NumPy, depending on the byte
        raise UserError(
            f"{file}: got a file that cannot be read ({error or type(error).__name__}), expected the names of the "
            "images of the run; remove it to resume with those that are found now"
        ) from error


def record_pixels(
    config: Config, augmentation: Augmentation, images: Source, world: World
) -> tuple[Config, Augmentation, str | None]:
    """Measure mean and std where they are "auto", and record them, and the images' format if it is not 8-bit RGB.

    Returns the configuration and the augmentation with these options, and a line to print about measured ones.
    """
    augmentation, measured = with_statistics(augmentation, images, world)
    options: dict[str, Any] = {"mean": augmentation.mean, "std": augmentation.std}
    if images.pixels != RGB8:
        options["pixels"], options["channels"] = dtype_name(images.pixels.dtype), images.pixels.channels
        options["value_range"] = images.pixels.value_range
    return replace(config, data=replace(config.data, **options)), augmentation, measured
