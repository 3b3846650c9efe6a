"""Sources of images: folders, tar shards and built-in data sets, and errors for invalid ones."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pictures import SHARED_DATA, jpeg, open_encoded, photo, write, write_tar
from torchvision.datasets import STL10

from fastsimclr.data import open_source
from fastsimclr.data.sources import ArraySource, EncodedSource
from fastsimclr.errors import UserError

SMALL = jpeg(photo(8, 8))


def error_of(path: Path | str) -> str:
    """Return the one-line error that open_source raises for `path`."""
    with pytest.raises(UserError) as caught:
        open_source(str(path))
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    return message


# Built-in data sets


def test_digits_are_split_without_overlap() -> None:
    train, val = open_source("digits"), open_source("digits", split="val")
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    assert len(train) + len(val) == 1797
    assert 355 <= len(val) <= 368  # a fifth of each class, rounded up
    for source in (train, val):
        assert source.images.shape == (len(source), 32, 32, 3)
        assert source.images.numpy().dtype == np.uint8
        assert source.images.max() > 240
        assert (source.images[..., :1] == source.images).all(), "gray: three equal channels"
        assert set(source.labels) == set(range(10))
    # Each of scikit-learn's images is in exactly one split.
    both = Counter(image.numpy().tobytes() for source in (train, val) for image in source.images)
    assert sum(both.values()) == 1797
    assert not {i.numpy().tobytes() for i in train.images} & {i.numpy().tobytes() for i in val.images}
    assert val.name(3) == "digits[3]"


@pytest.mark.parametrize(
    ("name", "title", "folder"), [("cifar10", "CIFAR-10", "cifar-10-batches-py"), ("stl10", "STL-10", "stl10_binary")]
)
def test_built_in_data_set_that_cannot_be_downloaded_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, title: str, folder: str
) -> None:
    # A proxy at a closed local port fails at once, without network access.
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    message = error_of(f"{name}:{tmp_path}")
    assert message.startswith(f"{name}:{tmp_path}: got no {title} in that folder and could not download it")
    assert f"expected {folder} in it" in message


def test_stl10_is_read_from_its_binary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three images in STL-10's format; torchvision's checksums accept only the original files.
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    pixels = np.stack([photo(96, 96, seed) for seed in range(3)])
    stored = pixels.transpose(0, 3, 2, 1)  # planar, and column-major in each channel
    files = {"train_X.bin": stored[:2], "train_y.bin": np.array([3, 10], np.uint8), "unlabeled_X.bin": stored[2:]}
    files |= {"test_X.bin": stored[1:2], "test_y.bin": np.array([1], np.uint8)}
    write(tmp_path / "stl10_binary", {name: array.tobytes() for name, array in files.items()})
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    write(tmp_path / "stl10_binary", {"class_names.txt": "\n".join(classes).encode(), "fold_indices.txt": b"0 1\n"})
    train, val = (open_source(f"stl10:{tmp_path}", split=split) for split in ("train", "val"))
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    assert np.array_equal(train.images.numpy(), pixels)
    assert train.labels.tolist() == [2, 9, -1]
    assert not train.has_labels
    assert list(train.classes) == classes
    assert np.array_equal(val.images.numpy(), pixels[1:2])
    assert val.labels.tolist() == [0]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs shared/data beside the repository")
@pytest.mark.slow
def test_real_shards() -> None:
    photos = open_encoded(SHARED_DATA / "photos" / "flowers_300.tar")
    assert len(photos) == 300
    assert photos.read(299)[:2].tobytes() == b"\xff\xd8"
    cifar = open_encoded(SHARED_DATA / "cifar10" / "train-{0..4}.tar")
    assert cifar.has_labels
    assert len(set(cifar.labels)) == len(cifar.classes) == 10


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_aligned_source_keeps_the_order_of_the_run(tmp_path: Path, kind: str) -> None:
    files = {f"{name[0]}/{name}.jpg": jpeg(photo(20, 20, seed=n)) for n, name in enumerate(("a1", "b1", "c1"))}

    def open_files(files: dict[str, bytes], name: str) -> EncodedSource:
        if kind == "folder":
            return open_encoded(write(tmp_path / name, files))
        write_tar(tmp_path / name / "photos.tar", list(files.items()))
        return open_encoded(tmp_path / name / "photos.tar")

    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    before = open_files(files, "before")
    after = {"a/a0.jpg": files["a/a1.jpg"], "aa/a2.jpg": files["a/a1.jpg"], "c/c1.jpg": files["c/c1.jpg"]}
    opened = open_files(after | {"b/b1.jpg": files["b/b1.jpg"]}, "after")
    aligned = opened.aligned(before.keys(), before.labels, before.classes)
    assert list(aligned.keys()) == list(before.keys())
    assert aligned.digest() == before.digest()
    assert aligned.labels.tolist() == [0, 1, 2]
    assert list(aligned.classes) == ["a", "b", "c"], "classes keep their numbers"
    assert aligned.bad == {0: "no such file; it was there when the run started"}
    assert "a/a1.jpg" in aligned.name(0)
    for index, key in ((1, "b/b1.jpg"), (2, "c/c1.jpg")):
        assert aligned.read(index).tobytes() == files[key]
    assert [note.partition(" ")[0] for note in aligned.notes] == ["1", "2"], "one is gone, two are new"
    assert opened.bad == {}
