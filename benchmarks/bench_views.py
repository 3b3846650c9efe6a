"""Two augmented views of each image: our loaders against what is used elsewhere, in images a second; where time goes.

    python -m pytest benchmarks/bench_views.py --benchmark-json=benchmarks/results/views-DEVICE.json

Photographs at 224² in three stages (decoding alone, two crops of each, the whole recipe), small images at 32². A call
is a whole epoch, so that no contender works ahead while another is timed; filling a pipeline is in it for everybody.
All have the machine's cores: as many DataLoader workers, or DALI or torch threads. Photographs are those of
../shared/data/photos where they are, else synthetic ones of their size, several copies of each; slow contenders get one
copy. Small images are CIFAR-10's of ../shared/data, else the digits.

After timing each contender's result is checked: see view_checks.py.

Peak memory is that of an untimed epoch, beyond what this process held before the loader was opened: of this process and
all its workers, sampled every 50 ms, what several share counted once (PSS). So packages that this process has imported
are in nobody's figure. Everybody's workers, ours and rivals', are forked from one server, which has imported what they
need before: what it takes is in nobody's figure either.
"""

import gc
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import view_contenders as here
from benchmarks import view_peers as peers
from benchmarks.images import four_to_three, photographs, small_images
from benchmarks.interleaved import Check, describe, interleave
from benchmarks.memory import settle_heap
from benchmarks.sizes import SMALL
from benchmarks.view_checks import PIXELS_BOUND, Looks, pixels_apart
from benchmarks.view_comparison import CORES, DEVICE, LOOKED_AT, ROUNDS, WORKERS, Comparison, compare
from benchmarks.view_contenders import GRID, Contender, Loader, OurCrops, OurViews, Photos, Setting
from fastsimclr import Views
from fastsimclr.data import open_source, open_views
from fastsimclr.data.images import decode
from fastsimclr.data.params import draw_views
from fastsimclr.data.photometric import photometric
from fastsimclr.data.sources import EncodedSource
from fastsimclr.data.torchvision import crop as crop_by_torchvision

PHOTOS, COPIES, BATCH = (24, 1, 8) if SMALL else (128, 3, 32)
FEW = 16  # images whose pixels are compared
BATCHES = (20, 100) if SMALL else (400, 2000)  # of test_memory_stays_flat
RECIPE = Views(image_size=64) if SMALL else Views()
# Other packages' warnings are shown, and no reason to stop; their workers end with this process.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def threads() -> Iterable[None]:
    """The workers have the cores; what this process does has as many threads as are left, at least one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, CORES - WORKERS))
    yield
    torch.set_num_threads(before)


def put(folder: Path, files: Mapping[str, bytes]) -> Photos:
    """Write the files, and the same in tar shards, one for each worker."""
    (folder / "files").mkdir(parents=True)
    paths = [folder / "files" / name for name in sorted(files)]
    for path in paths:
        path.write_bytes(files[path.name])
    shards = []
    for number, part in enumerate(np.array_split(np.array(paths), WORKERS)):
        shards.append(str(folder / f"{number:02}.tar"))
        with tarfile.open(shards[-1], "w") as tar:
            for path in part:
                tar.add(path, path.name)
    return Photos(folder / "files", tuple(map(str, paths)), tuple(shards))


class Sets:
    """Photographs: all copies, one of each, and a few of a ratio of 4 to 3; and where they are from."""

    def __init__(self, folder: Path) -> None:
        data, self.origin = photographs(PHOTOS)
        named = [{f"{copy}-{i:03}.jpg": each for i, each in enumerate(data)} for copy in range(COPIES)]
        self.whole = put(folder / "whole", {name: each for copy in named for name, each in copy.items()})
        self.once = put(folder / "once", named[0])
        self.few = put(folder / "few", {name: four_to_three(file) for name, file in list(named[0].items())[:FEW]})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    peers.start_server()
    return Sets(tmp_path_factory.mktemp("photos"))


def fastest_first(ours: dict[str, Contender], best: str) -> dict[str, Contender]:
    """The one that the others are compared with first: on a GPU DALI's, for it is what `auto` takes there."""
    return dict(sorted(ours.items(), key=lambda item: item[0] != best)) if DEVICE == "cuda" else ours


def our(kind: Callable[..., Loader], *arguments: str) -> Contender:
    return Contender(lambda data, setting: kind(data, setting, *arguments), ours=True)


KORNIA = "colours in whole batches, after torchvision's crops; one order of the jitter's changes for a whole batch"


@pytest.mark.benchmark(group="decoding photographs")
def test_decode(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: Sets) -> None:
    """Read and decode alone; of each image a grid of pixels is handed on."""
    contenders = {
        "fastsimclr's decoder, DataLoader": Contender(peers.our_decode, ours=True),
        "DALI's reader and decoder": Contender(here.dali_decode, note="also the decoder of our DALI loader"),
        "Pillow, DataLoader": Contender(peers.pillow_decode),
        "torchvision's decode_image, DataLoader": Contender(peers.torchvision_decode),
        "WebDataset, its Pillow decoder": Contender(peers.webdataset_decode, requires="webdataset"),
    }
    setting = Setting(RECIPE, BATCH, WORKERS, DEVICE, CORES)
    comparison = Comparison(contenders, setting, (photos.whole, photos.once, photos.few), (GRID, torch.uint8))
    compare(benchmark, capsys, "Decoding photographs", comparison, photos.origin, headline=False)


@pytest.mark.benchmark(group="two crops of photographs")
def test_crops(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: Sets) -> None:
    """Read, decode, and crop, resize and flip twice: uint8, before any colour changes."""
    ours = {f"fastsimclr, {name}": our(OurCrops, name.lower()) for name in ("torchvision", "DALI")}
    contenders = {
        **fastest_first(ours, "fastsimclr, DALI"),
        "DALI's reader and random_resized_crop": Contender(here.dali_crops),
        "torchvision on Pillow": Contender(peers.pillow_crops),
        "torchvision v2 on tensors": Contender(peers.tensor_crops),
        "WebDataset, torchvision on Pillow": Contender(peers.webdataset_crops, requires="webdataset"),
    }
    views = replace(RECIPE, jitter=0.0, grey=0.0, blur=0.0)
    setting = Setting(views, BATCH, WORKERS, DEVICE, CORES)
    form = (views.image_size, torch.uint8)
    comparison = Comparison(contenders, setting, (photos.whole, photos.once, photos.few), form)
    compare(benchmark, capsys, "Two crops of photographs", comparison, photos.origin, headline=False)


@pytest.mark.benchmark(group="views of photographs")
def test_photographs(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: Sets) -> None:
    ours = {
        "fastsimclr, torchvision": our(OurViews, "torchvision"),
        "fastsimclr, DALI": our(OurViews, "dali"),
        "fastsimclr, DALI, colours too": replace(our(OurCrops, "dali", "dali"), slow=True),
    }
    contenders = {
        **fastest_first(ours, "fastsimclr, DALI"),
        "DALI's reader and color_twist": Contender(here.dali_color_twist, differs="color_twist"),
        "torchvision on Pillow, ImageFilter blur": Contender(peers.pillow_views),
        f"torchvision v2 on tensors, GaussianBlur({peers.window(RECIPE)})": Contender(peers.tensor_views, slow=True),
        "lightly's SimCLRTransform": Contender(
            peers.Lightly, requires="lightly", recipe={"interpolation": "bilinear"}, note="bilinear, as it has fixed it"
        ),
        "Kornia on batches": Contender(peers.Kornia, requires="kornia", slow=True, note=KORNIA),
        "WebDataset, torchvision on Pillow": Contender(peers.webdataset_views, requires="webdataset"),
    }
    setting = Setting(RECIPE, BATCH, WORKERS, DEVICE, CORES)
    form = (RECIPE.image_size, torch.float32)
    comparison = Comparison(contenders, setting, (photos.whole, photos.once, photos.few), form)
    few = replace(setting, batch_size=FEW, workers=0, shuffle=False)
    pair = [OurCrops(photos.few, few, "dali", "color_twist"), OurViews(photos.few, few, "dali")]
    twisted = f"another function: at equal draws color_twist is {pixels_apart(*pair, RECIPE):.1f} levels of 255 off"
    for loader in pair:
        loader.close()
    title = f"Two views of {RECIPE.image_size}² of photographs"
    notes = {"DALI's reader and color_twist": twisted}
    compare(benchmark, capsys, title, comparison, photos.origin, notes)


@pytest.mark.benchmark(group="views of small images")
def test_small_images(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: Sets) -> None:
    """CIFAR-10's recipe. Rivals get the first 1,000 images: all would take minutes."""
    whole, images_from = small_images()
    torch.set_num_threads(CORES)  # ours has no workers
    bilinear = (
        "its RandomResizedCrop on whole batches, without antialias; one order of the jitter's changes for a batch"
    )
    contenders = {
        "fastsimclr, memory": our(OurViews, "memory"),
        "torchvision on Pillow": Contender(peers.pillow_views, slow=True),
        "lightly's SimCLRTransform": Contender(
            peers.Lightly,
            requires="lightly",
            slow=True,
            recipe={"interpolation": "bilinear"},
            note="bilinear, as it has fixed it",
        ),
        "Kornia on batches": Contender(peers.Kornia, requires="kornia", slow=True, note=bilinear),
    }
    setting = Setting(Views.preset("cifar10"), 64 if SMALL else 500, WORKERS, DEVICE, CORES)
    data = (whole, *(whole.subset(np.arange(some)) for some in (128 if SMALL else 1000, FEW)))
    comparison = Comparison(contenders, setting, data, (32, torch.float32))
    compare(benchmark, capsys, "Two views of 32²", comparison, images_from)


LESS_WORK = {
    "no blur": {"blur": 0.0},
    "no jitter": {"jitter": 0.0},
    "half the jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "no grey views": {"grey": 0.0},
    "no turn of the hue": {"hue": 0.0},
    "whole images": {"scale": (0.9, 1.0)},
}


def test_the_checks_notice_less_work(photos: Sets) -> None:
    """A loader that leaves out a step of the recipe is told from ours by averages over its views; ours again is not."""
    torch.set_num_threads(CORES)
    setting = Setting(RECIPE, BATCH, 0, DEVICE, CORES)

    def looks(**changes: Any) -> Looks:
        return Looks.of(loaders(**changes), replace(RECIPE, **changes), LOOKED_AT)

    def loaders(**changes: Any) -> Loader:
        return OurViews(photos.once, replace(setting, views=replace(RECIPE, **changes)), "torchvision")

    again = loaders()
    ours, other_draws = (Looks.of(again, RECIPE, LOOKED_AT) for _ in range(2))  # a second time: later epochs
    share, where = other_draws.apart(ours)
    assert share <= 1, f"{where}: {share}"
    noticed = {name: looks(**changes).apart(ours) for name, changes in LESS_WORK.items()}
    print({name: (round(share, 2), where) for name, (share, where) in noticed.items()})
    assert SMALL or all(share > 1 for share, _ in noticed.values()), noticed


@pytest.mark.benchmark(group="stages of a photograph's views")
def test_stages(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: Sets) -> None:
    """What each stage of the CPU's way costs on one thread."""
    torch.set_num_threads(1)
    settle_heap()
    views, source = RECIPE, open_source(str(photos.whole.folder))
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
    photometry: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
        "photometry, float32": lambda: tuple(photometric(c, d, recipe) for c, d in zip(crops, draws, strict=True)),
        "photometry, bfloat16": lambda: tuple(
            photometric(c, d, recipe, torch.bfloat16) for c, d in zip(crops, draws, strict=True)
        ),
        "photometry, PyTorch's operations": lambda: tuple(
            photometric(c, d, recipe, backend="pytorch") for c, d in zip(crops, draws, strict=True)
        ),
    }
    stages: dict[str, Callable[[], object]] = {
        **photometry,
        "read": lambda: [source.read(int(i)) for i in index],
        "decode": lambda: [decode(file, "photo") for file in files],
        "draw": lambda: draw_views(views, 0, 0, index, sizes),
        "crop, resize, flip": cropped,
    }
    timing = interleave(benchmark, stages, rounds=ROUNDS if SMALL else 10, warmup_rounds=1)
    ours, *variants = photometry
    checks = {
        name: Check(
            "views of equal draws, mean levels of 255",
            pixels_apart([photometry[name]()], [photometry[ours]()], views),
            PIXELS_BOUND,
        )
        for name in variants
    }
    milliseconds = {name: spread.median / BATCH for name, spread in timing.milliseconds.items()}
    describe(
        benchmark,
        device="cpu",
        sizes={"image_size": views.image_size, "views": 2, "batch_size": BATCH, "threads": 1},
        images=dict.fromkeys(stages, BATCH),
        checks=checks,
        ours=variants,
        yardsticks=[name for name in stages if name not in photometry],
        headline=False,
    )
    benchmark.extra_info.update(images_from=photos.origin, torch_threads=1)
    used = ("read", "decode", "draw", "crop, resize, flip", "photometry, float32")
    whole = sum(milliseconds[name] for name in used)
    with capsys.disabled():
        print(f"\nTwo views of {views.image_size}² of a photograph, one thread")
        for name, each in milliseconds.items():
            share = f"{each / whole:4.0%}" if name in used else ""
            print(f"  {name:34} {each:6.3f} ms  {share}")


@pytest.mark.parametrize("backend", ["torchvision", "dali", "memory"])
@pytest.mark.benchmark(group=f"memory over {BATCHES[1]:,} batches")
def test_memory_stays_flat(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], photos: Sets, backend: str
) -> None:
    """Resident memory after the batches that fill what is ever kept, and after five times as many."""
    few, many = BATCHES
    views = Views(image_size=64)
    source = open_source("digits") if backend == "memory" else open_source(str(photos.whole.folder))
    loader = open_views(source, views, 4, backend=backend, device=DEVICE, workers=WORKERS)

    def resident_mib() -> float:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def run() -> dict[int, float]:
        at, done = {}, 0
        while done < many:
            for _ in loader:
                done += 1
                if done in BATCHES:
                    at[done] = resident_mib()
                if done == many:
                    break
        return at

    at = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(backend=backend, resident_mib=at, device_bytes=loader.device_bytes(), device=DEVICE)
    loader.close()
    with capsys.disabled():
        print(f"\n{backend}: {at[few]:.0f} MiB resident after {few} batches, {at[many]:.0f} after {many:,}")
    assert SMALL or at[many] - at[few] < 32
