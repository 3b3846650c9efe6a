"""open_dataset: images are opened, scanned and prepared once, and all ranks fail together."""

import contextlib
import io
from pathlib import Path

import pytest
from pictures import jpeg, photo, write
from ranks import run_ranks

from fastsimclr.data import Source, open_views
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import Dataset, open_dataset, open_pair
from fastsimclr.data.sources import ArraySource, EncodedSource
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of one size in two classes; one of them does not decode."""
    images = {f"{name}.jpg": jpeg(photo(8, 8)) for name in ("a/1", "b/2")}
    return write(tmp_path / "images", images | {"a/3.jpg": b"no image"})


def test_built_in_data_set_has_validation_images() -> None:
    data = open_dataset("digits", None, world=SINGLE_PROCESS)
    assert data.val is not None
    assert (len(data.train), len(data.val), data.skipped) == (1433, 364, None)


def test_bad_images_are_skipped_and_listed_once(folder: Path, tmp_path: Path) -> None:
    data = open_dataset(str(folder), str(folder), world=SINGLE_PROCESS, max_bad=0.5, skipped_to=tmp_path)
    assert data.val is not None
    assert len(data.train) == len(data.val) == 2
    listed = (tmp_path / "skipped_images.txt").read_text().splitlines()
    assert listed == data.skipped
    assert len(listed) == 1
    assert listed[0].startswith(f"{folder}/a/3.jpg: ")
    (folder / "a" / "3.jpg").unlink()
    open_dataset(str(folder), None, world=SINGLE_PROCESS, skipped_to=tmp_path)
    assert not (tmp_path / "skipped_images.txt").exists(), "an outdated list is removed"


def test_error_for_too_many_bad_images_names_the_option(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--limit: got 1 of 3 images .*all are listed in .*skipped_images\.txt"):
        open_dataset(str(folder), None, world=SINGLE_PROCESS, skipped_to=tmp_path, option="--limit")
    assert "a/3.jpg" in (tmp_path / "skipped_images.txt").read_text()


def test_images_in_memory_are_decoded_once_and_keep_their_names(folder: Path) -> None:
    files = open_dataset(str(folder), None, world=SINGLE_PROCESS, backend="torchvision", max_bad=0.5).train
    decoded = open_dataset(str(folder), None, world=SINGLE_PROCESS, max_bad=0.5).train  # auto: small and of one size
    assert isinstance(files, EncodedSource)
    assert isinstance(decoded, ArraySource)
    assert (
        [decoded.name(i) for i in range(2)]
        == [files.name(i) for i in range(2)]
        == [
            f"{folder}/a/1.jpg",
            f"{folder}/b/2.jpg",
        ]
    )
    assert open_views(decoded, Augmentation(image_size=8), 2).source is decoded


def open_pair_on_a_rank(rank: int, path: str) -> tuple[list[str], bytes]:
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        train, val = open_pair(path, path, World(rank, 2, SINGLE_PROCESS.device))
    assert val is not None
    return printed.getvalue().splitlines(), train.digest() + val.digest()


@pytest.mark.slow
def test_ranks_have_the_same_images_and_rank_0_prints_what_was_passed_over(folder: Path) -> None:
    write(folder, {"cover.jpg": b"", "c/labels.txt": b""})
    (printed, digest), (not_printed, same) = run_ranks(2, open_pair_on_a_rank, str(folder))
    notes = ["images beside the class folders passed over: 1 (first: cover.jpg)", "other files passed over: 1 (.txt 1)"]
    assert printed == [f"{folder}: {note}" for note in notes] * 2
    assert not_printed == []
    assert digest == same


def open_on_a_rank(rank: int, path: str) -> str:
    def refuse_on_rank_1(train: Source, val: Source | None) -> tuple[Source, Source | None]:
        if rank == 1:
            raise UserError("not these")
        return train, val

    try:
        found: Dataset | None = open_dataset(
            path, None, world=World(rank, 2, SINGLE_PROCESS.device), select=refuse_on_rank_1
        )
    except UserError as error:
        return str(error)
    return str(found)


@pytest.mark.slow
def test_all_ranks_fail_if_one_rejects_the_images(folder: Path) -> None:
    assert run_ranks(2, open_on_a_rank, str(folder)) == ["not these", "not these"]
