"""The lines that a run prints at its start and end."""

import math
import os
from typing import Any

from torch import nn

from fastsimclr import stopping
from fastsimclr._extension import describe_build
from fastsimclr.config import Config, ModelConfig
from fastsimclr.data import ViewLoader, choose_backend
from fastsimclr.data.dataset import Pair
from fastsimclr.distributed import World
from fastsimclr.models import USER_MODULE, Backbone, Encoder
from fastsimclr.models.resnet import SMALL_IMAGE
from fastsimclr.optim import LRSchedule, Recipe
from fastsimclr.precision import Precision
from fastsimclr.profiling import FIRST_TRACED, Trace
from fastsimclr.progress_bar import duration
from fastsimclr.run_folder import RunFolder
from fastsimclr.sharding import is_sharded
from fastsimclr.training.estimate import Estimate
from fastsimclr.training.freeze import Freezing

_EITHER_STEM = 96  # pixels: up to here, people use either stem


def describe_data(config: Config, data: Pair, loader: ViewLoader) -> list[str]:
    """The images, and the backend that loads them, with the reason."""
    source = data.train
    classes = f" in {len(source.classes)} classes" if source.has_labels else ", no labels"
    if isinstance(config.data.val, float):
        assert data.val is not None
        classes += f", and {len(data.val)} held out"
    why = choose_backend(source, loader.device)[1] if config.data.backend == "auto" else "as requested"
    lines = [f"data: {config.data.train}, {len(source)} images{classes}; loaded by {loader.backend} ({why})"]
    if source.bad:
        lines.append(f"data: {len(source.bad)} images are known to be bad, and are replaced by others")
    return lines


def describe_model(
    config: Config, model: nn.Module, freezing: Freezing, precision: Precision, loss_backend: str, world: World
) -> list[str]:
    """The model, the device and the loss."""
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{parameters / 1e6:.1f} M parameters with projector"
    if str(freezing):
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size += f", of which {trainable:,} train (frozen: {freezing})"
    sharded = ", with sharded weights" if any(map(is_sharded, model.parameters())) else ""
    return [
        f"model: {describe_encoder(config.model, model.encoder)}, {size}",  # type: ignore[arg-type]
        f"device: {world.world_size} x {world.device.type}{sharded}, {precision.why}",
        f"loss: NT-Xent, temperature {config.loss.temperature}, backend {loss_backend}",
        describe_build(),
    ]


def describe_encoder(config: ModelConfig, encoder: Encoder | Backbone) -> str:
    """The encoder as it was built."""
    spec = encoder.spec
    images = f"{spec.channels} x {spec.image_size} x {spec.image_size}"
    if isinstance(encoder, Encoder):
        stem = f"{spec.stem} stem"
        if config.stem == "auto" and spec.image_size <= _EITHER_STEM:
            others = "medium takes about a quarter of the operations, imagenet a sixteenth"
            if spec.stem == "imagenet":
                others = "medium takes about 4 times the operations, small 16 times"
            stem += f" (auto: small up to {SMALL_IMAGE} pixels; --model.stem {others})"
        built = f"{spec.name} x{spec.width:g}, {stem}"
    elif spec.name == USER_MODULE:
        built = f"a module of your own, {config.encoder.removeprefix('object:')}"
    else:
        built = spec.name
    return f"{built}, images {images}, {encoder.out_features} features"


def describe_schedule(recipe: Recipe, schedule: LRSchedule) -> str:
    """The optimizer and its hyperparameters, with the reasons for those that are automatic."""
    return f"optimizer: {recipe}; {schedule.warmup_steps} warm-up steps of {schedule.total_steps}"


def describe_estimate(config: Config, estimate: Estimate, steps: int) -> list[str]:
    """The estimated time of a run on a CPU, with options that help if it exceeds a day or the memory."""
    seconds = estimate.step_seconds * steps
    lines = [f"estimate: {duration(estimate.step_seconds)} per step, {duration(seconds)} for {steps:,} steps"]
    if seconds > 86400:
        smaller = []
        if config.model.encoder != "resnet18":
            smaller.append("--model.encoder resnet18")
        if config.data.image_size > 96:
            smaller.append("--data.image_size 96")
        if config.epochs > 10:
            smaller.append("--epochs 10")
        options = " ".join(smaller) or f"--max_steps {steps // 10}"
        lines.append(f"this is more than a day: use a GPU, or shorten the run, e.g. {options}")
    assert not isinstance(config.micro_batch_size, str)  # auto is a number by now
    images = config.micro_batch_size or config.batch_size
    needed, memory = estimate.activation_bytes * images, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        fitting = max(2, images >> math.ceil(math.log2(2 * needed / memory)))  # half of the memory, for everything else
        lines.append(
            f"activations will need about {needed / 2**30:.0f} GiB, but this machine has {memory / 2**30:.0f} GiB: "
            f"use --micro_batch_size {fitting}"
        )
    return lines


def describe_stop(stop_signal: int, step: int, folder: RunFolder) -> str:
    by = stopping.describe(stop_signal) if stop_signal else "a callback"
    return f"stopped by {by} at step {step}; rerun with --output {folder} to resume"


def describe_result(
    last: dict[str, Any], data: Pair, accuracies: dict[str, float], untrained_knn: float | None, folder: RunFolder
) -> list[str]:
    """The results. last: the record of the last step; accuracies: from `measure_accuracy` after it, if measured."""
    lines = [f"trained {last['step']} steps, last loss {last['loss']:.4f}"]
    if accuracies:
        where = f"{len(data.val)} held-out images" if data.val is not None else "the training images, leave-one-out"
        untrained = f" trained, {untrained_knn:.1%} untrained" if untrained_knn is not None else ""
        lines.append(f"kNN accuracy on {where}: {accuracies['knn_accuracy']:.1%}{untrained}")
    if "probe_accuracy" in accuracies:
        lines.append(f"linear probe, trained beside the encoder: {accuracies['probe_accuracy']:.1%}")
    has_tensorboard = folder.tensorboard.is_dir()
    return [
        *lines,
        f"files: {folder}: checkpoints/last.pt, metrics.jsonl, config.yaml" + ", tensorboard/" * has_tensorboard,
        f"next: fastsimclr report {folder}" + f", or tensorboard --logdir {folder.tensorboard}" * has_tensorboard,
    ]


def describe_trace(trace: Trace) -> str:
    if not trace.is_written:
        return f"no trace: tracing starts {FIRST_TRACED} steps after the start, and this run had fewer"
    return f"trace: {trace.file}, for ui.perfetto.dev or chrome://tracing"
