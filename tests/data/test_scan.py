"""The scan for bad images: which are left out and why, what the next scan tries again, and ranks that share it."""

import fcntl
import importlib
import json
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import broken, encode, jpeg, kinds, photo, photo_folder, write, write_tar
from PIL import Image
from ranks import RankError, run_ranks

from fastsimclr.data.images import decode
from fastsimclr.data.scan import CACHE_FILE, BadImages, Scan, ScanStopped, scan
from fastsimclr.data.sources import EncodedSource, open_source
from fastsimclr.distributed import World
from fastsimclr.errors import UserError

scan_module = importlib.import_module("fastsimclr.data.scan")  # its function has the same name
GOOD = kinds() | {
    "long.jpg": jpeg(photo(2, 20_000)),
    "high.png": encode(Image.fromarray(photo(20_000, 2)), "PNG"),
}
BAD = broken()


def opened(path: Path | str) -> EncodedSource:
    source = open_source(str(path))
    assert isinstance(source, EncodedSource)
    return source


def names(source: EncodedSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def decoded_size(data: bytes) -> tuple[int, ...]:
    return tuple(decode(np.frombuffer(data, np.uint8).copy(), "").shape[1:])


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the images that scans decode, in the order of names; clear() it between scans."""
    calls: list[str] = []

    def recorded(data: NDArray[np.uint8], name: str) -> torch.Tensor:
        calls.append(re.split("/|: ", name)[-1])
        return decode(data, name)

    monkeypatch.setattr(scan_module, "decode", recorded)
    return calls


# What is left out


def test_every_kind_of_file_is_kept_with_its_size_or_left_out_with_its_name(tmp_path: Path) -> None:
    # Good and bad alternate by their names, so that a place shifted by one would be seen.
    write(tmp_path, {f"{i:02}-{name}": data for i, (name, data) in enumerate(GOOD.items())})
    write(tmp_path, {f"{3 * i:02}-{name}": data for i, (name, data) in enumerate(BAD.items())})
    result = scan(opened(tmp_path), max_bad=0.5)
    assert names(result.source) == sorted(f"{tmp_path}/{i:02}-{name}" for i, name in enumerate(GOOD))
    assert result.source.sizes is not None
    assert result.source.sizes.dtype == np.int64
    sizes = {name: decoded_size(data) for name, data in GOOD.items()}
    for name, size in zip(names(result.source), result.source.sizes.tolist(), strict=True):
        assert tuple(size) == sizes[Path(name).name[3:]], name
    assert sizes["long.jpg"] == (2, 20_000)
    assert sizes["one.jpg"] == (1, 1)
    assert sizes["exif6.jpg"] == sizes["rgb.jpg"][::-1], "upright"

    expected = sorted(f"{tmp_path}/{3 * i:02}-{name}" for i, name in enumerate(BAD))
    assert len(result.bad) == len(expected)
    for line, name in zip(result.bad, expected, strict=True):
        size = len(BAD[Path(name).name[3:]])
        assert line.startswith(f"{name}: got {size} bytes that do not decode as an image ("), line
        assert line.endswith(")"), "what to do about it is said once, not of each"
        assert "\n" not in line


def test_members_of_shards_are_kept_or_left_out_as_files_are(tmp_path: Path) -> None:
    members = [*GOOD.items(), *BAD.items()]
    members = [members[i] for i in np.random.default_rng(0).permutation(len(members))]
    cut = len(members) // 2
    write_tar(tmp_path / "0.tar", [(f"x/{name}", data) for name, data in members[:cut]])
    write_tar(tmp_path / "1.tar", [(f"y/{name}", data) for name, data in members[cut:]])
    result = scan(opened(tmp_path / "{0..1}.tar"), max_bad=0.5)
    kept = [Path(name).name for name in names(result.source)]
    assert kept == [name for name, _ in members if name in GOOD]
    assert result.source.sizes is not None
    assert [tuple(size) for size in result.source.sizes.tolist()] == [decoded_size(GOOD[name]) for name in kept]
    assert [result.source.read(i).tobytes() for i in range(len(kept))] == [GOOD[name] for name in kept]
    lines = [f"{tmp_path}/{i // cut}.tar: {'xy'[i // cut]}/{name}: got " for i, (name, _) in enumerate(members)]
    expected = [line for line, (name, _) in zip(lines, members, strict=True) if name in BAD]
    assert len(result.bad) == len(expected)
    assert all(line.startswith(start) for line, start in zip(result.bad, expected, strict=True))


def test_classes_and_labels_stay(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 9)
    write(folder, {"b/0.jpg": b"", "b/9.jpg": b"", "ab/only.jpg": b"a class with no good image keeps its number"})
    source = opened(folder)
    result = scan(source, max_bad=0.5)
    assert result.source.classes == source.classes == ["a", "ab", "b", "c"]
    assert result.source.labels.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert result.source.has_labels
    assert source.sizes is None, "the source that was scanned is as it was"
    assert len(source) == 12

    members = [("1.jpg", jpeg(photo(9, 9))), ("1.cls", b"5"), ("2.jpg", b""), ("2.cls", b"3")]
    result = scan(opened(write_tar(tmp_path / "s.tar", members)), max_bad=0.5)
    assert list(result.source.classes) == ["3", "5"]
    assert result.source.labels.tolist() == [5]


def test_a_subset_is_of_the_images_asked_for(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 9)
    shard = write_tar(tmp_path / "s.tar", [(f"{n}/x.jpg", jpeg(photo(9, 10 + n))) for n in range(4)])
    for source in (opened(folder), opened(shard)):
        source = scan(source).source
        assert source.sizes is not None
        part = source.subset(np.array([3, 1]))
        assert type(part) is type(source)
        assert names(part) == [names(source)[3], names(source)[1]]
        assert part.labels.tolist() == [source.labels[3], source.labels[1]]
        assert part.classes == source.classes
        assert part.sizes is not None
        assert part.sizes.tolist() == [source.sizes[3].tolist(), source.sizes[1].tolist()]
        assert part.read(0).tobytes() == source.read(3).tobytes()


@pytest.mark.parametrize(
    ("bad", "max_bad", "passes"),
    # Of 50 images. 0.58 * 50 is 28.999999999999996: a product would refuse the 29.
    [
        (0, 0.0, True),
        (1, 0.0, False),
        (1, 0.02, True),
        (2, 0.02, False),
        (29, 0.58, True),
        (30, 0.58, False),
        (49, 1.0, True),
        (50, 1.0, False),
        (50, 0.5, False),
    ],
)
def test_more_than_max_bad_is_refused_in_one_line(tmp_path: Path, bad: int, max_bad: float, passes: bool) -> None:
    small = jpeg(photo(6, 6))
    write(tmp_path, {f"{n:02}.jpg": b"x" if n < bad else small for n in range(50)})
    if passes:
        result = scan(opened(tmp_path), max_bad=max_bad)
        assert (len(result.source), len(result.bad)) == (50 - bad, bad)
        return
    with pytest.raises(BadImages, match=f"^max_bad: got {bad} of 50 images that cannot be used, expected ") as caught:
        scan(opened(tmp_path), max_bad=max_bad)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{tmp_path}/00.jpg: got 1 bytes that do not decode as an image (unknown format)" in message
    assert message.count("do not decode") == min(bad, 3), "a few are named"
    assert (f"; and {bad - 3} more" in message) == (bad > 3)
    assert "remove or replace them" in message
    assert len(caught.value.bad) == bad
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("max_bad", [-0.1, 1.5, float("nan")])
def test_max_bad_is_a_fraction(tmp_path: Path, max_bad: float) -> None:
    with pytest.raises(UserError, match=f"^max_bad: got {max_bad}, expected a fraction from 0 to 1"):
        scan(opened(photo_folder(tmp_path, 3)), max_bad=max_bad)


# What the next scan tries


def test_only_what_is_new_or_has_changed_is_tried_again(tmp_path: Path, tried: list[str]) -> None:
    folder, run = photo_folder(tmp_path / "photos", 12), tmp_path / "run"
    write(folder, {"b/bad.jpg": b"bad", "c/gone.jpg": b"bad"})
    first = scan(opened(folder), max_bad=0.5, cache=run)
    assert len(tried) == first.checked == 14
    tried.clear()

    second = scan(opened(folder), max_bad=0.5, cache=run)
    assert tried == []
    assert second.checked == 0
    same(first, second)

    write(folder, {"a/new.jpg": jpeg(photo(30, 41)), "a/000.jpg": jpeg(photo(50, 61))})
    write(folder, {"b/bad.jpg": jpeg(photo(8, 9)), "b/001.jpg": b"bad now", "c/bad.jpg": b"new and bad"})
    (folder / "c" / "gone.jpg").unlink()
    (folder / "c" / "002.jpg").unlink()
    stat = os.stat(folder / "a" / "003.jpg")
    os.utime(folder / "a" / "003.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    third = scan(opened(folder), max_bad=0.5, cache=run)
    assert sorted(tried) == ["000.jpg", "001.jpg", "003.jpg", "bad.jpg", "bad.jpg", "new.jpg"]
    same(third, scan(opened(folder), max_bad=0.5))
    assert [Path(line.partition(":")[0]).name for line in third.bad] == ["001.jpg", "bad.jpg"]
    tried.clear()
    same(third, scan(opened(folder), max_bad=0.5, cache=run))
    assert tried == []


def same(one: Scan, other: Scan) -> None:
    assert names(one.source) == names(other.source)
    assert one.source.labels.tolist() == other.source.labels.tolist()
    assert one.source.sizes is not None
    assert other.source.sizes is not None
    assert one.source.sizes.tolist() == other.source.sizes.tolist()
    assert one.bad == other.bad


def test_only_changed_shards_are_tried_again(tmp_path: Path, tried: list[str]) -> None:
    members = [[(f"{s}{n}.jpg", jpeg(photo(9 + s, 9 + n)) if n else b"bad") for n in range(4)] for s in range(3)]
    for s in range(2):
        write_tar(tmp_path / f"{s}.tar", members[s])
    first = scan(opened(tmp_path / "*.tar"), max_bad=0.5, cache=tmp_path)
    assert len(tried) == 8
    tried.clear()
    same(first, scan(opened(tmp_path / "*.tar"), max_bad=0.5, cache=tmp_path))
    assert tried == []
    write_tar(tmp_path / "2.tar", members[2])  # new
    write_tar(tmp_path / "1.tar", members[1][::-1])
    third = scan(opened(tmp_path / "*.tar"), max_bad=0.5, cache=tmp_path)
    assert sorted(tried) == sorted(name for s in (1, 2) for name, _ in members[s])
    same(third, scan(opened(tmp_path / "*.tar"), max_bad=0.5))


def test_one_cache_serves_several_sources_from_any_folder(
    tmp_path: Path, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "val"):
        photo_folder(tmp_path / name, 6)
    for name in ("train", "val"):
        scan(opened(tmp_path / name), cache=tmp_path)
    assert len(tried) == 12
    tried.clear()
    monkeypatch.chdir(tmp_path / "train")
    assert len(scan(opened("../val"), cache="..").source) == 6
    assert len(scan(opened("."), cache="..").source) == 6
    assert tried == [], "by absolute paths they are the same"


def test_what_is_no_whole_cache_is_written_anew(tmp_path: Path, tried: list[str]) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    write(folder, {"a/bad.jpg": b"bad"})
    file = tmp_path / CACHE_FILE
    first = scan(opened(folder), max_bad=0.5, cache=tmp_path)
    whole = file.read_bytes()
    with np.load(file) as saved:
        parts = dict(saved)
    damaged = bytearray(whole)
    damaged[whole.index(parts["entries"].tobytes()) + 5] ^= 1
    others: dict[str, bytes | dict[str, Any]] = {
        "empty": b"",
        "text": b"name,height,width\n",
        "a bit": bytes(damaged),
        "another's arrays": {"images": np.zeros(3)},
        "another's decoders": parts | {"made_by": np.array("fastsimclr scan 1, torchvision 0.1, Pillow 1.0")},
        "out of order": parts | {"entries": parts["entries"][::-1]},
        "without the reasons": parts | {"faults": np.frombuffer(b"{}", np.uint8)},
        "reasons of none": parts | {"entries": parts["entries"][:0]},
        "a pickle": {"made_by": np.array([{}], dtype=object), "entries": np.zeros(3)},
    }
    for length in range(0, len(whole), 97):
        others[f"cut at {length}"] = whole[:length]
    for what, content in others.items():
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.savez(file, **content)
        tried.clear()
        same(first, scan(opened(folder), max_bad=0.5, cache=tmp_path))
        assert len(tried) == 7, what
        tried.clear()
        same(first, scan(opened(folder), max_bad=0.5, cache=tmp_path))
        assert tried == [], f"{what}: written anew"
    assert sorted(path.name for path in tmp_path.iterdir()) == [CACHE_FILE, "photos"], "nothing else is left"


def test_what_cannot_be_read_is_bad_but_not_remembered(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    (folder / "a" / "link.jpg").symlink_to(tmp_path / "later.jpg")
    source = opened(folder)
    gone = folder / "c" / "002.jpg"
    data, stat = gone.read_bytes(), os.stat(gone)
    gone.unlink()
    shard = write_tar(tmp_path / "s.tar", [(f"{n}.jpg", jpeg(photo(9, 9))) for n in range(4)])
    shrunk = opened(shard)
    with shard.open("r+b") as file:
        file.truncate(2600)

    result = scan(source, max_bad=0.5, cache=tmp_path)
    assert result.bad == [
        f"{folder}/a/link.jpg: cannot be read (No such file or directory)",
        f"{gone}: cannot be read (No such file or directory)",
    ]
    assert scan(source, max_bad=0.5, cache=tmp_path).checked == 2
    write(tmp_path, {"later.jpg": data, "photos/c/002.jpg": data})
    os.utime(gone, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert scan(source, max_bad=0, cache=tmp_path).checked == 2

    result = scan(shrunk, max_bad=0.9, cache=tmp_path)
    assert result.bad[-1].startswith(f"{shard}: 3.jpg: got 0 of ")
    tried = scan(shrunk, max_bad=0.9, cache=tmp_path).checked
    assert tried == len(result.bad)


def test_an_image_that_memory_did_not_suffice_for_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(data: NDArray[np.uint8], name: str) -> torch.Tensor:
        cause = (
            MemoryError() if name.endswith("000.jpg") else RuntimeError("DefaultCPUAllocator: can't allocate memory")
        )
        raise UserError(f"{name}: got {len(data)} bytes that do not decode") from cause

    folder = photo_folder(tmp_path / "photos", 6)
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "decode", fails)
        with pytest.raises(BadImages, match="expected at least one that can"):
            scan(opened(folder), max_bad=1, cache=tmp_path)
    assert scan(opened(folder), max_bad=0, cache=tmp_path).checked == 6


def test_a_cache_that_cannot_be_written_is_said_before_the_work(tmp_path: Path, tried: list[str]) -> None:
    write(tmp_path, {"file": b""})
    with pytest.raises(UserError, match=rf"^{tmp_path}/file/{CACHE_FILE}: cannot be written \(.*expected a folder"):
        scan(opened(photo_folder(tmp_path / "photos", 6)), cache=tmp_path / "file")
    assert tried == []


def test_names_of_any_bytes_are_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate((b"\xff.jpg", b"\xfe.jpg", "ü.jpg".encode(), b"new\nline.jpg")):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(
            jpeg(photo(9, 9 + number)) if number else b"bad"
        )
    first = scan(opened(folder), max_bad=0.5, cache=tmp_path)
    assert len(first.bad) == 1
    assert first.bad[0].startswith(f"{folder}/\udcff.jpg: ")
    second = scan(opened(folder), max_bad=0.5, cache=tmp_path)
    assert second.checked == 0
    same(first, second)


# Long scans, and ranks


def test_a_scan_that_is_stopped_was_not_in_vain(tmp_path: Path, tried: list[str]) -> None:
    folder = photo_folder(tmp_path / "photos", 40)
    with pytest.raises(ScanStopped):
        scan(opened(folder), cache=tmp_path, stop=lambda: len(tried) >= 15)
    done = len(tried)
    assert 15 <= done < 15 + len(os.sched_getaffinity(0)), "each thread may have been at one more"
    tried.clear()
    assert len(scan(opened(folder), cache=tmp_path).source) == 40
    assert len(tried) == 40 - done


def test_a_scan_that_breaks_was_not_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photo_folder(tmp_path / "photos", 30)
    monkeypatch.setattr(scan_module, "_ROUND_S", 0.02)

    def slow(data: NDArray[np.uint8], name: str) -> torch.Tensor:
        time.sleep(0.005)
        if name.endswith("c/029.jpg"):
            raise MemoryError
        return decode(data, name)

    monkeypatch.setattr(scan_module, "decode", slow)
    with pytest.raises(MemoryError):
        scan(opened(folder), cache=tmp_path)
    monkeypatch.setattr(scan_module, "decode", decode)
    assert 1 <= scan(opened(folder), cache=tmp_path).checked < 30


def test_long_scans_save_as_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photo_folder(tmp_path / "photos", 30)
    monkeypatch.setattr(scan_module, "_ROUND_S", 0.02)
    monkeypatch.setattr(scan_module, "_SAVE_EVERY_S", 0.0)
    entries = []

    def watching(data: NDArray[np.uint8], name: str) -> torch.Tensor:
        time.sleep(0.005)
        with np.load(tmp_path / CACHE_FILE) as saved:  # whole whenever it is looked at
            entries.append(len(saved["entries"]))
        return decode(data, name)

    monkeypatch.setattr(scan_module, "decode", watching)
    scan(opened(folder), cache=tmp_path)
    assert entries[0] == 0
    assert 0 < entries[-1] < 30
    assert len(set(entries)) > 3


@pytest.mark.parametrize(("terminal", "slow"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_on_a_terminal_and_when_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, slow: bool
) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    monkeypatch.setattr(scan_module, "_PROGRESS_AFTER_S", 0.0 if slow else 60.0)
    read_end, write_end = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(write_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with open(read_end, "rb", buffering=0) as reader, open(write_end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        scan(opened(folder))
        stderr.write("end")
        stderr.flush()
        said = b""
        while not said.endswith(b"end"):
            said += reader.read(1000)
    assert (b"6/6" in said) == (terminal and slow)
    assert (said == b"end") == (not (terminal and slow))


def ranks_scan(rank: int, folder: str, run: str) -> dict[str, Any]:
    """On each of two ranks: what scans give, and the images that this rank decoded."""
    tried: list[str] = []

    def recorded(data: NDArray[np.uint8], name: str) -> torch.Tensor:
        tried.append(name)
        return decode(data, name)

    scan_module.__dict__["decode"] = recorded  # of this process, which is this test's own
    world = World(rank, 2, torch.device("cpu"))
    cache = f"{run}/{rank}"  # as on two nodes: each has a folder of its own
    out: dict[str, Any] = {}
    for name in ("first", "second"):
        tried.clear()
        out[name] = scan(opened(folder), max_bad=0.5, cache=cache, world=world), list(tried)
    with pytest.raises(BadImages) as refused:
        scan(opened(folder), max_bad=0.01, cache=cache, world=world)
    out["refused"] = str(refused.value)
    with pytest.raises(UserError) as refused_folder:
        scan(opened(folder), max_bad=0.5, cache=f"{run}/file", world=world)
    out["no folder"] = str(refused_folder.value)
    with pytest.raises(ScanStopped):  # one rank is told to stop: all do
        scan(opened(folder), max_bad=0.5, world=world, stop=lambda: rank == 1)
    source = opened(folder)
    with pytest.raises(UserError) as different:
        scan(source if rank == 0 else source.subset(np.arange(len(source) - 1)), max_bad=0.5, world=world)
    out["different"] = str(different.value)
    alone = source.subset(np.array([0]))  # less work than ranks
    out["alone"] = scan(alone, world=world)
    return out


def ranks_break(rank: int, folder: str) -> None:
    def breaks(data: NDArray[np.uint8], name: str) -> torch.Tensor:
        raise RuntimeError(f"an internal error on rank {rank}")

    if rank == 1:
        scan_module.__dict__["decode"] = breaks
    scan(opened(folder), world=World(rank, 2, torch.device("cpu")))


def test_ranks_share_the_work_and_the_result(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", {f"{n:02}{name}": data for n, (name, data) in enumerate((GOOD | BAD).items())})
    write(tmp_path / "run", {"file": b""})
    alone = scan(opened(folder), max_bad=0.5)
    results = run_ranks(2, ranks_scan, str(folder), str(tmp_path / "run"))
    for result in results:
        same(alone, result["first"][0])
        same(alone, result["second"][0])
        assert result["first"][0].checked == len(GOOD) + len(BAD)
        assert result["second"][1] == [], "the first rank's cache serves all"
        assert len(result["alone"].source) == 1
    halves = [result["first"][1] for result in results]
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    assert sorted(halves[0] + halves[1]) == names(opened(folder))
    assert not (tmp_path / "run" / "1").exists(), "the first rank alone writes"
    for what, words in {
        "refused": f"max_bad: got {len(BAD)} of {len(GOOD) + len(BAD)} images",
        "no folder": "cannot be written",
        "different": f"data: got {len(GOOD) + len(BAD) - 1} images on rank 1 and {len(GOOD) + len(BAD)} on rank 0",
    }.items():
        assert results[0][what] == results[1][what]
        assert words in results[0][what]


def test_a_fault_on_one_rank_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="an internal error on rank 1"):
        run_ranks(2, ranks_break, str(photo_folder(tmp_path, 9)), timeout_seconds=60)


def test_the_cache_is_small_and_readable(tmp_path: Path) -> None:
    scan(opened(write(tmp_path / "photos", GOOD | BAD)), max_bad=0.5, cache=tmp_path)
    with np.load(tmp_path / CACHE_FILE) as saved:
        assert saved["entries"].dtype.itemsize == 32
        assert len(saved["entries"]) == len(GOOD) + len(BAD)
        assert len(json.loads(saved["faults"].tobytes())) == len(BAD)
