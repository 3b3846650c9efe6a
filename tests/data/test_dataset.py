"""open_dataset: images are opened and prepared once, and all ranks fail together."""

import contextlib
import io
from pathlib import Path

import pytest
from pictures import jpeg, open_encoded, photo, write
from ranks import run_ranks

from fastsimclr.data import Source, choose_backend, open_views
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import open_dataset, open_pair
from fastsimclr.data.scan import scan
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
    assert (len(data.train), len(data.val)) == (1433, 364)


def test_images_are_opened_without_decoding_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"a/0.jpg": jpeg(photo(200, 300))})  # too large to keep decoded
    monkeypatch.setattr("fastsimclr.data.sources.decode", None)
    monkeypatch.setattr("fastsimclr.data.checks.decode", None)
    data = open_dataset(str(folder), str(folder), world=SINGLE_PROCESS)
    assert data.val is not None
    assert len(data.train) == len(data.val) == 4
    open_views(str(folder), Augmentation(image_size=8), 2).close()


def test_results_of_a_full_check_are_used(folder: Path, cache_home: Path, tmp_path: Path) -> None:
    for cache in (cache_home, tmp_path / "cache"):
        result = scan(open_encoded(folder), cache=cache)
        option = None if cache == cache_home else str(cache)
        data = open_dataset(str(folder), None, world=SINGLE_PROCESS, backend="torchvision", cache=option)
        assert data.train.bad == result.bad == {1: "got 8 bytes that do not decode as an image (unknown format)"}
        loader = open_views(
            str(folder), Augmentation(image_size=8), 2, backend="torchvision", cache=option, max_bad=0.5
        )
        assert loader.source.bad == result.bad
        loader.close()


def test_small_images_are_decoded_once_and_keep_their_names(folder: Path) -> None:
    files = open_dataset(str(folder), None, world=SINGLE_PROCESS, backend="torchvision").train
    decoded = open_dataset(str(folder), None, world=SINGLE_PROCESS).train  # auto: small and of one size
    assert isinstance(files, EncodedSource)
    assert isinstance(decoded, ArraySource)
    assert [decoded.name(i) for i in range(3)] == [files.name(i) for i in range(3)]
    assert decoded.name(1) == f"{folder}/a/3.jpg"
    assert decoded.bad == {1: "got 8 bytes that do not decode as an image (unknown format)"}
    assert decoded.images[1].count_nonzero() == 0
    assert open_views(decoded, Augmentation(image_size=8), 2, max_bad=0.5).source is decoded


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


def test_small_images_of_several_sizes_are_loaded_from_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The sample of 64 does not have number 7 of 101, which decoding meets.
    images = {f"{n:03}.jpg": jpeg(photo(8, 9 if n == 7 else 8)) for n in range(101)}
    folder = str(write(tmp_path / "images", images))
    source = open_dataset(folder, None, world=SINGLE_PROCESS).train
    assert isinstance(source, EncodedSource)
    assert capsys.readouterr().err == "data: the images are not of one size, so torchvision loads them, not memory\n"
    assert choose_backend(source, SINGLE_PROCESS.device)[0] == "torchvision"
    with pytest.raises(UserError, match=r"007\.jpg: got 8x9 pixels, expected 8x8 .* needs images of one size"):
        open_dataset(folder, None, world=SINGLE_PROCESS, backend="memory")


def test_images_none_of_which_decodes_are_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", {"a.jpg": b"1", "b.jpg": b"22"})
    with pytest.raises(UserError, match=r"got 2 images that cannot be used, the first with: .*a\.jpg: got 1 bytes"):
        open_dataset(str(folder), None, world=SINGLE_PROCESS, backend="memory")


def open_on_a_rank(rank: int, path: str) -> str:
    def refuse_on_rank_1(train: Source, val: Source | None) -> tuple[Source, Source | None]:
        if rank == 1:
            raise UserError("not these")
        return train, val

    try:
        found = open_dataset(path, None, world=World(rank, 2, SINGLE_PROCESS.device), select=refuse_on_rank_1)
    except UserError as error:
        return str(error)
    return str(found)


@pytest.mark.slow
def test_all_ranks_fail_if_one_rejects_the_images(folder: Path) -> None:
    assert run_ranks(2, open_on_a_rank, str(folder)) == ["not these", "not these"]
