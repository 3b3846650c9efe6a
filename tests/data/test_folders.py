"""Folders of images: which files and classes are found, and what is passed over and counted."""

import os
import socket
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pictures import names, open_encoded, write

from fastsimclr.data import open_source
from fastsimclr.data.folders import open_folder
from fastsimclr.errors import UserError

ABC = ("a/0.jpg", "b/0.jpg", "c/0.jpg")


def make(root: Path, entries: dict[str, str]) -> Path:
    """Make "" an empty file, "fifo", "socket" or "folder" what it says, and "-> TARGET" a link."""
    for name, kind in entries.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind.startswith("-> "):
            path.symlink_to(kind.removeprefix("-> "))
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(path))  # relative: at most 107 bytes
        elif kind == "folder":
            path.mkdir()
        else:
            path.touch()
    return root


def open_layout(root: Path, *files: str, **odd: str) -> tuple[list[str], list[str], list[str]]:
    """Make files, and return the keys, classes and notes of the source opened from the folder."""
    source = open_folder(str(make(root, dict.fromkeys(files, "") | odd)))
    return [source.key(i) for i in range(len(source))], list(source.classes), list(source.notes)


def error_of(root: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_class_folders_are_sorted_and_searched_recursively(tmp_path: Path) -> None:
    files = ("b/2.jpg", "b/deep/er/1.PNG", "b/deep-1.jpg", "a/9.webp", "a/10.jpeg", "c/x.tif")
    write(tmp_path, {name: name.encode() for name in files})
    source = open_encoded(tmp_path)
    # By the whole path: "-" sorts before "/".
    order = ("a/10.jpeg", "a/9.webp", "b/2.jpg", "b/deep-1.jpg", "b/deep/er/1.PNG", "c/x.tif")
    assert names(source) == [f"{tmp_path}/{file}" for file in order]
    assert source.classes == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert source.labels.dtype == np.int64
    assert source.has_labels
    assert source.read(4).tobytes() == b"b/deep/er/1.PNG"
    assert not source.notes


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = open_encoded(write(tmp_path, {"2.jpg": b"2", "10.png": b"10"}))
    assert names(source) == [f"{tmp_path}/10.png", f"{tmp_path}/2.jpg"]
    assert source.labels.tolist() == [-1, -1]
    assert not source.has_labels


def test_folder_name_with_glob_characters(tmp_path: Path) -> None:
    assert len(open_encoded(write(tmp_path / "photos [2020]", {"1.jpg": b""}))) == 1


@pytest.mark.parametrize(
    ("odd", "more", "note"),
    [
        # entries beside ABC, images that they add, the one note
        ({"cover.jpg": "", "logo.png": ""}, [], "images beside the class folders passed over: 2 (first: cover.jpg)"),
        ({"a/.0.jpg": "", "b/.DS_Store": ""}, [], "hidden files passed over: 2 (first: a/.0.jpg)"),
        ({"._a.jpg": ""}, [], "hidden files passed over: 1 (first: ._a.jpg)"),
        ({".ipynb_checkpoints/0.jpg": ""}, [], "hidden folders passed over: 1 (first: .ipynb_checkpoints)"),
        ({"a/.thumbnails/0.jpg": ""}, [], "hidden folders passed over: 1 (first: a/.thumbnails)"),
        ({".Trash-1000/files/x.jpg": ""}, [], "hidden folders passed over: 1 (first: .Trash-1000)"),
        ({"@eaDir/0.jpg/THUMB_M.jpg": ""}, [], "system folders passed over: 1 (first: @eaDir)"),
        ({"a/__MACOSX/0.jpg": "", "lost+found/1.jpg": ""}, [], "system folders passed over: 2 (first: lost+found)"),
        ({"$RECYCLE.BIN/0.jpg": ""}, [], "system folders passed over: 1 (first: $RECYCLE.BIN)"),
        ({"Thumbs.db": ""}, [], "other files passed over: 1 (.db 1)"),
        (
            {"a/0.HEIC": "", "b/0.heic": "", "labels.csv": "", "b/LICENSE": "", "notes/0.csv": ""},
            [],
            "other files passed over: 5 (.csv 2, .heic 2, LICENSE 1)",
        ),
        ({"a/0.npy": "", "features/1.npy": ""}, [], ".npy files beside images passed over: 2 (first: a/0.npy)"),
        ({"a/pipe.jpg": "fifo"}, [], "pipes, sockets and devices passed over: 1 (first: a/pipe.jpg)"),
        ({"a/s.jpg": "socket"}, [], "pipes, sockets and devices passed over: 1 (first: a/s.jpg)"),
        ({"a/null.jpg": "-> /dev/null"}, [], "pipes, sockets and devices passed over: 1 (first: a/null.jpg)"),
        ({"d": "-> /nowhere"}, [], "broken links passed over: 1 (first: d)"),
        (
            {"a/1.jpg": "-> /nowhere", "a/2.jpg": "-> 2.jpg"},
            ["a/1.jpg", "a/2.jpg"],
            "broken links kept as images that cannot be read: 2 (first: a/1.jpg)",
        ),
        ({"a/up": "-> .."}, [], "links to folders above or already listed passed over: 1 (first: a/up)"),
        ({"a/loop": "-> ."}, [], "links to folders above or already listed passed over: 1 (first: a/loop)"),
        ({"a/far": "-> ../.."}, [], "links to folders above or already listed passed over: 1 (first: a/far)"),
        ({"a/to_b": "-> ../b"}, [], "links to folders above or already listed passed over: 1 (first: a/to_b)"),
        (
            {f"{name}/up": "-> .." for name in "abc"},
            [],
            "links to folders above or already listed passed over: 3 (first: a/up)",
        ),
        ({"a/1.jpg": "-> ../b/0.jpg"}, ["a/1.jpg"], ""),
        ({"a/1.jpg/2.jpg": ""}, ["a/1.jpg/2.jpg"], ""),
        ({"a/two\nlines.jpg": ""}, ["a/two\nlines.jpg"], ""),
        ({"a/.two\nlines.jpg": ""}, [], "hidden files passed over: 1 (first: a/.two\\nlines.jpg)"),
        ({"a/caf\udce9.jpg": ""}, ["a/caf\udce9.jpg"], ""),
        ({"a/.caf\udce9.jpg": ""}, [], "hidden files passed over: 1 (first: a/.caf\\xe9.jpg)"),
        ({"a/..x.jpg": "", "...jpg": ""}, [], "hidden files passed over: 2 (first: ...jpg)"),
        ({"empty": "folder"}, [], ""),
    ],
)
def test_odd_entries_beside_class_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: dict[str, str], more: list[str], note: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data", dict.fromkeys(ABC, "") | odd)
    source = open_folder("data")
    assert [source.key(i) for i in range(len(source))] == sorted([*ABC, *more])
    assert list(source.classes) == ["a", "b", "c"]
    assert source.labels.tolist() == ["abc".index(source.key(i)[0]) for i in range(len(source))]
    assert list(source.notes) == [note] * bool(note)


def test_odd_files_in_a_flat_folder(tmp_path: Path) -> None:
    """They are treated as in class folders."""
    odd = {"1.jpg": "-> /nowhere", "pipe.jpg": "fifo", "up": "-> .", ".2.jpg": "", "x.txt": ""}
    keys, classes, notes = open_layout(tmp_path, "0.jpg", **odd)
    assert (keys, classes) == (["0.jpg", "1.jpg"], [])
    assert sorted(notes) == [
        "broken links kept as images that cannot be read: 1 (first: 1.jpg)",
        "hidden files passed over: 1 (first: .2.jpg)",
        "links to folders above or already listed passed over: 1 (first: up)",
        "other files passed over: 1 (.txt 1)",
        "pipes, sockets and devices passed over: 1 (first: pipe.jpg)",
    ]


def test_the_larger_part_counts_if_images_are_beside_class_folders(tmp_path: Path) -> None:
    assert open_layout(tmp_path / "1", "0.jpg", "1.jpg", "thumbnails/0.jpg") == (
        ["0.jpg", "1.jpg"],
        [],
        ["images in subfolders passed over, as more are beside them: 1 (first: thumbnails/0.jpg)"],
    )
    keys, classes, _ = open_layout(tmp_path / "2", "0.jpg", "1.jpg", "a/0.jpg", "b/0.jpg")
    assert (keys, classes) == (["a/0.jpg", "b/0.jpg"], ["a", "b"])


def test_folders_are_listed_once_by_their_own_path(tmp_path: Path) -> None:
    """However the names sort, and at whatever depth the link and the folder are."""
    make(tmp_path / "elsewhere", {"0.jpg": "", "more/1.jpg": ""})
    odd = {
        "a": "-> z",
        "b/link": "-> ../z/deep/er",
        "d": f"-> {tmp_path / 'elsewhere'}",
        "e": f"-> {tmp_path / 'elsewhere' / 'more'}",
    }
    keys, classes, notes = open_layout(tmp_path / "data", "b/0.jpg", "z/0.jpg", "z/deep/er/1.jpg", **odd)
    # Links of one level are followed before the folders in them: e/1.jpg is not listed as d/more/1.jpg.
    assert keys == ["b/0.jpg", "d/0.jpg", "e/1.jpg", "z/0.jpg", "z/deep/er/1.jpg"]
    assert classes == ["b", "d", "e", "z"]
    assert notes == ["links to folders above or already listed passed over: 3 (first: a)"]


@pytest.mark.parametrize(
    ("folders", "suggested"),
    [
        (["train", "val"], "train"),
        (["test", "Training", "validation"], "Training"),
        (["val2017", "train2017"], "train2017"),
        (["test", "dev"], "dev"),
    ],
)
def test_parts_of_a_dataset_are_no_classes(tmp_path: Path, folders: list[str], suggested: str) -> None:
    write(tmp_path, {f"{folder}/a/0.jpg": b"" for folder in folders} | {"annotations/all.json": b""})
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path}: got the folders {', '.join(sorted(folders))}, which are parts of a dataset")
    assert message.endswith(f"such as {tmp_path}/{suggested}")


def test_classes_may_be_called_like_parts(tmp_path: Path) -> None:
    assert open_layout(tmp_path, "bus/0.jpg", "train/0.jpg")[1] == ["bus", "train"]


def test_folder_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    """Here because its path is longer than the system takes, which holds for root, too."""
    make(tmp_path, dict.fromkeys(ABC, ""))
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    for _ in range(17):  # of 250 bytes: over 4,096
        os.mkdir("x" * 250, dir_fd=descriptor)
        parent, descriptor = descriptor, os.open("x" * 250, os.O_RDONLY, dir_fd=descriptor)
        os.close(parent)
    os.close(descriptor)
    keys, _, notes = open_layout(tmp_path)
    assert tuple(keys) == ABC
    assert len(notes) == 1
    assert notes[0].startswith("folders that cannot be read passed over: 1 (first: a/xxx")


def test_names_of_any_bytes_are_read(tmp_path: Path) -> None:
    files = {b"caf\xe9/1.jpg": b"1", b"\xff/2\n.jpg": b"2", "ü/3.jpg".encode(): b"3", "😀/4.jpg".encode(): b"4"}
    for name, data in files.items():
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path))
        Path(os.fsdecode(path)).write_bytes(data)
    source = open_encoded(tmp_path)
    assert [source.read(i).tobytes() for i in range(4)] == [files[name] for name in sorted(files)]
    assert [os.fsencode(name) for name in source.classes] == sorted(name.partition(b"/")[0] for name in files)


def test_opening_takes_little_memory(tmp_path: Path) -> None:
    """At most 150 MiB for 1.3 million images, that is 121 bytes each."""
    (tmp_path / "seed.bin").touch()
    for layout in ("flat", "classes/0", "classes/1"):
        (tmp_path / layout).mkdir(parents=True)
        for n in range(4000):
            os.link(tmp_path / "seed.bin", tmp_path / layout / f"ILSVRC2012_{n:08}.JPEG")
    for layout in ("flat", "classes"):
        tracemalloc.start()
        source = open_folder(str(tmp_path / layout))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 121 * len(source) + 2**17, f"{layout}: {peak / len(source):.0f} bytes an image"


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "nowhere", "got nothing at that path, expected a folder of images, tar shards"),
        ({"file.jpg": b""}, "file.jpg", "got a file, expected a folder of images, tar shards"),
        ({"empty/x/readme.txt": b""}, "empty", "got a folder with no images in it or its subfolders"),
        ({"empty/x/readme.txt": b""}, "empty/x", "got a folder with no images in it or its subfolders"),
    ],
)
def test_path_without_images_raises(tmp_path: Path, files: dict[str, bytes], path: str, message: str) -> None:
    write(tmp_path, files)
    assert error_of(tmp_path / path).startswith(f"{tmp_path / path}: {message}")


def test_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, {"a/0.heic": b"", "a/1.heic": b"", ".b/0.jpg": b""})
    message = error_of(tmp_path)
    assert message.endswith("hidden folders passed over: 1 (first: .b); other files passed over: 2 (.heic 2)")


@pytest.mark.parametrize("path", ["", " "])
def test_empty_path_is_not_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(write(tmp_path, {"0.jpg": b""}))
    assert error_of(path).startswith("data: got an empty path")
