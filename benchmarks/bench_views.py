"""Two augmented views of each image: our loaders against what is used elsewhere, in images a second; where time goes.

    python -m pytest benchmarks/bench_views.py --benchmark-json=benchmarks/results/views-DEVICE.json

Photographs at 224² in three stages (decoding alone, two crops of each, the whole recipe), small images at 32². A call
is a whole epoch, so that no contender works ahead while another is timed. All have the machine's cores: as many
DataLoader workers, or DALI or torch threads. Photographs come in several copies; slow contenders get one.

Peak memory is that of an untimed epoch, beyond what this process held before the loader was opened: of this process and
all its workers (PSS). Packages that this process or the server that workers are forked from has imported are in
nobody's figure.
"""

import gc
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import view_peers as peers
from benchmarks.dali_colors import DaliColors
from benchmarks.images import four_to_three, photographs, small_images
from benchmarks.memory import settle_heap
from benchmarks.suite import CORES, DEVICE, ON_GPU, SMALL, Check, Suite
from benchmarks.view_contenders import (
    PIXELS_BOUND,
    ROUNDS,
    WORKERS,
    Images,
    by_dali,
    compare,
    dali_color_twist,
    dali_crop_and_flip,
    dali_grid,
    our_crops,
    our_views,
    pixels_apart,
)
from benchmarks.view_peers import GRID, Contender, Photos, Setting, in_webdataset, in_workers
from fastsimclr import Augmentation
from fastsimclr.data import open_source, open_views
from fastsimclr.data.dali import DaliBackend
from fastsimclr.data.images import decode
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.photometric import photometric
from fastsimclr.data.sources import EncodedSource
from fastsimclr.data.torchvision import TorchvisionBackend
from fastsimclr.data.torchvision import crop as crop_by_torchvision

PHOTOS, COPIES, BATCH = (24, 1, 8) if SMALL else (128, 3, 32)
FEW = 16  # images whose pixels are compared
BATCHES = (20, 100) if SMALL else (400, 2000)  # of test_memory_stays_flat
RECIPE = Augmentation(image_size=64) if SMALL else Augmentation()
CROPS = replace(RECIPE, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0)
SETTING = Setting(RECIPE, BATCH, WORKERS)
# Other packages' warnings are no reason to stop; their workers end with this process.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def threads() -> Iterable[None]:
    """The workers have the cores; what this process does has as many threads as are left, at least one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, CORES - WORKERS))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Images:
    peers.start_server()
    folder = tmp_path_factory.mktemp("photos")
    data, origin = photographs(PHOTOS)
    named = [{f"{copy}-{i:03}.jpg": each for i, each in enumerate(data)} for copy in range(COPIES)]
    few = {name: four_to_three(file) for name, file in list(named[0].items())[:FEW]}
    whole = {name: each for copy in named for name, each in copy.items()}
    return Images(write(folder / "whole", whole), write(folder / "once", named[0]), write(folder / "few", few), origin)


def write(folder: Path, files: Mapping[str, bytes]) -> Photos:
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


def fastest_first(ours: dict[str, Contender], best: str) -> dict[str, Contender]:
    """The one that the others are compared with first: on a GPU DALI's, which `auto` selects there."""
    return dict(sorted(ours.items(), key=lambda item: item[0] != best)) if ON_GPU else ours


LIGHTLY = Contender(
    in_workers(peers.open_pillow, peers.lightly_transform),
    requires="lightly",
    recipe={"interpolation": "bilinear"},
    note="bilinear, as it has fixed it",
)
TWISTED = "another function: at equal draws color_twist is 11.6 levels of 255 off"
ONE_ORDER = "one order of the jitter's changes for a whole batch"


@pytest.mark.benchmark(group="decoding photographs")
def test_decode(suite: Suite, photos: Images) -> None:
    """Read and decode alone; of each image a grid of pixels is passed on."""
    of_pillow, of_tensor = (lambda _: peers.grid_of_pillow), (lambda _: peers.grid_of_tensor)
    contenders = {
        "fastsimclr's decoder, DataLoader": Contender(in_workers(peers.open_ours, of_tensor), same_params=True),
        "DALI's reader and decoder": by_dali(dali_grid, 1, note="also the decoder of our DALI loader"),
        "Pillow, DataLoader": Contender(in_workers(peers.open_pillow, of_pillow)),
        "torchvision's decode_image, DataLoader": Contender(in_workers(peers.open_tensor, of_tensor)),
        "WebDataset, its Pillow decoder": Contender(in_webdataset(of_pillow), requires="webdataset"),
    }
    compare(suite, contenders, SETTING, photos, GRID, torch.uint8, headline=False)


@pytest.mark.benchmark(group="two crops of photographs")
def test_crops(suite: Suite, photos: Images) -> None:
    """Read, decode, and crop, resize and flip twice: uint8, before any color changes."""
    ours = {"fastsimclr, torchvision": our_crops(TorchvisionBackend), "fastsimclr, DALI": our_crops(DaliBackend)}
    contenders = {
        **fastest_first(ours, "fastsimclr, DALI"),
        "DALI's reader and random_resized_crop": by_dali(dali_crop_and_flip),
        "torchvision on Pillow": Contender(in_workers(peers.open_pillow, peers.crops_on_pillow)),
        "torchvision v2 on tensors": Contender(in_workers(peers.open_tensor, peers.crops_on_tensors)),
        "WebDataset, torchvision on Pillow": Contender(in_webdataset(peers.crops_on_pillow), requires="webdataset"),
    }
    setting = replace(SETTING, augmentation=CROPS)
    compare(suite, contenders, setting, photos, CROPS.image_size, torch.uint8, headline=False)


@pytest.mark.benchmark(group="views of photographs")
def test_photographs(suite: Suite, photos: Images) -> None:
    ours = {
        "fastsimclr, torchvision": our_views("torchvision"),
        "fastsimclr, DALI": our_views("dali"),
        "fastsimclr, DALI, colours too": our_crops(DaliColors, slow=True, tried=True),
    }
    kornia = f"colors in whole batches, after torchvision's crops; {ONE_ORDER}"
    on_tensors = Contender(in_workers(peers.open_tensor, peers.views_on_tensors), slow=True)
    contenders = {
        **fastest_first(ours, "fastsimclr, DALI"),
        "DALI's reader and color_twist": by_dali(dali_color_twist, differs=True, note=TWISTED),
        "torchvision on Pillow, ImageFilter blur": Contender(in_workers(peers.open_pillow, peers.views_on_pillow)),
        f"torchvision v2 on tensors, GaussianBlur({peers.window(RECIPE)})": on_tensors,
        "lightly's SimCLRTransform": LIGHTLY,
        "Kornia on batches": Contender(peers.Kornia, requires="kornia", slow=True, note=kornia),
        "WebDataset, torchvision on Pillow": Contender(in_webdataset(peers.views_on_pillow), requires="webdataset"),
    }
    compare(suite, contenders, SETTING, photos, RECIPE.image_size, torch.float32)


@pytest.mark.benchmark(group="views of small images")
def test_small_images(suite: Suite, photos: Images) -> None:
    """CIFAR-10's recipe. Rivals get the first 1,000 images: all would take minutes."""
    torch.set_num_threads(CORES)  # ours has no workers
    whole, origin = small_images()
    once, few = (whole.subset(np.arange(some)) for some in (128 if SMALL else 1000, FEW))
    kornia = f"its RandomResizedCrop on whole batches, without antialias; {ONE_ORDER}"
    contenders = {
        "fastsimclr, memory": our_views("memory"),
        "torchvision on Pillow": Contender(in_workers(peers.open_pillow, peers.views_on_pillow), slow=True),
        "lightly's SimCLRTransform": replace(LIGHTLY, slow=True),
        "Kornia on batches": Contender(peers.Kornia, requires="kornia", slow=True, note=kornia),
    }
    setting = Setting(Augmentation.preset("cifar10"), 64 if SMALL else 500, WORKERS)
    compare(suite, contenders, setting, Images(whole, once, few, origin), 32, torch.float32)


@pytest.mark.benchmark(group="stages of a photograph's views")
def test_stages(suite: Suite, photos: Images) -> None:
    """The time of each stage of the CPU's loader on one thread."""
    torch.set_num_threads(1)
    settle_heap()
    source = open_source(str(photos.whole.folder))
    assert isinstance(source, EncodedSource)
    index = np.arange(BATCH)
    files = [source.read(int(i)) for i in index]
    images = [decode(file, "photo") for file in files]
    sizes = np.array([image.shape[1:] for image in images])
    params = sample_batch_params(RECIPE, 0, 0, index, sizes)
    recipe = RECIPE.recipes[0]

    def cropped() -> list[Tensor]:
        return [
            torch.stack([crop_by_torchvision(image, recipe, of_view[i : i + 1]) for i, image in enumerate(images)])
            for of_view in params
        ]

    crops = cropped()

    def colors(*dtype: torch.dtype, **options: str) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(photometric(c, d, recipe, *dtype, **options) for c, d in zip(crops, params, strict=True))

    photometry = {
        "photometry, float32": colors(),
        "photometry, bfloat16": colors(torch.bfloat16),
        "photometry, PyTorch's operations": colors(backend="pytorch"),
    }
    stages: dict[str, Callable[[], object]] = {
        "read": lambda: [source.read(int(i)) for i in index],
        "decode": lambda: [decode(file, "photo") for file in files],
        "draw": lambda: sample_batch_params(RECIPE, 0, 0, index, sizes),
        "crop, resize, flip": cropped,
    }
    size = {"image_size": RECIPE.image_size, "views": 2, "batch_size": BATCH, "threads": 1}
    suite.interleave(photometry | stages, sizes=size, rounds=ROUNDS if SMALL else 10)
    ours, *variants = photometry.values()
    apart = [pixels_apart([variant()], [ours()], RECIPE) for variant in variants]
    names = list(photometry)[1:]
    what = "views of equal draws, mean levels of 255"
    suite.record(
        device="cpu",
        images=dict.fromkeys(photometry | stages, BATCH),
        checks={name: Check(what, each, PIXELS_BOUND) for name, each in zip(names, apart, strict=True)},
        ours=names,
        yardsticks=list(stages),
        headline=False,
        images_from=photos.origin,
    )


@pytest.mark.parametrize("backend", ["torchvision", "dali", "memory"])
@pytest.mark.benchmark(group=f"memory over {BATCHES[1]:,} batches")
def test_memory_stays_flat(suite: Suite, photos: Images, backend: str) -> None:
    """Resident memory after the batches that fill what is ever kept, and after five times as many."""
    few, many = BATCHES
    source = open_source("digits" if backend == "memory" else str(photos.whole.folder))
    loader = open_views(source, Augmentation(image_size=64), 4, backend=backend, device=DEVICE, workers=WORKERS)

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

    at = suite.benchmark.pedantic(run, rounds=1)
    suite.benchmark.extra_info.update(backend=backend, resident_mib=at, device_bytes=loader.device_bytes())
    loader.close()
    suite.say(f"{backend}: {at[few]:.0f} MiB resident after {few} batches, {at[many]:.0f} after {many:,}")
    assert SMALL or at[many] - at[few] < 32
