"""Two augmented views of each image: our loaders and torchvision's transforms in a DataLoader, in images a second.

    python -m pytest benchmarks/bench_views.py --benchmark-json=benchmarks/results/views-DEVICE.json

A call is a whole epoch of few images, so that no contender works ahead while another is timed; filling a pipeline is
in it for everybody. The worker has a core of its own: the photometric op's threads are one fewer than the cores, as
threads that wait for one another on shared cores made it several times slower and the figures meaningless.
Photographs are those of ../shared/data/photos where they are, else synthetic ones of their size.
"""

import os
import tarfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.bench_optimizer import settle_heap
from benchmarks.interleaved import interleave
from fastsimclr import Views
from fastsimclr.data import ViewLoader, open_source, open_views
from fastsimclr.data.sources import ArraySource

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos" / "flowers_300.tar"
PHOTOS, BATCH, WORKERS, ROUNDS = 64, 32, 1, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def photographs(folder: Path) -> str:
    """PHOTOS JPEG files in `folder`; returns where they are from."""
    if SHARED.is_file():
        with tarfile.open(SHARED) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            for number, member in enumerate(members[:: len(members) // PHOTOS][:PHOTOS]):
                content = tar.extractfile(member)
                assert content is not None
                (folder / f"{number:03}.jpg").write_bytes(content.read())
        return SHARED.name
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):  # coarse blobs and fine noise: 500×400, about 110 KB
        blobs = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
        smooth = np.asarray(blobs.resize((500, 400), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:03}.jpg", quality=92)
    return "synthetic"


class Peer(Dataset[tuple[Tensor, Tensor]]):
    """The recipe as it is usually written: torchvision's transforms on a PIL image, twice."""

    def __init__(self, images: list[str] | NDArray[np.uint8], views: Views) -> None:
        self.images = images
        jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
        window = max(3, int(views.image_size * views.blur_kernel) // 2 * 2 + 1)
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(views.image_size, views.scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(views.flip),
                v2.RandomApply([jitter], views.jitter),
                v2.RandomGrayscale(views.grey),
                v2.RandomApply([v2.GaussianBlur(window, views.blur_sigma)], views.blur),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(views.mean), list(views.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        opened = Image.open(image).convert("RGB") if isinstance(image, str) else Image.fromarray(image)
        return self.transform(opened), self.transform(opened)


def peer(images: list[str] | NDArray[np.uint8], views: Views, batch_size: int) -> "DataLoader[tuple[Tensor, Tensor]]":
    return DataLoader(
        Peer(images, views),
        batch_size,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )


def compare(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    title: str,
    loaders: dict[str, Iterable[object]],
    images: int,
    views: Views,
) -> None:
    """Time an epoch of each loader in alternation; print and record images a second."""

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores - WORKERS))
    settle_heap()

    def epoch(loader: Iterable[object]) -> Callable[[], None]:
        def run() -> None:
            for batch in loader:
                first = batch.views[0] if hasattr(batch, "views") else batch[0]  # type: ignore[index]
                assert first.shape[1:] == (3, views.image_size, views.image_size)
                first.to(DEVICE, non_blocking=True)

        return run

    timing = interleave(
        benchmark,
        {name: epoch(loader) for name, loader in loaders.items()},
        rounds=ROUNDS,
        warmup_rounds=1,
        synchronize=torch.cuda.synchronize if DEVICE == "cuda" else lambda: None,
    )
    rates = {name: round(1e3 * images / spread.median) for name, spread in timing.milliseconds.items()}
    benchmark.extra_info.update(
        device=DEVICE,
        usable_cores=cores,
        torch_threads=torch.get_num_threads(),
        images=images,
        views=views.views,
        image_size=views.image_size,
        workers=WORKERS,
        images_per_second=rates,
        dali=version("nvidia-dali-cuda130"),
    )
    with capsys.disabled():
        print(f"\n{title}, {DEVICE}: {timing}")
        for name, rate in rates.items():
            print(f"  {name:24} {rate:6,} images/s")
    for loader in loaders.values():
        if isinstance(loader, ViewLoader):
            loader.close()


@pytest.mark.benchmark(group="views of photographs")
def test_photographs(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    views = Views()
    benchmark.extra_info["images_from"] = images_from = photographs(tmp_path)
    files = sorted(str(path) for path in tmp_path.glob("*.jpg"))
    assert len(files) == PHOTOS
    ours = {
        f"fastsimclr {backend}": open_views(
            str(tmp_path), views, BATCH, backend=backend, device=DEVICE, workers=workers
        )
        for backend, workers in (("torchvision", WORKERS), ("dali", 2))
    }
    loaders = {**ours, "torchvision v2 transforms": peer(files, views, BATCH)}
    compare(benchmark, capsys, f"Two views of 224² of photographs ({images_from})", loaders, PHOTOS, views)


@pytest.mark.benchmark(group="views of small images")
def test_small_images(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    views, batch_size = Views(image_size=32), 256
    digits = open_source("digits")
    assert isinstance(digits, ArraySource)
    loaders: dict[str, Iterable[object]] = {
        "fastsimclr memory": open_views(digits, views, batch_size, backend="memory", device=DEVICE),
        "fastsimclr torchvision": open_views(
            digits, views, batch_size, backend="torchvision", device=DEVICE, workers=WORKERS
        ),
        "fastsimclr dali": open_views(digits, views, batch_size, backend="dali", device=DEVICE, workers=2),
        "torchvision v2 transforms": peer(digits.images.permute(0, 2, 3, 1).contiguous().numpy(), views, batch_size),
    }
    compare(benchmark, capsys, "Two views of 32² of digits", loaders, len(digits), views)
