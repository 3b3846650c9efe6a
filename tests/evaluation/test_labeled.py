"""Labeled subsets: class-balanced and reproducible, or given by a list; and matching classes of train and val."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import jpeg, open_encoded, photo, write
from ranks import run_ranks

from fastsimclr.config import DataConfig
from fastsimclr.data import open_source
from fastsimclr.data.scan import scan
from fastsimclr.data.subsets import class_balanced, hold_out
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError
from fastsimclr.evaluation.labeled import open_labeled


def subset(fraction: float, seed: int) -> np.ndarray:
    kept = class_balanced(open_source("digits"), fraction, seed)
    assert kept is not None
    return kept


@pytest.mark.parametrize(("fraction", "each"), [(0.01, 1), (0.1, 14), (0.5, 72), (0.0001, 1)])
def test_subset_is_class_balanced(fraction: float, each: int) -> None:
    """1,433 digits: 1 % are 1.4 images of each class, 10 % are 14.3, 50 % are 71.65."""
    labels = open_source("digits").labels
    assert np.bincount(labels[subset(fraction, 0)]).tolist() == [each] * 10


def test_class_with_fewer_images_is_kept_whole(tmp_path: Path) -> None:
    write(tmp_path, {f"many/{i}.jpg": jpeg(photo(8, 8)) for i in range(17)} | {"few/1.jpg": jpeg(photo(8, 8))})
    source = open_source(str(tmp_path))
    kept = class_balanced(source, 0.5, 0)
    assert kept is not None
    assert np.bincount(source.labels[kept]).tolist() == [1, 4]


def test_subset_of_a_seed_is_the_same_on_every_machine() -> None:
    """Pinned: a different subset with another NumPy, platform or release would make accuracies incomparable."""
    digest = hashlib.sha256(np.concatenate([subset(0.1, 0), subset(0.01, 7)]).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "98fc829328a56ed7"


def test_subset_depends_on_the_seed_and_smaller_subsets_are_nested() -> None:
    assert set(subset(0.1, 0)) != set(subset(0.1, 1))
    assert set(subset(0.1, 0)) < set(subset(0.2, 0))


def open_on_a_rank(rank: int, _: int) -> tuple[list[int], list[int]]:
    world = World(rank, 2, torch.device("cpu"))
    found = [open_labeled(DataConfig(train="digits"), fraction, 3, world).train for fraction in (0.01, 0.1)]
    return tuple(source.images.flatten(1).sum(1).tolist() for source in found)  # type: ignore[attr-defined,return-value]


@pytest.mark.slow
def test_every_rank_has_the_same_subset() -> None:
    first, second = run_ranks(2, open_on_a_rank, 0)
    assert first == second
    single = open_labeled(DataConfig(train="digits"), 0.1, 3, SINGLE_PROCESS).train
    assert first[1] == single.images.flatten(1).sum(1).tolist()  # type: ignore[attr-defined]


def test_hold_out_takes_a_fifth_of_each_class() -> None:
    source = open_source("digits")
    rest, held = hold_out(source, 0.2, 0)
    assert sorted([*rest, *held]) == list(range(len(source)))
    assert np.bincount(source.labels[held]).tolist() == [n // 5 for n in np.bincount(source.labels)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a/1 to a/4 and b/3 to b/6: two file names occur twice."""
    files = [f"a/{i}.jpg" for i in range(1, 5)] + [f"b/{i}.jpg" for i in range(3, 7)]
    return write(tmp_path / "train", {file: jpeg(photo(16, 12, seed=i)) for i, file in enumerate(files)})


@pytest.mark.parametrize("names", ["1.jpg\n6.jpg\n", "a/1.jpg\nb/6.jpg", "somewhere/b/6.jpg\r\n\r\n1.jpg\n"])
def test_list_selects_images(folder: Path, tmp_path: Path, names: str) -> None:
    (tmp_path / "list.txt").write_text(names)
    found = open_labeled(DataConfig(train=str(folder)), str(tmp_path / "list.txt"), 0, SINGLE_PROCESS)
    assert [Path(found.train.name(i)).name for i in range(len(found.train))] == ["1.jpg", "6.jpg"]
    assert found.train.labels.tolist() == [0, 1]
    assert found.available_images == 8


def test_list_selects_images_of_shards(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(folder, "train")
    (tmp_path / "list.txt").write_text("2.jpg\nb/3.jpg\n")
    found = open_labeled(DataConfig(train=str(tmp_path / "0.tar")), str(tmp_path / "list.txt"), 0, SINGLE_PROCESS)
    assert [found.train.name(i)[-7:] for i in range(2)] == ["a/2.jpg", "b/3.jpg"]


@pytest.mark.parametrize(("names", "expected"), [("9.jpg\n1.jpg", "9.jpg"), ("3.jpg", "CLASS/NAME"), ("", "0 names")])
def test_list_with_unknown_or_ambiguous_names_raises(folder: Path, tmp_path: Path, names: str, expected: str) -> None:
    (tmp_path / "list.txt").write_text(names)
    with pytest.raises(UserError, match=expected):
        open_labeled(DataConfig(train=str(folder)), str(tmp_path / "list.txt"), 0, SINGLE_PROCESS)


def test_class_numbers_with_gaps_become_contiguous_labels(tmp_path: Path) -> None:
    """Classes 3 and 70 of two tars become labels 0 and 1."""
    for name in ("train", "val"):
        files = write(tmp_path / name, {"1.jpg": jpeg(photo(8, 8)), "2.jpg": jpeg(photo(9, 8))})
        (files / "1.cls").write_text("70")
        (files / "2.cls").write_text("3")
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(files, ".")
    data = DataConfig(train=str(tmp_path / "train.tar"), val=str(tmp_path / "val.tar"))
    found = open_labeled(data, 1.0, 0, SINGLE_PROCESS)
    assert found.val is not None
    assert list(found.classes) == ["3", "70"]
    assert sorted(found.train.labels.tolist()) == sorted(found.val.labels.tolist()) == [0, 1]


def test_images_that_a_full_check_found_bad_are_named(folder: Path, cache_home: Path) -> None:
    (folder / "a" / "1.jpg").write_bytes(b"no image")
    data = DataConfig(train=str(folder), backend="torchvision")
    assert open_labeled(data, 1.0, 0, SINGLE_PROCESS).skipped == []
    scan(open_encoded(folder), cache=cache_home)
    found = open_labeled(data, 1.0, 0, SINGLE_PROCESS)
    assert found.skipped == [f"{folder}/a/1.jpg: got 8 bytes that do not decode as an image (unknown format)"]
    assert len(found.train) == 8
