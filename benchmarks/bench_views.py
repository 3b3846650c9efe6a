"""Two augmented views of each image: our loaders against what is used elsewhere, in images a second; where time goes.

    python -m pytest benchmarks/bench_views.py --benchmark-json=benchmarks/results/views-DEVICE.json

A call is a whole epoch, so that no contender works ahead while another is timed; filling a pipeline is in it for
everybody. All have the machine's cores: as many DataLoader workers, or DALI threads. Photographs are those of
../shared/data/photos where they are, else synthetic ones of their size; small images are CIFAR-10's of ../shared/data,
else the digits.
"""

import gc
import os
import tarfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_optimizer import settle_heap
from benchmarks.interleaved import interleave
from benchmarks.view_contenders import DaliColorTwist, torchvision_loader, torchvision_pillow, torchvision_tensor
from fastsimclr import Views
from fastsimclr.data import ViewLoader, open_source, open_views
from fastsimclr.data.draws import draw_views
from fastsimclr.data.images import decode
from fastsimclr.data.memory import decode_all
from fastsimclr.data.photometric import photometric
from fastsimclr.data.sources import ArraySource, EncodedSource
from fastsimclr.data.torchvision import crop as crop_by_torchvision

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PHOTOS, COPIES, BATCH, ROUNDS = 300, 2, 32, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CORES = len(os.sched_getaffinity(0))
WORKERS = min(16, CORES)


@pytest.fixture(autouse=True)
def threads() -> Iterable[None]:
    """The workers have the cores; what this process does has as many threads as are left, at least one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, CORES - WORKERS))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of JPEG files, and where they are from."""
    folder = tmp_path_factory.mktemp("photos")
    archive = SHARED / "photos" / "flowers_300.tar"
    if archive.is_file():
        with tarfile.open(archive) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
            data = [file.read() for file in files if file is not None][:PHOTOS]
        for copy in range(COPIES):
            for number, each in enumerate(data):
                (folder / f"{copy}-{number:03}.jpg").write_bytes(each)
        return folder, archive.name
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):  # coarse blobs and fine noise: 500×400, about 110 KB
        blobs = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
        smooth = np.asarray(blobs.resize((500, 400), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:03}.jpg", quality=92)
    return folder, "synthetic"


def small_images() -> tuple[ArraySource, str]:
    shards = str(SHARED / "cifar10" / "train-{0..4}.tar")
    if (SHARED / "cifar10").is_dir():
        source = open_source(shards)
        assert isinstance(source, EncodedSource)
        return decode_all(source), "CIFAR-10"
    digits = open_source("digits")
    assert isinstance(digits, ArraySource)
    return digits, "digits"


def compare(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    title: str,
    loaders: dict[str, Iterable[object]],
    images: dict[str, int],
    views: Views,
) -> None:
    """Time an epoch of each loader in alternation; print and record images a second. images: of each one's epoch."""
    settle_heap()

    def epoch(name: str) -> Callable[[], None]:
        def run() -> None:
            seen = 0
            for batch in loaders[name]:
                first = batch.views[0] if hasattr(batch, "views") else batch[0]  # type: ignore[index]
                assert first.shape[1:] == (3, views.image_size, views.image_size)
                assert first.dtype == torch.float32
                first.to(DEVICE, non_blocking=True)
                seen += len(first)
            assert seen == images[name]

        return run

    timing = interleave(
        benchmark,
        {name: epoch(name) for name in loaders},
        rounds=ROUNDS,
        warmup_rounds=1,
        synchronize=torch.cuda.synchronize if DEVICE == "cuda" else lambda: None,
    )
    ours = next(iter(loaders))
    rates = {name: round(1e3 * images[name] / spread.median) for name, spread in timing.milliseconds.items()}
    faster = {
        name: {key: getattr(spread, key) * images[ours] / images[name] for key in ("lower", "median", "upper")}
        for name, spread in timing.speedup.items()
    }
    benchmark.extra_info.update(
        device=DEVICE,
        usable_cores=CORES,
        workers=WORKERS,
        torch_threads=torch.get_num_threads(),
        images=images,
        views=views.views,
        image_size=views.image_size,
        images_per_second=rates,
        times_faster=faster,
        dali=version("nvidia-dali-cuda130"),
    )
    with capsys.disabled():
        print(f"\n{title}, {DEVICE}, {CORES} cores; medians of {ROUNDS} interleaved rounds")
        for name, rate in rates.items():
            ratio = faster.get(name)
            by = f"{ratio['median']:6.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f}) times slower" if ratio else ""
            print(f"  {name:42} {rate:7,} images/s {by}")
    for loader in loaders.values():
        if isinstance(loader, ViewLoader):
            loader.close()


@pytest.mark.benchmark(group="views of photographs")
def test_photographs(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: tuple[Path, str]) -> None:
    views, (folder, images_from) = Views(), photos
    files: list[object] = sorted(str(path) for path in folder.glob("*.jpg"))
    benchmark.extra_info["images_from"] = images_from
    ours = {
        f"fastsimclr, {name}": open_views(
            str(folder), views, BATCH, backend=backend, device=DEVICE, workers=WORKERS, photometric=colours
        )
        for name, backend, colours in (
            ("torchvision", "torchvision", "native"),
            ("DALI", "dali", "native"),
            ("DALI, colours too", "dali", "dali"),
        )
    }
    if DEVICE == "cuda":  # first is the one that the others are compared with
        ours = dict(sorted(ours.items(), key=lambda item: item[0] != "fastsimclr, DALI"))
    loaders: dict[str, Iterable[object]] = {
        **ours,
        "DALI's reader and color_twist": DaliColorTwist([str(file) for file in files], views, BATCH, WORKERS, DEVICE),
        "torchvision on Pillow, ImageFilter blur": torchvision_loader(torchvision_pillow(views), files, BATCH, WORKERS),
        "torchvision v2 on tensors, GaussianBlur(23)": torchvision_loader(
            torchvision_tensor(views), files, BATCH, WORKERS
        ),
    }
    title = f"Two views of 224² of photographs ({images_from})"
    compare(benchmark, capsys, title, loaders, dict.fromkeys(loaders, len(files)), views)


@pytest.mark.benchmark(group="views of small images")
def test_small_images(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    source, images_from = small_images()
    views = Views.preset("cifar10")
    torch.set_num_threads(CORES)  # there are no workers
    few = source.images[:1000].numpy()  # for a loader that would take minutes
    loaders: dict[str, Iterable[object]] = {
        "fastsimclr, memory": open_views(source, views, 512, backend="memory", device=DEVICE),
        "torchvision on Pillow, no workers": torchvision_loader(torchvision_pillow(views), list(few), 500, 0),
    }
    images = dict(zip(loaders, (len(source), len(few)), strict=True))
    benchmark.extra_info["images_from"] = images_from
    compare(benchmark, capsys, f"Two views of 32² ({images_from})", loaders, images, views)


@pytest.mark.benchmark(group="stages of a photograph's views")
def test_stages(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: tuple[Path, str]) -> None:
    """What each stage of the CPU's way costs on one thread."""
    torch.set_num_threads(1)
    settle_heap()
    views, source = Views(), open_source(str(photos[0]))
    assert isinstance(source, EncodedSource)
    index = np.arange(BATCH)
    files = [source.read(int(i)) for i in index]
    images = [decode(file, "photo") for file in files]
    sizes = np.array([image.shape[1:] for image in images])
    draws = draw_views(views, 0, 0, index, sizes)
    recipe = views.recipes[0]

    def cropped() -> list[torch.Tensor]:
        return [
            torch.stack([crop_by_torchvision(image, recipe, of_view[i : i + 1]) for i, image in enumerate(images)])
            for of_view in draws
        ]

    crops = cropped()
    stages: dict[str, Callable[[], object]] = {
        "photometry, float32": lambda: [photometric(c, d, recipe) for c, d in zip(crops, draws, strict=True)],
        "photometry, bfloat16": lambda: [
            photometric(c, d, recipe, torch.bfloat16) for c, d in zip(crops, draws, strict=True)
        ],
        "photometry, PyTorch's operations": lambda: [
            photometric(c, d, recipe, backend="pytorch") for c, d in zip(crops, draws, strict=True)
        ],
        "read": lambda: [source.read(int(i)) for i in index],
        "decode": lambda: [decode(file, "photo") for file in files],
        "draw": lambda: draw_views(views, 0, 0, index, sizes),
        "crop, resize, flip": cropped,
    }
    timing = interleave(benchmark, stages, rounds=10, warmup_rounds=1)
    milliseconds = {name: spread.median / BATCH for name, spread in timing.milliseconds.items()}
    benchmark.extra_info.update(milliseconds_per_image=milliseconds, torch_threads=1, views=2)
    used = ("read", "decode", "draw", "crop, resize, flip", "photometry, float32")
    whole = sum(milliseconds[name] for name in used)
    with capsys.disabled():
        print("\nTwo views of 224² of a photograph, one thread")
        for name, each in milliseconds.items():
            share = f"{each / whole:4.0%}" if name in used else ""
            print(f"  {name:34} {each:6.3f} ms  {share}")


@pytest.mark.parametrize("backend", ["torchvision", "dali", "memory"])
@pytest.mark.benchmark(group="memory over 2,000 batches")
def test_memory_stays_flat(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: tuple[Path, str], backend: str
) -> None:
    """Resident memory after 400 batches, which fill what is ever kept, and after 2,000."""
    views = Views(image_size=64)
    source = open_source("digits") if backend == "memory" else open_source(str(photos[0]))
    loader = open_views(source, views, 4, backend=backend, device=DEVICE, workers=WORKERS)

    def resident_mib() -> float:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def run() -> dict[int, float]:
        at, done = {}, 0
        while done < 2000:
            for _ in loader:
                done += 1
                if done in (400, 2000):
                    at[done] = resident_mib()
                if done == 2000:
                    break
        return at

    at = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(backend=backend, resident_mib=at, device_bytes=loader.device_bytes(), device=DEVICE)
    loader.close()
    with capsys.disabled():
        print(f"\n{backend}: {at[400]:.0f} MiB resident after 400 batches, {at[2000]:.0f} after 2,000")
    assert at[2000] - at[400] < 32
