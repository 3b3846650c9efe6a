"""SPDL in bench_views.py: its pipeline of threads, with FFmpeg's decoder and filters, as its documentation shows.

It needs the shared libraries of FFmpeg 4 to 9, which it does not bring along.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import spdl.io
import torch
from spdl.pipeline import PipelineBuilder
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from benchmarks.view_peers import Photos, Setting, tensor_grid
from fastsimclr import Augmentation


class Spdl:
    """An epoch of SPDL's pipeline. read: loads a file."""

    def __init__(
        self, photos: Photos, setting: Setting, read: Callable[[Augmentation, str], tuple[Tensor, ...]]
    ) -> None:
        self.files, self.setting, self.read = photos.files, setting, functools.partial(read, setting.augmentation)
        spdl.io.load_image(self.files[0])  # raises without FFmpeg

    def __iter__(self) -> Iterator[list[Tensor]]:
        count = len(self.files)
        order = torch.randperm(count) if self.setting.shuffle else torch.arange(count)
        threads = max(1, self.setting.workers)
        pipeline = (
            PipelineBuilder()
            .add_source([self.files[index] for index in order])
            .pipe(self.read, concurrency=threads, output_order="input")
            .aggregate(self.setting.batch_size)
            .pipe(default_collate)
            .add_sink(2)
            .build(num_threads=threads)
        )
        with pipeline.auto_stop():
            yield from pipeline.get_iterator(timeout=60)


def grid(augmentation: Augmentation, file: str) -> tuple[Tensor, ...]:
    return tensor_grid(spdl.io.to_torch(spdl.io.load_image(file)).permute(2, 0, 1))


def crops(augmentation: Augmentation, file: str) -> tuple[Tensor, ...]:
    """Two crops, resized and flipped, (3, S, S). The file is decoded for each, as a filter belongs to the decoding."""
    packets = spdl.io.demux_image(file)
    return crop(augmentation, packets.clone()), crop(augmentation, packets)


def crop(augmentation: Augmentation, packets: Any) -> Tensor:
    frame = torch.empty(3, packets.height, packets.width, device="meta")
    box = v2.RandomResizedCrop(1, augmentation.scale, augmentation.ratio).make_params([frame])
    side = augmentation.image_size
    filters = [
        f"crop={box['width']}:{box['height']}:{box['left']}:{box['top']}",
        f"scale={side}:{side}:flags={augmentation.interpolation}",
        *(["hflip"] if torch.rand(()) < augmentation.flip_prob else []),
        "format=pix_fmts=rgb24",
    ]
    frames = spdl.io.decode_packets(packets, filter_desc=",".join(filters))
    return spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(2, 0, 1)
