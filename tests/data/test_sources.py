"""Sources of images: folders, tar shards and built-in data sets, and errors for invalid ones."""

import gzip
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pictures import SHARED_DATA, jpeg, open_encoded, photo, write, write_tar
from torchvision.datasets import STL10

from fastsimclr.data import open_source
from fastsimclr.data.sources import ArraySource
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


# Tar shards


def test_brace_ranges_keep_leading_zeros(tmp_path: Path) -> None:
    for n in (8, 9, 10, 11):
        write_tar(tmp_path / f"train-{n:03}.tar", [(f"{n}.jpg", bytes([n])), (f"{n}.cls", b"%d" % (n % 2))])
        write_tar(tmp_path / f"plain-{n}.tar", [(f"{n}.jpg", bytes([n]))])
    source = open_encoded(tmp_path / "train-{008..010}.tar")
    assert [source.read(i).tolist() for i in range(len(source))] == [[8], [9], [10]]
    assert source.labels.tolist() == [0, 1, 0]
    assert source.name(2) == f"{tmp_path}/train-010.tar: 10.jpg"
    assert len(open_encoded(tmp_path / "plain-{8..11}.tar")) == 4
    assert len(open_encoded(tmp_path / "*n-{008..9}.tar")) == 2, "a range and a glob together"


def test_globs_are_sorted(tmp_path: Path) -> None:
    for n in (2, 0, 1):
        write_tar(tmp_path / f"s{n}.tar", [("x.jpg", bytes([n]))])
    for pattern in ("*.tar", "s?.tar", "s[012].tar"):
        source = open_encoded(tmp_path / pattern)
        assert [int(source.read(i)[0]) for i in range(3)] == [0, 1, 2]


def test_labels_from_cls_members_in_any_order(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "s.tar",
        # WebDataset's key ends at the first dot of the file name: 0001.seg.png and 0001.cls are one sample.
        [
            ("0001.cls", b" 7\n"),
            ("0001.jpg", b"a"),
            ("0001.seg.png", b"b"),
            ("v1.2/0001.jpg", b"c"),
            ("v1.2/0001.cls", b"11"),
            ("v1.2/0001.json", b"{}"),
        ],
    )
    source = open_encoded(shard)
    assert source.labels.tolist() == [7, 7, 11]
    assert source.classes == ["7", "11"], "sorted as numbers"
    assert source.read(2).tobytes() == b"c"


def test_labels_from_folders_inside_the_shard(tmp_path: Path) -> None:
    members = [("./train/rose/1.jpg", b"1"), ("train/daisy/2.jpg", b"2"), ("train/rose/3.jpg", b"3")]
    source = open_encoded(write_tar(tmp_path / "s.tar", members))
    assert source.classes == ["daisy", "rose"]
    assert source.labels.tolist() == [1, 0, 1]


def test_shards_without_labels(tmp_path: Path) -> None:
    source = open_encoded(write_tar(tmp_path / "s.tar", [("1.jpg", b"1"), ("2.jpg", b"2"), ("2.cls", b"3")]))
    assert source.labels.tolist() == [-1, -1], "labels are ignored unless all images have one"
    assert not source.has_labels


def test_members_that_are_not_images_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(link)
        for name, data in ((f"{'ü' * 120}/1.jpg", SMALL), ("2.txt", b"text")):  # 240 bytes need an extended header
            path_of_data = write(tmp_path, {"data": data}) / "data"
            tar.add(path_of_data, arcname=name)
    source = open_encoded(path)
    assert len(source) == 1
    assert source.read(0).tobytes() == SMALL


SHARD = [(f"{n:04}.jpg", SMALL) for n in range(5)]


@pytest.mark.parametrize(
    "cut",
    # Five members, each a header of 512 bytes and SMALL padded to blocks of 512.
    [
        "in the first header",
        "in a member's data",
        "in its padding",
        "in a header",
        "after a header",
        "before the end marker",
    ],
)
def test_truncated_shard_raises(tmp_path: Path, cut: str) -> None:
    path = write_tar(tmp_path / "cut.tar", SHARD)
    member = 512 + -(-len(SMALL) // 512) * 512
    assert len(SMALL) % 512, "there is padding to cut"
    length = {
        "in the first header": 300,
        "in a member's data": 3 * member + 512 + 100,
        "in its padding": 5 * member - 1,
        "in a header": 3 * member + 100,
        "after a header": 3 * member + 512,
        "before the end marker": 5 * member,
    }[cut]
    with path.open("r+b") as file:
        file.truncate(length)
    message = error_of(path)
    assert message.startswith(f"{path}: got a truncated or damaged tar")
    assert message.endswith("download or write it again")


def test_shard_truncated_at_any_length_raises(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", SHARD).read_bytes()
    end = 5 * (512 + -(-len(SMALL) // 512) * 512)
    for length in range(0, end + 1, 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        assert "truncated or damaged" in error_of(path), f"{length} of {len(whole)} bytes"


@pytest.mark.parametrize("member", [0, 2, 4])
def test_damaged_header_raises(tmp_path: Path, member: int) -> None:
    path = write_tar(tmp_path / "damaged.tar", SHARD)
    with path.open("r+b") as file:
        file.seek(member * (512 + -(-len(SMALL) // 512) * 512) + 100)
        file.write(random.Random(member).randbytes(40))
    assert error_of(path).startswith(f"{path}: got a truncated or damaged tar")


def test_compressed_and_foreign_files_raise(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", SHARD).read_bytes()
    gz = write(tmp_path, {"packed.tar": gzip.compress(whole)}) / "packed.tar"
    assert "expected a complete, uncompressed one" in error_of(gz)
    assert error_of(gz).startswith(f"{gz}: ")
    assert error_of(write(tmp_path, {"page.tar": b"<html>404</html>" * 99}) / "page.tar").startswith(f"{tmp_path}/page")
    assert error_of(write(tmp_path, {"x.tar.gz": b""}) / "x.tar.gz").startswith(f"{tmp_path}/x.tar.gz: got a file")


def test_missing_shards_raise(tmp_path: Path) -> None:
    for n in (0, 2):
        write_tar(tmp_path / f"s-{n}.tar", SHARD)
    assert error_of(tmp_path / "s-{0..2}.tar").startswith(f"{tmp_path}/s-1.tar: got no such file")
    assert error_of(tmp_path / "t.tar").startswith(f"{tmp_path}/t.tar: got no such file")
    assert error_of(tmp_path / "t-*.tar").startswith(f"{tmp_path}/t-*.tar: got no file that matches")
    assert "expected {0..2}" in error_of(tmp_path / "s-{2..0}.tar")


def test_shards_without_images_raise(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.txt", b"1"), ("2.json", b"{}")])
    assert error_of(path).startswith(f"{path}: got no images in 1 shards")


def test_shard_that_shrinks_while_being_read_raises(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", SHARD)
    source = open_encoded(path)
    with path.open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match=rf"^{path}: 0004.jpg: got 0 of {len(SMALL)} bytes"):
        source.read(4)


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
