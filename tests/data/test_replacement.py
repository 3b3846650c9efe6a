"""Bad images while batches are loaded: replaced by the same images in every loader, on any rank and after a resume."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import broken, open_encoded, photo_folder, write
from torch import Tensor

from fastsimclr import Augmentation
from fastsimclr.data import Batch, ViewLoader, open_views
from fastsimclr.data.dataset import open_loader
from fastsimclr.data.loader import BatchRequest, LoaderConfig
from fastsimclr.data.memory import DifferentSizes, decode_all
from fastsimclr.data.replacement import MAX_BAD_IN_A_ROW, read_or_replace, replacement
from fastsimclr.data.sources import FolderSource, WrongForm
from fastsimclr.errors import UserError

PLAIN = Augmentation(image_size=16, jitter_prob=0, grayscale_prob=0, blur_prob=0)
BROKEN = broken()
GOOD, EPOCHS = 17, 3
IMAGES = GOOD + len(BROKEN)
BATCH = 5  # 27 images: the last batch has two
pytestmark = pytest.mark.usefixtures("one_thread")
LOADERS = [("torchvision", 0), ("torchvision", 2), ("dali", 2), ("memory", 0)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of one size, so that every backend takes them, and more than a third as many that cannot be used."""
    folder = photo_folder(tmp_path_factory.mktemp("damaged"), GOOD, size=lambda i: (40, 50))
    return write(folder, {f"{'abc'[n % 3]}/{name}": data for n, (name, data) in enumerate(BROKEN.items())})


def run(loader: ViewLoader, epochs: int = EPOCHS) -> list[Batch]:
    batches = [batch for _ in range(epochs) for batch in loader]
    loader.close()
    return batches


def column(batches: list[Batch], name: str) -> Tensor:
    return torch.cat([torch.as_tensor(getattr(batch, name)) for batch in batches])


def views(batches: list[Batch]) -> Tensor:
    return torch.stack([torch.cat([batch.views[number] for batch in batches]) for number in range(2)])


def open_damaged(folder: Path, backend: str = "torchvision", workers: int = 0, **options: int) -> ViewLoader:
    return open_views(str(folder), PLAIN, BATCH, backend=backend, workers=workers, seed=1, max_bad=1, **options)


# The choice of the replacement


def test_candidates_are_a_function_of_their_arguments_and_uniform() -> None:
    drawn = [replacement(7, 3, index, attempt, 10) for index in range(200) for attempt in range(10)]
    assert drawn == [replacement(7, 3, index, attempt, 10) for index in range(200) for attempt in range(10)]
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert (abs(counts - 200) < 5 * np.sqrt(200 * 0.9)).all(), "five standard deviations"
    others = [replacement(8, 3, 1, 1, 1 << 40), replacement(7, 4, 1, 1, 1 << 40), replacement(7, 3, 2, 1, 1 << 40)]
    assert len({replacement(7, 3, 1, 0, 1 << 40), replacement(7, 3, 1, 1, 1 << 40), *others}) == 5
    assert replacement(0, 0, 0, 0, 1 << 62) == 1191675384208110765, "as in earlier versions: runs can be resumed"


def test_images_known_to_be_bad_are_not_read() -> None:
    chain = [5, *(replacement(1, 2, 5, attempt, 100) for attempt in range(3))]
    read: list[int] = []

    def fail(index: int) -> str:
        read.append(index)
        if index == chain[2]:
            raise UserError(f"image {index}")
        return f"pixels of {index}"

    request = BatchRequest(1, 2, np.array([8, 5]), frozenset(chain[:2]))
    assert read_or_replace(request, 1, 100, fail) == (
        chain[3],
        f"pixels of {chain[3]}",
        {chain[2]: f"image {chain[2]}"},
    )
    assert read == chain[2:]
    assert read_or_replace(request, 0, 100, str) == (8, "8", {})


def test_gives_up_when_no_image_can_be_read() -> None:
    read: list[int] = []

    def fail(index: int) -> None:
        read.append(index)
        raise UserError(f"{index}: gone")

    with pytest.raises(UserError, match=rf"^data: got {MAX_BAD_IN_A_ROW} images in a row .* the last with \d+: gone"):
        read_or_replace(BatchRequest(0, 0, np.array([0])), 0, 10**6, fail)
    assert len(read) == len(set(read)) == MAX_BAD_IN_A_ROW
    with pytest.raises(UserError, match="got 4 images in a row"):
        read_or_replace(BatchRequest(0, 0, np.array([0])), 0, 4, fail)
    with pytest.raises(UserError, match="got all 4 images known to be bad"):
        read_or_replace(BatchRequest(0, 0, np.array([0]), frozenset(range(4))), 0, 4, fail)


def test_image_of_another_form_is_not_replaced() -> None:
    def fail(index: int) -> None:
        raise WrongForm("another form")

    with pytest.raises(WrongForm):
        read_or_replace(BatchRequest(0, 0, np.array([0])), 0, 4, fail)


# Loaders


def test_every_loader_uses_the_same_replacements(damaged: Path) -> None:
    source = open_encoded(damaged)
    bad = {index for index in range(IMAGES) if Path(source.name(index)).name in BROKEN}
    whole = open_damaged(damaged)
    expected = run(whole)
    for backend, workers in LOADERS:
        loader = open_damaged(damaged, backend, workers)
        batches = run(loader)
        assert loader.bad.keys() == bad, backend
        assert {index: reason[:9] for index, reason in loader.bad.items()} == {
            index: f"got {len(source.read(index))} byte"[:9] for index in bad
        }
        for name in ("index", "label", "replaced"):
            assert torch.equal(column(batches, name), column(expected, name)), (backend, name)
        assert [batch.position for batch in batches] == [batch.position for batch in expected]
        difference = (views(batches) - views(expected)).abs() * 255 * 0.225  # in levels
        assert difference.mean() <= {"torchvision": 0, "memory": 0.1, "dali": 1.5}[backend], backend
    index, replaced = column(expected, "index").numpy(), column(expected, "replaced").numpy()
    assert replaced.sum() == EPOCHS * len(bad)
    assert not bad & set(index.tolist())
    assert column(expected, "label").tolist() == source.labels[index].tolist()


def test_views_of_a_replacement_are_those_of_the_image_with_the_draws_of_the_bad_one(
    damaged: Path, tmp_path: Path
) -> None:
    source = open_encoded(damaged)
    batches = run(open_damaged(damaged), epochs=1)
    order = run(open_views(str(photo_folder(tmp_path / "order", IMAGES)), PLAIN, BATCH, workers=0, seed=1), epochs=1)
    wanted, used = column(order, "index").tolist(), column(batches, "index").tolist()
    assert [a != b for a, b in zip(wanted, used, strict=True)] == column(batches, "replaced").tolist()
    repaired = shutil.copytree(damaged, tmp_path / "repaired")
    for bad, good in zip(wanted, used, strict=True):
        shutil.copyfile(source.name(good), repaired / source.key(bad))
    assert torch.equal(views(run(open_damaged(repaired), epochs=1)), views(batches))


@pytest.mark.parametrize(("backend", "workers"), [("torchvision", 1), ("dali", 1), ("memory", 0)])
def test_replacements_are_the_same_on_two_ranks_and_after_a_resume(damaged: Path, backend: str, workers: int) -> None:
    expected = run(open_damaged(damaged, backend, workers), epochs=2)
    parts = [run(open_damaged(damaged, backend, workers, rank=r, world_size=2), epochs=2) for r in range(2)]
    for batch, *of_ranks in zip(expected, *parts, strict=True):
        assert torch.equal(column(of_ranks, "index"), batch.index)
        assert torch.equal(views(of_ranks), views([batch]))
    for known in ({}, open_damaged(damaged, "memory").bad):  # of a checkpoint: not needed, but not read again
        resumed = open_damaged(damaged, backend, workers)
        resumed.load_state_dict(expected[3].position)
        resumed.bad.update(known)
        batches = run(resumed, epochs=2)
        assert torch.equal(column(batches, "index"), column(expected[4:], "index"))
        assert torch.equal(views(batches), views(expected[4:]))


class Reads(FolderSource):
    """Files that count how often they are read."""

    reads: list[int]

    def read(self, index: int) -> np.ndarray:
        self.reads.append(index)
        return super().read(index)


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_bad_images_are_read_once(damaged: Path, backend: str) -> None:
    files = open_encoded(damaged)
    assert isinstance(files, FolderSource)
    source = Reads(files.names, files.labels, files.classes, files.root)
    source.reads, source.bad = [], {1: "known from a check"}
    loader = open_loader(
        source, PLAIN, LoaderConfig(batch_size=BATCH, backend=backend, workers=0, read_ahead=False, max_bad=1)
    )
    for _ in loader:
        pass
    bad = set(loader.bad)
    assert loader.bad[1] == "known from a check"
    assert len(bad) == len(BROKEN) + (1 not in {i for i in bad if Path(source.name(i)).name in BROKEN})
    source.reads.clear()
    batches = run(loader, epochs=3)
    assert not bad & set(source.reads)
    assert 1 not in column(batches, "index")


def test_images_that_go_bad_between_two_epochs_are_replaced(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path, 12)
    files = [Path(name) for name in map(open_encoded(folder).name, range(12))]
    for backend, workers in (("torchvision", 1), ("dali", 1)):
        whole = files[4].read_bytes()
        loader = open_views(str(folder), PLAIN, 4, backend=backend, workers=workers, seed=2, max_bad=1)
        list(loader)
        files[4].unlink()
        batches = [batch for _ in range(3) for batch in loader]  # of the first, some may have been read before
        assert loader.bad == {4: "cannot be read (No such file or directory)"}
        assert 4 not in column(batches[3:], "index")
        loader.close()
        files[4].write_bytes(whole)


# Memory


def test_bad_images_stay_out_of_memory(damaged: Path) -> None:
    in_memory = decode_all(open_encoded(damaged))
    assert len(in_memory.bad) == len(BROKEN)
    assert not in_memory.images[list(in_memory.bad)].any()
    assert in_memory.images[[i for i in range(IMAGES) if i not in in_memory.bad]].flatten(1).any(1).all()
    assert in_memory.subset(np.array(sorted(in_memory.bad))).bad.keys() == set(range(len(BROKEN)))


def test_images_of_several_sizes_do_not_fit_into_memory(tmp_path: Path) -> None:
    with pytest.raises(DifferentSizes, match=r"pixels, expected 60x90 as for .*000\.jpg: backend memory"):
        decode_all(open_encoded(photo_folder(tmp_path / "sizes", 3)))
    with pytest.raises(UserError, match="got 10 images that cannot be used"):
        decode_all(open_encoded(write(tmp_path / "broken", BROKEN)))
