"""Compute the features of all images, draw a map of them and a gallery of nearest neighbors, and write the files."""

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import is_built_in, open_dataset
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.data.params import epoch_order
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.scan import SKIPPED_FILE, write_skipped_images
from fastsimclr.data.sources import NO_LABEL
from fastsimclr.distributed import World, run_on_all_ranks
from fastsimclr.environment import installed
from fastsimclr.errors import UserError
from fastsimclr.evaluation import neighbors
from fastsimclr.evaluation.config import FEATURE_FORMATS, PREPROCESSING
from fastsimclr.evaluation.feature_file import FeatureFile, expect_one_disk
from fastsimclr.evaluation.features import check_images, embed_batches, gather_bad
from fastsimclr.evaluation.labeled import explain_recorded_path
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.precision import Precision, choose_precision
from fastsimclr.pretrained import Pretrained, describe, open_checkpoint
from fastsimclr.reporting import embedding_pictures
from fastsimclr.run_folder import GALLERY, MAP, RunFolder, check_output, write_atomically

MIN_IMAGES = 10  # with fewer, a map and nearest neighbors say nothing
MAX_MAPPED = 5000  # UMAP and t-SNE take up to a minute for this many, and a map has no room for more
NEIGHBORS = 8


@dataclass(frozen=True)
class Embedding:
    """The inputs of an embedding, opened and checked, and its output folder."""

    pretrained: Pretrained
    augmentation: Augmentation
    data: str
    """A path, or a built-in dataset."""
    source: Source
    available: int
    """Number of images before --images selects a sample."""
    output: Path
    precision: Precision
    method: str
    """Method of the map: umap, tsne, pca or none."""
    method_reason: str

    @property
    def data_title(self) -> str:
        """The data, as named in titles and messages."""
        return f"{self.data} (held-out part)" if is_built_in(self.data) else self.data


def embed_images(options: argparse.Namespace, world: World) -> None:
    """Run the embed command: write its files, and print a summary on rank 0."""
    if world.device.type == "cpu":
        keep_freed_memory()
    embedding = _open(options, world)
    started = time.perf_counter()
    metadata = {"checkpoint": str(options.checkpoint), "origin": embedding.pretrained.origin, "data": embedding.data}
    path = embedding.output / f"features.{options.format}"
    features = FeatureFile(path, embedding.source, embedding.pretrained.encoder.out_features, metadata)
    try:
        run_on_all_ranks(features.create if world.is_rank_zero else lambda: None, world)
        expect_one_disk(features.partial, world)
        run_on_all_ranks(lambda: features.fill(_batches(embedding, options, world)), world)
        gather_bad(embedding.source, world)
        seconds = time.perf_counter() - started
        if world.is_rank_zero:
            skipped = embedding.source.describe_bad()
            if skipped:
                good = np.setdiff1d(np.arange(len(embedding.source)), list(embedding.source.bad))
                embedding = replace(embedding, source=embedding.source.subset(good))
                features.keep(good, embedding.source)
            record = _record(embedding, options, world, seconds) | {
                "skipped_images": len(skipped),
                "images_there": embedding.available,
            }
            write_skipped_images(embedding.output, skipped)
            _publish(embedding, features, record)
    finally:
        if world.is_rank_zero:
            features.discard()
    if world.is_rank_zero:
        made = _draw(embedding, options, features.open())
        print(_summary(embedding, record, [features.path.name, "images.csv", "embed.json", *made]), flush=True)


def _open(options: argparse.Namespace, world: World) -> Embedding:
    """Check the options and open the images. Raises UserError on all ranks if an option is invalid."""
    available = 0

    def check() -> tuple[Path, Pretrained, str]:
        output = Path(options.output) if options.output else RunFolder.for_results(options.checkpoint).embed
        for kind in FEATURE_FORMATS:
            check_output(output / f"features.{kind}", options.force)
        pretrained = open_checkpoint(options.checkpoint, options.encoder)
        data = options.data or (pretrained.config or {}).get("data", {}).get("train")
        if data is None:
            raise UserError(
                f"--data: got none, and {options.checkpoint} does not say what it was trained on; expected a folder of "
                "images, tar shards, digits, cifar10[:ROOT] or stl10[:ROOT]"
            )
        return output, pretrained, data

    def select(train: Source, val: Source | None) -> tuple[Source, None]:
        """Select the held-out part of a built-in dataset, and the sample of --images."""
        nonlocal available
        source = train if val is None else val
        available = len(source)
        if options.images is not None and options.images < available:
            source = source.subset(np.sort(epoch_order(options.seed, 0, available)[: options.images]))
        return source, None

    output, pretrained, data = run_on_all_ranks(check, world)
    method, why = run_on_all_ranks(lambda: neighbors.choose_method(options.map), world)
    with explain_recorded_path(options.checkpoint, pretrained):
        source, _ = open_dataset(
            data,
            None,
            world=world,
            backend=options.backend,
            cache=options.cache,
            pixels=PixelOptions.from_config((pretrained.config or {}).get("data", {})),
            select=select,
        )
    augmentation = replace((pretrained.augmentation or Augmentation()).for_evaluation(), **options.preprocessing)
    check_images(pretrained.encoder, source, augmentation)
    return Embedding(
        pretrained=pretrained,
        augmentation=augmentation,
        data=data,
        source=source,
        available=available,
        output=output,
        precision=choose_precision(options.precision, world.device),
        method=method,
        method_reason=why,
    )


# Features


def _batches(
    embedding: Embedding, options: argparse.Namespace, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    torch.backends.cudnn.benchmark = True
    model = embedding.pretrained.encoder.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return embed_batches(
        model,
        embedding.source,
        embedding.augmentation,
        LoaderConfig(
            batch_size=options.batch_size,
            backend=options.backend,
            world=world,
            workers=options.workers,
            max_bad=options.max_bad,
        ),
        autocast=embedding.precision.autocast,
        title="embedding",
    )


# Output files


def _record(embedding: Embedding, options: argparse.Namespace, world: World, seconds: float) -> dict[str, Any]:
    """The record of how the features were computed: the contents of embed.json."""
    model = embedding.pretrained.encoder
    images = len(embedding.source)
    return {
        "checkpoint": str(options.checkpoint),
        "origin": embedding.pretrained.origin,
        "encoder": asdict(model.spec),
        "data": embedding.data,
        "split": "val" if is_built_in(embedding.data) else None,
        "images": images,
        "features": model.out_features,
        "classes": len(neighbors.class_names(embedding.source)),
        "recipe": {name: getattr(embedding.augmentation, name) for name in PREPROCESSING},
        "recipe_is": "the checkpoint's" if embedding.pretrained.augmentation is not None else "the default",
        "precision": embedding.precision.why,
        "device": f"{world.world_size} x {world.device.type}",
        "seed": options.seed,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "versions": {name: installed(name) for name in ("fastsimclr", "torch", "torchvision", "numpy")},
    }


def _publish(embedding: Embedding, features: FeatureFile, record: dict[str, Any]) -> None:
    """Write all files, the features last: if they exist, the other files belong to them."""
    output = embedding.output
    for name in (*(f"features.{kind}" for kind in FEATURE_FORMATS), MAP, GALLERY):
        (output / name).unlink(missing_ok=True)
    write_atomically(output / "images.csv", lambda file: _write_images(file, embedding.source))
    write_atomically(output / "embed.json", lambda file: file.write_text(json.dumps(record, indent=2) + "\n"))
    features.publish()


def _write_images(path: Path, source: Source) -> None:
    names = neighbors.class_names(source)
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # names may be any bytes
        writer = csv.writer(file)
        writer.writerow(["row", "image", "label", "class"])
        for row, label in enumerate(source.labels.tolist()):
            known = label != NO_LABEL
            writer.writerow([row, source.name(row), label if known else "", names[label] if known else ""])


def _draw(embedding: Embedding, options: argparse.Namespace, features: NDArray[np.float32]) -> list[str]:
    """Draw the map and the gallery; returns phrases for the summary line."""
    if len(features) < MIN_IMAGES:
        return [f"no pictures of only {len(features)} images"] if embedding.method != "none" or options.gallery else []
    model = embedding.pretrained.encoder
    by = f"encoder: {describe(model.spec)} ({model.out_features:,} features), {embedding.pretrained.origin}"
    made = [_draw_map(embedding, options, features, by)] if embedding.method != "none" else []
    if options.gallery:
        queries = neighbors.choose_queries(embedding.source.labels, options.gallery, options.seed)
        cosines, nearest = neighbors.nearest(features, queries, NEIGHBORS)
        notes = [
            by,
            f"queries sampled with seed {options.seed}; neighbors by cosine similarity among {len(features):,} images",
            f"each image is center-cropped to {embedding.augmentation.center_fraction:.3g}, as for the encoder",
        ]
        names, title = neighbors.class_names(embedding.source), f"{embedding.data_title}: nearest neighbors"
        png = embedding_pictures.draw_gallery(
            title, notes, embedding.source, embedding.augmentation, names, queries, cosines, nearest
        )
        write_atomically(embedding.output / GALLERY, lambda file: file.write_bytes(png))
        made.append(GALLERY)
    return made


def _draw_map(embedding: Embedding, options: argparse.Namespace, features: NDArray[np.float32], by: str) -> str:
    shown = np.arange(len(features))
    if len(features) > MAX_MAPPED:
        shown = np.sort(epoch_order(options.seed, 0, len(features))[:MAX_MAPPED])
    method, why = embedding.method, embedding.method_reason
    if sys.stderr.isatty():
        print("computing the map, which may take a minute", file=sys.stderr)
    try:
        points = neighbors.project(features[shown], method, options.seed)
    except ImportError as error:  # usually of one of umap-learn's dependencies
        broken = f"umap-learn cannot be imported: {str(error).splitlines()[0]}"
        if options.map == "umap":
            raise UserError(f"--map: got umap, but {broken}; repair umap-learn, or use tsne") from error
        method, why = "tsne", broken
        points = neighbors.project(features[shown], method, options.seed)
    name = neighbors.METHODS[method]
    components = min(neighbors.COMPONENTS, len(shown), features.shape[1])
    projected = "" if method == "pca" else f" of the first {components} principal components"
    is_sample = len(shown) < len(features) or (options.images or embedding.available) < embedding.available
    sampled = f" of {embedding.available:,}, sampled with seed {options.seed}" if is_sample else ""
    notes = [by, f"{name}{projected} of the normalized features", f"{len(shown):,} images{sampled}"]
    labels, names = embedding.source.labels[shown], neighbors.class_names(embedding.source)
    png = embedding_pictures.draw_map(f"{embedding.data_title}: {name} map", notes, points, labels, names)
    write_atomically(embedding.output / MAP, lambda file: file.write_bytes(png))
    return f"{MAP} ({name}: {why})" if why else f"{MAP} ({name})"


def _summary(embedding: Embedding, record: dict[str, Any], made: list[str]) -> str:
    line = (
        f"{embedding.output}: {', '.join(made)}; {record['images']} images of {embedding.data_title}, "
        f"{record['features']} features each, {record['images_per_second']:.0f} images/s, {embedding.precision.why}"
    )
    if embedding.pretrained.augmentation is None:
        size = embedding.augmentation.image_size
        line += f"; prepared with the default options at {size} pixels, because the checkpoint does not record its own"
    if record["skipped_images"]:
        line += f"; left out {record['skipped_images']} that cannot be used, see {SKIPPED_FILE}"
    return line.encode(errors="replace").decode()  # a path may hold any byte
