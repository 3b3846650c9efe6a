"""Samples and splits of labeled images, and classes that are matched by name."""

import numpy as np
import pytest
import torch

from fastsimclr.data.sources import ArraySource, FolderSource
from fastsimclr.data.subsets import class_indices, hold_out, sample, split
from fastsimclr.errors import UserError


def source(counts: list[int]) -> FolderSource:
    """Images of classes a, b, … of these sizes, in a mixed order."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    names = [f"{'abcdef'[label]}/{index}.jpg" for index, label in enumerate(labels)]
    return FolderSource(names, labels, list("abcdef")[: len(counts)], "/photos")


def names(part: FolderSource) -> list[str]:
    return [part.key(index) for index in range(len(part))]


def test_sample_keeps_the_share_of_each_class() -> None:
    whole = source([600, 300, 90, 10])
    part = sample(whole, 100, 0)
    assert len(part) == 100
    assert np.bincount(part.labels).tolist() == [60, 30, 9, 1]
    assert names(part) == [name for name in names(whole) if name in set(names(part))], "in the order of the source"
    assert names(sample(whole, 100, 0)) == names(part)
    assert names(sample(whole, 100, 1)) != names(part)
    assert sample(whole, 1000, 0) is sample(whole, None, 0) is whole


def test_split_changes_little_when_files_vanish() -> None:
    whole = source([200, 100, 50])
    rest, held = split(whole, 0.1, 0)
    assert np.bincount(held.labels).tolist() == [20, 10, 5]
    assert sorted(names(rest) + names(held)) == sorted(names(whole))
    kept = np.delete(np.arange(350), [3, 77, 200])
    fewer_rest, fewer_held = split(whole.subset(kept), 0.1, 0)
    moved = set(names(fewer_held)) & set(names(rest)) | set(names(fewer_rest)) & set(names(held))
    assert len(moved) <= 3
    assert set(names(split(whole, 0.1, 1)[1])) != set(names(held))


def test_split_does_not_depend_on_where_the_files_are() -> None:
    here, elsewhere = source([40, 40]), source([40, 40])
    elsewhere.root = "/other"
    assert np.array_equal(hold_out(here, 0.1, 0)[1], hold_out(elsewhere, 0.1, 0)[1])


def test_split_without_labels_or_with_too_few_images_raises() -> None:
    unlabeled = FolderSource(["0.jpg", "1.jpg"], np.array([-1, -1]), ())
    with pytest.raises(UserError, match=r"--data\.val: got 0\.5, but the images have no labels"):
        split(unlabeled, 0.5, 0)
    with pytest.raises(UserError, match=r"got 0\.1, which is not one image of any class, as the largest has 8; "):
        split(source([8, 5]), 0.1, 0)


def test_classes_are_matched_by_name() -> None:
    images = np.zeros((3, 2, 2, 3), np.uint8)
    train = ArraySource("train", torch.from_numpy(images), np.array([0, 1, 2]), ["cat", "dog", "ant"])
    val = ArraySource("val", torch.from_numpy(images), np.array([2, 0, -1]), ["ant", "cat", "dog"])
    assert class_indices(val, train.classes).tolist() == [1, 2, -1]
    numbers = ArraySource("tar", torch.from_numpy(images), np.array([70, 3, 70]), ["3", "70"])
    assert class_indices(numbers, numbers.classes).tolist() == [1, 0, 1]
    assert class_indices(numbers.subset(np.array([1])), numbers.classes).tolist() == [0]
