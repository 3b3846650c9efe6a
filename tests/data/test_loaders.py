"""The loaders: the same order and params with every backend; ranks, epochs, resuming, and errors."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import SHARED_DATA, encode, photo, photo_folder, write
from PIL import Image
from torch import Tensor

from fastsimclr import Augmentation
from fastsimclr.data import Batch, Source, ViewLoader, choose_backend, open_source, open_views
from fastsimclr.data.sources import ArraySource, EncodedSource, FolderSource
from fastsimclr.errors import UserError

IMAGES, BATCH = 23, 5  # four full batches and one of three
SMALL = Augmentation(image_size=24)
pytestmark = pytest.mark.usefixtures("one_thread")
FILE_BACKENDS = [("torchvision", 0), ("torchvision", 1), ("dali", 1), ("dali", 2)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(photo_folder(tmp_path_factory.mktemp("photos"), IMAGES))


@pytest.fixture(scope="module")
def digits() -> ArraySource:
    """The first 23 digits: the same number of images as photos."""
    whole = open_source("digits")
    assert isinstance(whole, ArraySource)
    return ArraySource("digits", whole.images[:IMAGES].clone(), whole.labels[:IMAGES], whole.classes)


def png(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels), "PNG")


def take(loader: ViewLoader, epoch: int | None = None, batches: int | None = None) -> list[Batch]:
    if epoch is not None:
        loader.set_epoch(epoch)
    return list(itertools.islice(iter(loader), batches))


def take_and_close(loader: ViewLoader) -> list[Batch]:
    batches = take(loader)
    loader.close()
    return batches


def indices(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.index]


def same(left: list[Batch], right: list[Batch]) -> bool:
    """Return whether all batches are bit-identical."""
    return len(left) == len(right) and all(
        torch.equal(a.index, b.index)
        and torch.equal(a.label, b.label)
        and all(torch.equal(v, w) for v, w in zip(a.views, b.views, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def differences(left: list[Batch], right: list[Batch], augmentation: Augmentation) -> Tensor:
    """Return the absolute differences of all pixels of all views, in levels of 255."""
    std = torch.tensor(augmentation.std).view(3, 1, 1) * 255
    each = [
        ((v - w) * std).abs().flatten()
        for a, b in zip(left, right, strict=True)
        for v, w in zip(a.views, b.views, strict=True)
    ]
    return torch.cat(each)


# Batches


@pytest.mark.parametrize(("backend", "workers"), FILE_BACKENDS)
def test_epoch_yields_every_image_once(photos: str, backend: str, workers: int) -> None:
    loader = open_views(photos, SMALL, BATCH, backend=backend, workers=workers, seed=1)
    assert loader.backend == backend
    labels = open_source(photos).labels
    for epoch in range(3):  # several: state left by one epoch must not end the next
        batches = take(loader, epoch)
        assert len(loader) == len(batches) == 5
        assert [len(batch.index) for batch in batches] == [5, 5, 5, 5, 3]
        assert sorted(indices(batches)) == list(range(IMAGES))
        for batch in batches:
            assert batch.index.dtype == batch.label.dtype == torch.int64
            assert batch.label.tolist() == labels[batch.index.numpy()].tolist()
            assert len(batch.views) == 2
            for view in batch.views:
                assert view.shape == (len(batch.index), 3, 24, 24)
                assert view.dtype == torch.float32
                assert view.is_contiguous(memory_format=torch.channels_last)
            assert not torch.equal(*batch.views)
    loader.close()


@pytest.mark.parametrize("number", [1, 3])
def test_num_views(photos: str, number: int) -> None:
    augmentation = Augmentation(image_size=16, num_views=number)
    for backend in ("torchvision", "dali"):
        batches = take_and_close(open_views(photos, augmentation, BATCH, backend=backend, workers=0))
        assert {len(batch.views) for batch in batches} == {number}


# Agreement of the loaders


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_file_loaders_yield_the_same_views(photos: str, interpolation: str) -> None:
    augmentation = Augmentation(image_size=48, interpolation=interpolation)
    expected = take_and_close(open_views(photos, augmentation, BATCH, backend="torchvision", workers=0, seed=3))
    worker = take_and_close(open_views(photos, augmentation, BATCH, backend="torchvision", workers=1, seed=3))
    assert same(worker, expected)
    dali = take_and_close(open_views(photos, augmentation, BATCH, backend="dali", seed=3))
    assert indices(dali) == indices(expected)
    assert differences(dali, expected, augmentation).mean() <= 1.5
    other = take_and_close(open_views(photos, augmentation, BATCH, backend="dali", seed=4))
    assert differences(other, expected, augmentation).mean() > 20, "another seed exceeds the bound"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_array_loaders_yield_the_same_views(digits: ArraySource, interpolation: str) -> None:
    # Only resampling, since color operations may amplify a level. 40 enlarges and 20 shrinks crops of the 32 pixels.
    for size in (40, 20):
        augmentation = Augmentation(
            image_size=size, interpolation=interpolation, jitter_prob=0, grayscale_prob=0, blur_prob=0
        )
        memory, torchvision, dali = (
            take_and_close(open_views(digits, augmentation, BATCH, backend=name, workers=0, seed=3))
            for name in ("memory", "torchvision", "dali")
        )
        assert indices(memory) == indices(torchvision) == indices(dali)
        off = differences(memory, torchvision, augmentation).round()
        # torchvision's weights are fixed-point numbers: some ties round the other way, in each of two passes.
        assert (off > 0).float().mean() <= 0.025
        assert (off > 1).float().mean() <= 1e-4
        assert off.max() <= 2
        assert differences(dali, torchvision, augmentation).mean() <= 1.5


def test_backend_auto_is_memory_for_arrays_and_torchvision_without_a_gpu(photos: str, digits: ArraySource) -> None:
    assert open_views(digits, SMALL, BATCH).backend == "memory"
    assert open_views(photos, SMALL, BATCH).backend == "torchvision"


def test_views_do_not_depend_on_the_batch_size(photos: str) -> None:
    for backend in ("torchvision", "dali"):
        small, large = (
            take_and_close(open_views(photos, SMALL, size, backend=backend, workers=0, seed=2)) for size in (4, IMAGES)
        )
        assert indices(small) == indices(large)
        for number in range(2):
            views = torch.cat([batch.views[number] for batch in small])
            assert torch.allclose(views, large[0].views[number], atol=1e-5), backend


MULTI_CROP = Augmentation.multi_crop(small=3, small_size=16, image_size=32)
BYOL = Augmentation(
    image_size=24, per_view=({"blur_prob": 1.0}, {"blur_prob": 0.1, "solarize_prob": 0.9, "interpolation": "bilinear"})
)


@pytest.mark.parametrize("augmentation", [MULTI_CROP, BYOL], ids=["multi_crop", "byol"])
def test_per_view_recipes_are_the_same_in_every_loader(
    photos: str, digits: ArraySource, augmentation: Augmentation
) -> None:
    def load(source: str | Source, backend: str, augmentation: Augmentation = augmentation) -> list[Batch]:
        return take_and_close(open_views(source, augmentation, BATCH, backend=backend, workers=0, seed=3))

    for source, backends in ((photos, ["torchvision", "dali"]), (digits, ["torchvision", "dali", "memory"])):
        expected, *others = (load(source, backend) for backend in backends)
        sizes = [recipe.image_size for recipe in augmentation.recipes]
        assert [view.shape[2] for view in expected[0].views] == [view.shape[3] for view in expected[0].views] == sizes
        for other in others:
            assert indices(other) == indices(expected)
            assert differences(other, expected, augmentation).mean() <= 1.5
    # The views differ from those of the default recipe.
    default = load(photos, "torchvision", Augmentation(image_size=24))
    assert differences(load(photos, "torchvision", BYOL), default, BYOL).mean() > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_view_dtype(photos: str, digits: ArraySource, dtype: torch.dtype) -> None:
    for source, backend in ((photos, "torchvision"), (photos, "dali"), (digits, "memory")):
        expected = take_and_close(open_views(source, SMALL, BATCH, backend=backend, workers=0))
        got = take_and_close(open_views(source, SMALL, BATCH, backend=backend, workers=0, dtype=dtype))
        for a, b in zip(got, expected, strict=True):
            for view, other in zip(a.views, b.views, strict=True):
                assert view.dtype == dtype
                assert view.is_contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(view, other.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_files_of_one_size_are_loaded_into_memory(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "small", {f"{'ab'[i % 2]}/{i:02}.png": png(photo(32, 24, i)) for i in range(IMAGES)}))
    source = open_source(folder)
    assert isinstance(source, EncodedSource)
    assert choose_backend(source, torch.device("cpu"))[0] == "memory"
    in_memory = open_views(folder, SMALL, BATCH, seed=3)
    assert in_memory.backend == "memory"
    files = take_and_close(open_views(folder, SMALL, BATCH, backend="torchvision", workers=0, seed=3))
    memory = take(in_memory)
    assert indices(memory) == indices(files)
    assert [batch.label.tolist() for batch in memory] == [batch.label.tolist() for batch in files]
    assert differences(memory, files, SMALL).mean() <= 0.2
    assert in_memory.device_bytes() == IMAGES * 32 * 24 * 3
    for large in (np.int32([[97, 96]] * IMAGES), np.int32([[32, 24]] * (IMAGES - 1) + [[24, 32]])):
        source.sizes = large
        assert choose_backend(source, torch.device("cpu"))[0] == "torchvision", "too large, or of two sizes"


# Order


def test_order_depends_only_on_epoch_and_seed(digits: ArraySource) -> None:
    loader = open_views(digits, SMALL, BATCH, seed=5)
    first, second, again = (take(loader, epoch) for epoch in (0, 1, 0))
    assert indices(first) != indices(second)
    assert same(first, again)
    assert not torch.equal(
        first[0].views[0], next(b for b in take(open_views(digits, SMALL, BATCH, seed=6), 0)).views[0]
    )
    unshuffled = open_views(digits, SMALL, BATCH, shuffle=False)
    both = [take(unshuffled, epoch) for epoch in (0, 1)]
    assert indices(both[0]) == indices(both[1]) == list(range(IMAGES))
    assert not torch.equal(both[0][0].views[0], both[1][0].views[0]), "each epoch has new views, even unshuffled"


def test_epochs_advance_without_set_epoch(digits: ArraySource) -> None:
    explicit, implicit = (open_views(digits, SMALL, BATCH, seed=5) for _ in range(2))
    for epoch in range(3):
        assert same(take(implicit), take(explicit, epoch))


def test_drop_last_and_min_local_batch(digits: ArraySource) -> None:
    def sizes(batch_size: int, **options: object) -> list[int]:
        loader = open_views(digits, SMALL, batch_size, **options)  # type: ignore[arg-type]
        batches = take(loader)
        assert len(loader) == len(batches)
        return [len(batch.index) for batch in batches]

    assert sizes(5) == [5, 5, 5, 5, 3]
    assert sizes(5, drop_last=True) == [5, 5, 5, 5]
    assert sizes(5, min_local_batch=3) == [5, 5, 5, 5, 3]
    assert sizes(5, min_local_batch=4) == [5, 5, 5, 5]
    assert sizes(11, min_local_batch=2) == [11, 11], "a batch of one has no negatives"
    assert sizes(11) == [11, 11, 1]
    assert sizes(IMAGES) == [IMAGES]
    # The last 3 images would be split into 2 and 1.
    for rank in range(2):
        assert sizes(10, rank=rank, world_size=2, min_local_batch=2) == [5, 5]


# Ranks


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("backend", ["memory", "torchvision", "dali"])
def test_ranks_split_the_batches_of_a_single_rank(digits: ArraySource, backend: str, world_size: int) -> None:
    def views_of(rank: int, world_size: int) -> list[list[Batch]]:
        loader = open_views(digits, SMALL, 8, backend=backend, workers=0, seed=7, rank=rank, world_size=world_size)
        epochs = [take(loader, epoch) for epoch in range(2)]
        loader.close()
        return epochs

    whole = views_of(0, 1)
    ranks = [views_of(rank, world_size) for rank in range(world_size)]
    for epoch in range(2):
        assert sorted(i for rank in ranks for i in indices(rank[epoch])) == list(range(IMAGES))
        for number, batch in enumerate(whole[epoch]):  # 8, 8 and 7: an uneven split
            parts = [rank[epoch][number] for rank in ranks]
            assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
            assert max(len(part.index) for part in parts) - min(len(part.index) for part in parts) <= 1
            for view in range(2):
                joined = torch.cat([part.views[view] for part in parts])
                assert torch.allclose(joined, batch.views[view], atol=1e-5)


# Resuming


@pytest.mark.parametrize(("backend", "workers"), FILE_BACKENDS)
def test_resume_is_bit_identical(photos: str, backend: str, workers: int) -> None:
    def fresh() -> ViewLoader:
        return open_views(photos, SMALL, BATCH, backend=backend, workers=workers, seed=9)

    run = fresh()
    run.set_epoch(4)
    epoch, states = [], [run.state_dict()]
    for batch in run:
        epoch.append(batch)
        states.append(dict(run.state_dict()))
        assert batch.position == states[-1]
        assert (batch.epoch, batch.ends_epoch) == (4, len(epoch) == len(run))
    following = take(run)
    run.close()
    resumed = fresh()  # one loader for all cases, since workers take seconds to start
    for done in (0, 1, 3, 4):
        resumed.load_state_dict(states[done])
        resumed.set_epoch(4)  # as a training loop does at the start of an epoch; keeps the position
        assert same(take(resumed), epoch[done:]), f"{done} batches in"
        assert same(take(resumed), following), "and the next epoch"
    resumed.load_state_dict(states[5])  # the end of the epoch: continues with the next one
    assert same(take(resumed), following)
    resumed.close()


def test_resume_with_other_workers_and_backend(photos: str) -> None:
    run = open_views(photos, SMALL, BATCH, backend="torchvision", workers=1, seed=9)
    take(run, 1, batches=2)
    state = run.state_dict()
    expected = take_and_close(run)
    assert len(expected) == 3
    inline = open_views(photos, SMALL, BATCH, backend="torchvision", workers=0, seed=9)
    inline.load_state_dict(state)
    assert same(take(inline), expected)
    dali = open_views(photos, SMALL, BATCH, backend="dali", workers=2, seed=9)
    dali.load_state_dict(state)
    rest = take_and_close(dali)
    assert indices(rest) == indices(expected)
    assert differences(rest, expected, SMALL).mean() <= 1.5


@pytest.mark.parametrize(("batch_size", "world_size"), [(3, 1), (11, 1), (8, 2), (9, 4)])
def test_resume_with_another_batch_size_and_world_size(digits: ArraySource, batch_size: int, world_size: int) -> None:
    run = open_views(digits, SMALL, BATCH, seed=9)
    seen = take(run, 1, batches=2)
    state = run.state_dict()
    rest = take(run)
    remaining: list[int] = []
    for rank in range(world_size):
        resumed = open_views(digits, SMALL, batch_size, seed=9, rank=rank, world_size=world_size)
        resumed.load_state_dict(state)
        batches = take(resumed)
        remaining += indices(batches)
        expected = {int(i): v for b in rest for i, v in zip(b.index, b.views[0], strict=True)}
        for batch in batches:
            for i, view in zip(batch.index, batch.views[0], strict=True):
                assert torch.allclose(view, expected[int(i)], atol=1e-5)
    assert sorted(remaining + indices(seen)) == list(range(IMAGES))


def test_resume_after_the_last_batch_continues_with_the_next_epoch(digits: ArraySource) -> None:
    run = open_views(digits, SMALL, 20, seed=9)
    take(run, 1, batches=1)
    resumed = open_views(digits, SMALL, 20, seed=9, drop_last=True)  # drops the remaining three images
    resumed.load_state_dict(run.state_dict())
    assert take(resumed) == []
    assert resumed.state_dict()["epoch"] == 2
    assert len(take(resumed)) == 1


# Abandoned iterations


@pytest.mark.parametrize(("backend", "workers"), FILE_BACKENDS)
def test_continues_after_an_abandoned_iteration(photos: str, backend: str, workers: int) -> None:
    loader = open_views(photos, SMALL, BATCH, backend=backend, workers=workers, seed=9)
    whole, following = take(loader, 0), take(loader, 1)
    assert same(take(loader, 0, batches=2), whole[:2])
    assert same(take(loader), whole[2:]), "at the same position"
    take(loader, 0, batches=1)
    assert same(take(loader, 1), following), "at another epoch"
    take(loader, 0, batches=1)
    state = {**loader.state_dict(), "epoch": 0, "position": 0}
    loader.load_state_dict(state)
    assert same(take(loader), whole), "at the start"
    loader.close()


@pytest.mark.parametrize(("backend", "workers"), [("torchvision", 0), ("torchvision", 1), ("dali", 1)])
def test_new_iterator_invalidates_the_previous_one(photos: str, backend: str, workers: int) -> None:
    # Otherwise, the new iterator would get prefetched batches of the old one, with wrong indices and labels.
    loader = open_views(photos, SMALL, BATCH, backend=backend, workers=workers, seed=9)
    whole = take(loader, 0)
    loader.set_epoch(0)
    older: Iterator[Batch] = iter(loader)
    next(older)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
    newer = iter(loader)
    first = next(newer)
    with pytest.raises(RuntimeError, match="ended when a newer one"):
        next(older)
    assert same([first, *newer], whole)
    loader.close()


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise ValueError('no reason')"])
@pytest.mark.slow
def test_process_exits_without_closing_its_loader(photos: str, ending: str, tmp_path: Path) -> None:
    # Workers ignore SIGTERM, which multiprocessing sends at exit to those still running: the process once hung forever.
    script = tmp_path / "script.py"
    script.write_text(
        "from fastsimclr import Augmentation, open_views\n"
        f"loader = open_views({photos!r}, Augmentation(image_size=24), 5, backend='torchvision', workers=2)\n"
        "for batch in loader:\n"  # without `if __name__ == '__main__'`: workers must not run the script again
        "    print(len(batch.index), flush=True)\n"
        f"    {ending or 'break'}\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3}.get(ending, 1), done.stderr
    assert done.stdout == "5\n"


# A source of the user's own


@pytest.mark.slow
def test_workers_load_a_source_whose_class_is_defined_in_the_script(photos: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from fastsimclr import Augmentation, open_views\n"
        "from fastsimclr.data import open_source\n"
        "from fastsimclr.data.sources import FolderSource\n"
        "class Mine(FolderSource): pass\n"
        f"source = open_source({photos!r})\n"
        "source.__class__ = Mine\n"
        "loader = open_views(source, Augmentation(image_size=24), 5, backend='torchvision', workers=1)\n"
        "print(len(next(iter(loader)).index))\n"  # without `if __name__ == '__main__'`
        "loader.close()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


# Errors


def test_invalid_options_raise(photos: str, digits: ArraySource) -> None:
    def assert_raises(source: str | Source, batch_size: int, message: str, **options: object) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_views(source, SMALL, batch_size, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert "expected" in str(caught.value)

    assert_raises(photos, 24, "batch_size: got 24, more than the dataset's 23 images; expected at most 23")
    assert_raises(digits, 0, "batch_size: got 0, expected at least 1")
    assert_raises(digits, 4, "batch_size: got 4 for 4 ranks.*at least 8", world_size=4, min_local_batch=2)
    assert_raises(digits, 2, "batch_size: got 2 for 4 ranks.*at least 4", world_size=4)
    assert_raises(digits, 8, "rank: got 2 of 2", rank=2, world_size=2)
    assert_raises(photos, 8, "backend: got 'ffcv', expected one of auto, dali, torchvision, memory", backend="ffcv")
    assert_raises(photos, 8, r"003.jpg: got 81x75 pixels, expected 60x90 as .*000.jpg", backend="memory")


def test_state_of_another_run_raises(digits: ArraySource) -> None:
    state = open_views(digits, SMALL, BATCH, seed=1).state_dict()
    other_seed = open_views(digits, SMALL, BATCH, seed=2)
    with pytest.raises(UserError, match="seed 1, but this one has 2"):
        other_seed.load_state_dict(state)
    fewer = ArraySource("digits", digits.images[:20], digits.labels[:20], digits.classes)
    with pytest.raises(UserError, match="images 23, but this one has 20"):
        open_views(fewer, SMALL, BATCH, seed=1).load_state_dict(state)
    assert len(take(other_seed)) == 5, "the loader still works"


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs shared/data beside the repository")
def test_real_photos_are_the_same_in_both_loaders(backend: str) -> None:
    path = str(SHARED_DATA / "photos" / "flowers_300.tar")
    augmentation = Augmentation(image_size=96)
    expected = take(open_views(path, augmentation, 16, backend="torchvision", workers=0, seed=3), batches=2)
    got = take(open_views(path, augmentation, 16, backend=backend, workers=0, seed=3), batches=2)
    assert indices(got) == indices(expected)
    assert differences(got, expected, augmentation).mean() <= (0 if backend == "torchvision" else 1.5)
    assert np.isfinite([view.std().item() for batch in got for view in batch.views]).all()


def test_backend_auto_on_a_gpu_without_dali_is_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    class HideNvidia:
        def __init__(self, finder: Any) -> None:
            self.finder = finder

        def find_spec(self, name: str, *rest: Any) -> Any:
            return None if name.partition(".")[0] == "nvidia" else self.finder.find_spec(name, *rest)

    monkeypatch.setattr(sys, "meta_path", [HideNvidia(finder) for finder in sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    folder = FolderSource((), np.empty(0, np.int64), ())
    assert choose_backend(folder, torch.device("cuda")) == ("torchvision", "DALI is not installed")
