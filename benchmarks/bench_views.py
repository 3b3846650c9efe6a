"""Two augmented views of each image, in images per second: fastsimclr's loaders, other loaders, and each stage alone.

    python -m pytest benchmarks/bench_views.py --benchmark-json=benchmarks/results/views-DEVICE.json

Photos at 224x224 are measured in three stages (decoding alone, two crops, the whole augmentation), small images at
32x32. A call is a whole epoch, so that no contender works ahead while another is timed. All contenders use all cores:
one DataLoader worker, DALI thread or torch thread per core. The set of photos contains several copies of each; slow
contenders get one.

Peak memory is that of this process and all its workers (PSS) during an untimed epoch, beyond what this process held
before the loader was opened. It excludes packages imported by this process, or by the server that workers are forked
from.
"""

import functools
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
from torchvision.transforms.v2.functional import resize

from benchmarks import view_peers as peers
from benchmarks.dali_colors import DaliColors
from benchmarks.images import four_to_three, large_photographs, photographs, small_images
from benchmarks.memory import settle_heap
from benchmarks.suite import CORES, DEVICE, ON_GPU, SMALL, Check, Suite
from benchmarks.view_contenders import (
    PIXEL_DIFFERENCE,
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
    our_module,
    our_views,
    pixel_difference,
)
from benchmarks.view_peers import GRID, Contender, Loader, Photos, Setting, in_webdataset, in_workers
from fastsimclr import Augmentation
from fastsimclr.data import open_source, open_views
from fastsimclr.data.dali import DaliBackend
from fastsimclr.data.images import decode
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.photometric import photometric
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.sources import ArraySource, EncodedSource
from fastsimclr.data.torchvision import TorchvisionBackend
from fastsimclr.data.torchvision import crop as crop_with_torchvision

PHOTOS, COPIES, BATCH = (24, 1, 8) if SMALL else (128, 3, 32)
COMPARED = 16  # images whose pixels are compared
BATCHES = (20, 100) if SMALL else (400, 2000)  # for test_memory_stays_flat
AUGMENTATION = Augmentation(image_size=64) if SMALL else Augmentation()
CROPS = replace(AUGMENTATION, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0)
SETTING = Setting(AUGMENTATION, BATCH, WORKERS)
# Warnings of other packages are not errors.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def threads() -> Iterable[None]:
    """Leave the cores to the workers: limit this process to the remaining threads, at least one."""
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
    compared = {name: four_to_three(file) for name, file in list(named[0].items())[:COMPARED]}
    whole = {name: each for copy in named for name, each in copy.items()}
    return Images(
        write(folder / "whole", whole), write(folder / "once", named[0]), write(folder / "compared", compared), origin
    )


def write(folder: Path, files: Mapping[str, bytes]) -> Photos:
    """Write the images as files, and again as tar shards, one for each worker."""
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


def default_first(ours: dict[str, Contender], gpu_default: str) -> dict[str, Contender]:
    """Put the loader first that `auto` selects: on a GPU the one with DALI. The others are compared with it."""
    return dict(sorted(ours.items(), key=lambda item: item[0] != gpu_default)) if ON_GPU else ours


def open_spdl(read: str, photos: Photos, setting: Setting) -> Loader:
    from benchmarks import view_spdl  # may not be installed

    return view_spdl.Spdl(photos, setting, getattr(view_spdl, read))


LIGHTLY = Contender(
    in_workers(peers.open_pillow, peers.lightly_transform),
    requires="lightly",
    hardcoded={"interpolation": "bilinear"},
    note="bilinear interpolation, which it hardcodes",
)
SPDL = "decodes by FFmpeg, of which it needs shared libraries"
COLOR_TWIST = "different function: with the same random parameters color_twist is off by 11.6 levels of 255"
ONE_ORDER = "one order of the color jitter operations for a whole batch"


@pytest.mark.benchmark(group="decoding photos")
def test_decode(suite: Suite, photos: Images) -> None:
    """Read and decode only; a grid of pixels of each image is returned."""
    pillow_grid, tensor_grid = (lambda _: peers.pillow_grid), (lambda _: peers.tensor_grid)
    contenders = {
        "fastsimclr decoder, DataLoader": Contender(in_workers(peers.open_ours, tensor_grid), same_params=True),
        "DALI reader and decoder": by_dali(dali_grid, 1, note="also the decoder of fastsimclr's DALI loader"),
        "Pillow, DataLoader": Contender(in_workers(peers.open_pillow, pillow_grid)),
        "torchvision decode_image, DataLoader": Contender(in_workers(peers.open_tensor, tensor_grid)),
        "WebDataset, Pillow decoder": Contender(in_webdataset(pillow_grid), requires="webdataset"),
        "SPDL": Contender(functools.partial(open_spdl, "grid"), requires="spdl", note=SPDL),
    }
    compare(suite, contenders, SETTING, photos, GRID, torch.uint8)


@pytest.mark.benchmark(group="two crops of photos")
def test_crops(suite: Suite, photos: Images) -> None:
    """Read and decode, then crop, resize and flip twice: uint8, before any color operation."""
    ours = {"fastsimclr, torchvision": our_crops(TorchvisionBackend), "fastsimclr, DALI": our_crops(DaliBackend)}
    contenders = {
        **default_first(ours, "fastsimclr, DALI"),
        "DALI reader and random_resized_crop": by_dali(dali_crop_and_flip),
        "torchvision on Pillow": Contender(in_workers(peers.open_pillow, peers.crops_on_pillow)),
        "torchvision v2 on tensors": Contender(in_workers(peers.open_tensor, peers.crops_on_tensors)),
        "WebDataset, torchvision on Pillow": Contender(in_webdataset(peers.crops_on_pillow), requires="webdataset"),
        "SPDL, FFmpeg's crop and scale": Contender(
            functools.partial(open_spdl, "crops"),
            requires="spdl",
            inexact=True,
            note=f"different function: FFmpeg resizes by another filter; {SPDL}",
        ),
    }
    setting = replace(SETTING, augmentation=CROPS)
    compare(suite, contenders, setting, photos, CROPS.image_size, torch.uint8)


@pytest.mark.benchmark(group="two augmented views of photos")
def test_photographs(suite: Suite, photos: Images) -> None:
    ours = {
        "fastsimclr, torchvision": our_views("torchvision"),
        "fastsimclr, DALI": our_views("dali"),
        "fastsimclr, DALI, colors in DALI": our_crops(DaliColors, slow=True, experiment=True),
    }
    kornia = f"color operations on whole batches, after torchvision's crops; {ONE_ORDER}"
    on_tensors = Contender(in_workers(peers.open_tensor, peers.views_on_tensors), slow=True)
    contenders = {
        **default_first(ours, "fastsimclr, DALI"),
        "DALI reader and color_twist": by_dali(dali_color_twist, inexact=True, note=COLOR_TWIST),
        "torchvision on Pillow, ImageFilter blur": Contender(in_workers(peers.open_pillow, peers.views_on_pillow)),
        f"torchvision v2 on tensors, GaussianBlur({peers.window(AUGMENTATION)})": on_tensors,
        "lightly SimCLRTransform": LIGHTLY,
        "Kornia on batches": Contender(peers.Kornia, requires="kornia", slow=True, note=kornia),
        "WebDataset, torchvision on Pillow": Contender(in_webdataset(peers.views_on_pillow), requires="webdataset"),
    }
    task = f"two augmented views of photos, {AUGMENTATION.image_size}x{AUGMENTATION.image_size}"
    compare(suite, contenders, SETTING, photos, AUGMENTATION.image_size, torch.float32, readme_task=task)


@pytest.mark.benchmark(group="two crops of large photos")
def test_large_photographs(suite: Suite, photos: Images, tmp_path: Path) -> None:
    """JPEGs of 12 megapixels, decoded at a fraction of their size or in full; without color operations."""
    data, origin = large_photographs(*((2, (1600, 1200)) if SMALL else (12, (4000, 3000))))
    named = {f"{i:02}.jpg": file for i, file in enumerate(data)}
    large = write(tmp_path, named)
    in_full = PixelOptions(scaled_decode="off")
    contenders = {
        **default_first(
            {"fastsimclr, torchvision": our_views("torchvision"), "fastsimclr, DALI": our_views("dali")},
            "fastsimclr, DALI",
        ),
        "fastsimclr, torchvision, full decode": our_views("torchvision", in_full),
        "fastsimclr, DALI, full decode": our_views("dali", in_full),
        "torchvision on Pillow": Contender(in_workers(peers.open_pillow, peers.views_on_pillow)),
    }
    setting = Setting(CROPS, 2 if SMALL else 4, WORKERS)
    compare(suite, contenders, setting, Images(large, large, large, origin), CROPS.image_size, torch.float32)


@pytest.mark.benchmark(group="two augmented views of small images")
def test_small_images(suite: Suite, photos: Images) -> None:
    """The preset cifar10. The alternatives get the first 1,000 images only, as all would take minutes."""
    torch.set_num_threads(CORES)  # fastsimclr has no workers here
    whole, origin = small_images()
    once, compared = (whole.subset(np.arange(count)) for count in (128 if SMALL else 1000, COMPARED))
    kornia = f"RandomResizedCrop on whole batches, without antialiasing; {ONE_ORDER}"
    contenders = {
        "fastsimclr, memory": our_views("memory"),
        "fastsimclr, as_module": our_module(),
        "torchvision on Pillow": Contender(in_workers(peers.open_pillow, peers.views_on_pillow), slow=True),
        "lightly SimCLRTransform": replace(LIGHTLY, slow=True),
        "Kornia on batches": Contender(peers.Kornia, requires="kornia", slow=True, note=kornia),
    }
    task = "two augmented views of small images, 32x32"
    setting = Setting(Augmentation.preset("cifar10"), 64 if SMALL else 500, WORKERS)
    compare(suite, contenders, setting, Images(whole, once, compared, origin), 32, torch.float32, readme_task=task)


@pytest.mark.benchmark(group="two augmented views of batches of tensors")
def test_batches(suite: Suite, photos: Images) -> None:
    """Batches (B, 3, 224, 224) uint8 of resized photos, without decoding."""
    torch.set_num_threads(CORES)  # neither has workers
    size = AUGMENTATION.image_size
    decoded = [decode(np.fromfile(file, dtype=np.uint8), file) for file in photos.once.files]
    resized = torch.stack([resize(image, [size, size], antialias=True) for image in decoded]).permute(0, 2, 3, 1)
    whole = ArraySource("resized photos", resized.contiguous(), np.full(len(resized), -1), ())
    kornia = f"RandomResizedCrop on whole batches, without antialiasing; {ONE_ORDER}"
    contenders = {
        "fastsimclr, as_module": our_module(),
        "Kornia on batches": Contender(peers.Kornia, requires="kornia", note=kornia),
    }
    data = Images(whole, whole, whole.subset(np.arange(COMPARED)), photos.origin)
    compare(suite, contenders, SETTING, data, size, torch.float32)


@pytest.mark.benchmark(group="stages of augmenting photos")
def test_stages(suite: Suite, photos: Images) -> None:
    """Time of each stage of the CPU loader on one thread."""
    torch.set_num_threads(1)
    settle_heap()
    source = open_source(str(photos.whole.folder))
    assert isinstance(source, EncodedSource)
    index = np.arange(BATCH)
    files = [source.read(int(i)) for i in index]
    images = [decode(file, "photo") for file in files]
    sizes = np.array([image.shape[1:] for image in images])
    params = sample_batch_params(AUGMENTATION, 0, 0, index, sizes)
    augmentation = AUGMENTATION.recipes[0]

    def cropped() -> list[Tensor]:
        return [
            torch.stack(
                [crop_with_torchvision(image, augmentation, view_params[i : i + 1]) for i, image in enumerate(images)]
            )
            for view_params in params
        ]

    crops = cropped()

    def colors(*dtype: torch.dtype, **options: str) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(
            photometric(*pair, augmentation, *dtype, **options) for pair in zip(crops, params, strict=True)
        )

    color_operations = {
        "color operations, float32": colors(),
        "color operations, bfloat16": colors(torch.bfloat16),
        "color operations in PyTorch": colors(implementation="pytorch"),
    }
    stages: dict[str, Callable[[], object]] = {
        "read": lambda: [source.read(int(i)) for i in index],
        "decode": lambda: [decode(file, "photo") for file in files],
        "sample parameters": lambda: sample_batch_params(AUGMENTATION, 0, 0, index, sizes),
        "crop, resize, flip": cropped,
    }
    size = {"image_size": AUGMENTATION.image_size, "views": 2, "batch_size": BATCH, "threads": 1}
    suite.interleave(color_operations | stages, sizes=size, rounds=ROUNDS if SMALL else 10)
    first, *variants = color_operations.values()
    errors = [pixel_difference([variant()], [first()], AUGMENTATION) for variant in variants]
    names = list(color_operations)[1:]
    what = f"{PIXEL_DIFFERENCE}, same random parameters"
    suite.record(
        device="cpu",
        images=dict.fromkeys(color_operations | stages, BATCH),
        checks={name: Check(what, error, PIXELS_BOUND) for name, error in zip(names, errors, strict=True)},
        variants=names,
        references=list(stages),
        images_from=photos.origin,
    )


@pytest.mark.parametrize("backend", ["torchvision", "dali", "memory"])
@pytest.mark.benchmark(group=f"memory over {BATCHES[1]:,} batches")
def test_memory_stays_flat(suite: Suite, photos: Images, backend: str) -> None:
    """Resident memory after enough batches to fill all caches, and after five times as many."""
    warm_up, total = BATCHES
    source = open_source("digits" if backend == "memory" else str(photos.whole.folder))
    loader = open_views(source, Augmentation(image_size=64), 4, backend=backend, device=DEVICE, workers=WORKERS)

    def resident_mib() -> float:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def run() -> dict[int, float]:
        resident, done = {}, 0
        while done < total:
            for _ in loader:
                done += 1
                if done in BATCHES:
                    resident[done] = resident_mib()
                if done == total:
                    break
        return resident

    resident = suite.benchmark.pedantic(run, rounds=1)
    suite.benchmark.extra_info.update(backend=backend, resident_mib=resident, device_bytes=loader.device_bytes())
    loader.close()
    early, late = resident[warm_up], resident[total]
    suite.write_line(f"{backend}: {early:.0f} MiB resident after {warm_up} batches, {late:.0f} after {total:,}")
    assert SMALL or late - early < 32
