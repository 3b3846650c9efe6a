"""The scan for bad images: which are skipped and why, what a later scan decodes again, and scans on several ranks."""

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
from pictures import broken, encode, jpeg, kinds, names, open_encoded, photo, photo_folder, write, write_tar
from PIL import Image
from ranks import RankError, run_ranks

from fastsimclr.data import checks
from fastsimclr.data.checks import ScanStopped
from fastsimclr.data.images import decode
from fastsimclr.data.scan import CACHE_FILE, BadImages, Scan, scan
from fastsimclr.distributed import World
from fastsimclr.errors import UserError

scan_module = importlib.import_module("fastsimclr.data.scan")  # `scan` is its function
GOOD = kinds() | {
    "long.jpg": jpeg(photo(2, 20_000)),
    "high.png": encode(Image.fromarray(photo(20_000, 2)), "PNG"),
}
BAD = broken()


def decoded_size(data: bytes) -> tuple[int, ...]:
    return tuple(decode(np.frombuffer(data, np.uint8).copy(), "").shape[1:])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """File names of the images that scans decode; clear() it between scans."""
    calls: list[str] = []

    def recorded(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        calls.append(re.split("/|: ", name)[-1])
        return decode(data, name, *options)

    monkeypatch.setattr(checks, "decode", recorded)
    return calls


# Skipped images


def test_good_files_are_kept_with_their_size_and_bad_files_are_named(tmp_path: Path) -> None:
    # Good and bad files alternate in name order, so that an index off by one is detected.
    write(tmp_path, {f"{i:02}-{name}": data for i, (name, data) in enumerate(GOOD.items())})
    write(tmp_path, {f"{3 * i:02}-{name}": data for i, (name, data) in enumerate(BAD.items())})
    result = scan(open_encoded(tmp_path), max_bad=0.5)
    assert names(result.source) == sorted(f"{tmp_path}/{i:02}-{name}" for i, name in enumerate(GOOD))
    assert result.source.sizes is not None
    assert result.source.sizes.dtype == np.int64
    sizes = {name: decoded_size(data) for name, data in GOOD.items()}
    for name, size in zip(names(result.source), result.source.sizes.tolist(), strict=True):
        assert tuple(size) == sizes[Path(name).name[3:]], name
    assert sizes["long.jpg"] == (2, 20_000)
    assert sizes["one.jpg"] == (1, 1)
    assert sizes["exif6.jpg"] == sizes["rgb.jpg"][::-1], "the size after EXIF rotation"

    expected = sorted(f"{tmp_path}/{3 * i:02}-{name}" for i, name in enumerate(BAD))
    assert len(result.bad) == len(expected)
    for line, name in zip(result.bad, expected, strict=True):
        size = len(BAD[Path(name).name[3:]])
        assert line.startswith(f"{name}: got {size} bytes that do not decode as an image ("), line
        assert line.endswith(")"), "the fix is given once, not per file"
        assert "\n" not in line


def test_shard_members_are_kept_or_skipped_like_files(tmp_path: Path) -> None:
    members = [*GOOD.items(), *BAD.items()]
    members = [members[i] for i in np.random.default_rng(0).permutation(len(members))]
    cut = len(members) // 2
    write_tar(tmp_path / "0.tar", [(f"x/{name}", data) for name, data in members[:cut]])
    write_tar(tmp_path / "1.tar", [(f"y/{name}", data) for name, data in members[cut:]])
    result = scan(open_encoded(tmp_path / "{0..1}.tar"), max_bad=0.5)
    kept = [Path(name).name for name in names(result.source)]
    assert kept == [name for name, _ in members if name in GOOD]
    assert result.source.sizes is not None
    assert [tuple(size) for size in result.source.sizes.tolist()] == [decoded_size(GOOD[name]) for name in kept]
    assert [result.source.read(i).tobytes() for i in range(len(kept))] == [GOOD[name] for name in kept]
    lines = [f"{tmp_path}/{i // cut}.tar: {'xy'[i // cut]}/{name}: got " for i, (name, _) in enumerate(members)]
    expected = [line for line, (name, _) in zip(lines, members, strict=True) if name in BAD]
    assert len(result.bad) == len(expected)
    assert all(line.startswith(start) for line, start in zip(result.bad, expected, strict=True))


def test_classes_and_labels_are_unchanged(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 9)
    write(folder, {"b/0.jpg": b"", "b/9.jpg": b"", "ab/only.jpg": b"a class with no good image keeps its number"})
    source = open_encoded(folder)
    result = scan(source, max_bad=0.5)
    assert result.source.classes == source.classes == ["a", "ab", "b", "c"]
    assert result.source.labels.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert result.source.has_labels
    assert source.sizes is None, "the scanned source is not modified"
    assert len(source) == 12

    members = [("1.jpg", jpeg(photo(9, 9))), ("1.cls", b"5"), ("2.jpg", b""), ("2.cls", b"3")]
    result = scan(open_encoded(write_tar(tmp_path / "s.tar", members)), max_bad=0.5)
    assert list(result.source.classes) == ["3", "5"]
    assert result.source.labels.tolist() == [5]


def test_subset_selects_images_and_sizes(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 9)
    shard = write_tar(tmp_path / "s.tar", [(f"{n}/x.jpg", jpeg(photo(9, 10 + n))) for n in range(4)])
    for source in (open_encoded(folder), open_encoded(shard)):
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
    # bad of 50 images. 0.58 * 50 is 28.999999999999996: comparing with this product would reject 29 bad images.
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
def test_more_than_max_bad_is_one_line_error(tmp_path: Path, bad: int, max_bad: float, passes: bool) -> None:
    small = jpeg(photo(6, 6))
    write(tmp_path, {f"{n:02}.jpg": b"x" if n < bad else small for n in range(50)})
    if passes:
        result = scan(open_encoded(tmp_path), max_bad=max_bad)
        assert (len(result.source), len(result.bad)) == (50 - bad, bad)
        return
    with pytest.raises(BadImages, match=f"^max_bad: got {bad} of 50 images that cannot be used, expected ") as caught:
        scan(open_encoded(tmp_path), max_bad=max_bad)
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
        scan(open_encoded(photo_folder(tmp_path, 3)), max_bad=max_bad)


# The cache


def test_only_new_and_changed_files_are_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    folder, run = photo_folder(tmp_path / "photos", 12), tmp_path / "run"
    write(folder, {"b/bad.jpg": b"bad", "c/gone.jpg": b"bad"})
    first = scan(open_encoded(folder), max_bad=0.5, cache=run)
    assert len(decoded) == first.checked == 14
    decoded.clear()

    second = scan(open_encoded(folder), max_bad=0.5, cache=run)
    assert decoded == []
    assert second.checked == 0
    assert_same(first, second)

    write(folder, {"a/new.jpg": jpeg(photo(30, 41)), "a/000.jpg": jpeg(photo(50, 61))})
    write(folder, {"b/bad.jpg": jpeg(photo(8, 9)), "b/001.jpg": b"bad now", "c/bad.jpg": b"new and bad"})
    (folder / "c" / "gone.jpg").unlink()
    (folder / "c" / "002.jpg").unlink()
    stat = os.stat(folder / "a" / "003.jpg")
    os.utime(folder / "a" / "003.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    third = scan(open_encoded(folder), max_bad=0.5, cache=run)
    assert sorted(decoded) == ["000.jpg", "001.jpg", "003.jpg", "bad.jpg", "bad.jpg", "new.jpg"]
    assert_same(third, scan(open_encoded(folder), max_bad=0.5))
    assert [Path(line.partition(":")[0]).name for line in third.bad] == ["001.jpg", "bad.jpg"]
    decoded.clear()
    assert_same(third, scan(open_encoded(folder), max_bad=0.5, cache=run))
    assert decoded == []


def assert_same(one: Scan, other: Scan) -> None:
    assert names(one.source) == names(other.source)
    assert one.source.labels.tolist() == other.source.labels.tolist()
    assert one.source.sizes is not None
    assert other.source.sizes is not None
    assert one.source.sizes.tolist() == other.source.sizes.tolist()
    assert one.bad == other.bad


def test_only_changed_shards_are_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    members = [[(f"{s}{n}.jpg", jpeg(photo(9 + s, 9 + n)) if n else b"bad") for n in range(4)] for s in range(3)]
    for s in range(2):
        write_tar(tmp_path / f"{s}.tar", members[s])
    first = scan(open_encoded(tmp_path / "*.tar"), max_bad=0.5, cache=tmp_path)
    assert len(decoded) == 8
    decoded.clear()
    assert_same(first, scan(open_encoded(tmp_path / "*.tar"), max_bad=0.5, cache=tmp_path))
    assert decoded == []
    write_tar(tmp_path / "2.tar", members[2])  # new
    write_tar(tmp_path / "1.tar", members[1][::-1])
    third = scan(open_encoded(tmp_path / "*.tar"), max_bad=0.5, cache=tmp_path)
    assert sorted(decoded) == sorted(name for s in (1, 2) for name, _ in members[s])
    assert_same(third, scan(open_encoded(tmp_path / "*.tar"), max_bad=0.5))


def test_one_cache_serves_several_sources_from_any_directory(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "val"):
        photo_folder(tmp_path / name, 6)
    for name in ("train", "val"):
        scan(open_encoded(tmp_path / name), cache=tmp_path)
    assert len(decoded) == 12
    decoded.clear()
    monkeypatch.chdir(tmp_path / "train")
    assert len(scan(open_encoded("../val"), cache="..").source) == 6
    assert len(scan(open_encoded("."), cache="..").source) == 6
    assert decoded == [], "the cache uses absolute paths"


def test_invalid_cache_is_replaced(tmp_path: Path, decoded: list[str]) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    write(folder, {"a/bad.jpg": b"bad"})
    file = tmp_path / CACHE_FILE
    first = scan(open_encoded(folder), max_bad=0.5, cache=tmp_path)
    whole = file.read_bytes()
    with np.load(file) as saved:
        parts = dict(saved)
    damaged = bytearray(whole)
    damaged[whole.index(parts["entries"].tobytes()) + 5] ^= 1
    others: dict[str, bytes | dict[str, Any]] = {
        "empty": b"",
        "text": b"name,height,width\n",
        "flipped bit": bytes(damaged),
        "foreign arrays": {"images": np.zeros(3)},
        "other decoder versions": parts | {"made_by": np.array("fastsimclr scan 1, torchvision 0.1, Pillow 1.0")},
        "unsorted": parts | {"entries": parts["entries"][::-1]},
        "missing reasons": parts | {"faults": np.frombuffer(b"{}", np.uint8)},
        "reasons without entries": parts | {"entries": parts["entries"][:0]},
        "pickle": {"made_by": np.array([{}], dtype=object), "entries": np.zeros(3)},
    }
    for length in range(0, len(whole), 97):
        others[f"truncated to {length}"] = whole[:length]
    for case, content in others.items():
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.savez(file, **content)
        decoded.clear()
        assert_same(first, scan(open_encoded(folder), max_bad=0.5, cache=tmp_path))
        assert len(decoded) == 7, case
        decoded.clear()
        assert_same(first, scan(open_encoded(folder), max_bad=0.5, cache=tmp_path))
        assert decoded == [], f"{case}: the cache was not replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == [CACHE_FILE, "photos"], "no temporary file remains"


def test_unreadable_files_are_bad_but_not_cached(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    (folder / "a" / "link.jpg").symlink_to(tmp_path / "later.jpg")
    source = open_encoded(folder)
    gone = folder / "c" / "002.jpg"
    data, stat = gone.read_bytes(), os.stat(gone)
    gone.unlink()
    shard = write_tar(tmp_path / "s.tar", [(f"{n}.jpg", jpeg(photo(9, 9))) for n in range(4)])
    shrunk = open_encoded(shard)
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
    checked = scan(shrunk, max_bad=0.9, cache=tmp_path).checked
    assert checked == len(result.bad)


def test_out_of_memory_while_decoding_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        cause = (
            MemoryError() if name.endswith("000.jpg") else RuntimeError("DefaultCPUAllocator: can't allocate memory")
        )
        raise UserError(f"{name}: got {len(data)} bytes that do not decode") from cause

    folder = photo_folder(tmp_path / "photos", 6)
    with monkeypatch.context() as patch:
        patch.setattr(checks, "decode", fails)
        with pytest.raises(BadImages, match="expected at least one that can"):
            scan(open_encoded(folder), max_bad=1, cache=tmp_path)
    assert scan(open_encoded(folder), max_bad=0, cache=tmp_path).checked == 6


def test_cache_that_cannot_be_written_is_reported_before_decoding(tmp_path: Path, decoded: list[str]) -> None:
    write(tmp_path, {"file": b""})
    with pytest.raises(UserError, match=rf"^{tmp_path}/file/{CACHE_FILE}: cannot be written \(.*expected a folder"):
        scan(open_encoded(photo_folder(tmp_path / "photos", 6)), cache=tmp_path / "file")
    assert decoded == []


def test_file_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate((b"\xff.jpg", b"\xfe.jpg", "ü.jpg".encode(), b"new\nline.jpg")):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(
            jpeg(photo(9, 9 + number)) if number else b"bad"
        )
    first = scan(open_encoded(folder), max_bad=0.5, cache=tmp_path)
    assert len(first.bad) == 1
    assert first.bad[0].startswith(f"{folder}/\udcff.jpg: ")
    second = scan(open_encoded(folder), max_bad=0.5, cache=tmp_path)
    assert second.checked == 0
    assert_same(first, second)


# Long scans and ranks


def test_stopped_scan_keeps_its_results(tmp_path: Path, decoded: list[str]) -> None:
    folder = photo_folder(tmp_path / "photos", 40)
    with pytest.raises(ScanStopped):
        scan(open_encoded(folder), cache=tmp_path, stop=lambda: len(decoded) >= 15)
    done = len(decoded)
    assert 15 <= done < 15 + len(os.sched_getaffinity(0)), "each thread may decode one more image"
    decoded.clear()
    assert len(scan(open_encoded(folder), cache=tmp_path).source) == 40
    assert len(decoded) == 40 - done


def test_interrupted_scan_keeps_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photo_folder(tmp_path / "photos", 30)
    monkeypatch.setattr(checks, "_ROUND_S", 0.02)

    def slow(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        time.sleep(0.005)
        if name.endswith("c/029.jpg"):
            raise MemoryError
        return decode(data, name, *options)

    monkeypatch.setattr(checks, "decode", slow)
    with pytest.raises(MemoryError):
        scan(open_encoded(folder), cache=tmp_path)
    monkeypatch.setattr(checks, "decode", decode)
    assert 1 <= scan(open_encoded(folder), cache=tmp_path).checked < 30


def test_long_scan_saves_its_results_periodically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photo_folder(tmp_path / "photos", 30)
    monkeypatch.setattr(checks, "_ROUND_S", 0.02)
    monkeypatch.setattr(scan_module, "_SAVE_EVERY_S", 0.0)
    entries = []

    def decode_and_read_cache(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        time.sleep(0.005)
        with np.load(tmp_path / CACHE_FILE) as saved:  # written atomically: readable at any time
            entries.append(len(saved["entries"]))
        return decode(data, name, *options)

    monkeypatch.setattr(checks, "decode", decode_and_read_cache)
    scan(open_encoded(folder), cache=tmp_path)
    assert entries[0] == 0
    assert 0 < entries[-1] < 30
    assert len(set(entries)) > 3


@pytest.mark.parametrize(("terminal", "slow"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_for_slow_scans_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, slow: bool
) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    monkeypatch.setattr(checks, "_PROGRESS_AFTER_S", 0.0 if slow else 60.0)
    read_end, write_end = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(write_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with open(read_end, "rb", buffering=0) as reader, open(write_end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        scan(open_encoded(folder))
        stderr.write("end")
        stderr.flush()
        written = b""
        while not written.endswith(b"end"):
            written += reader.read(1000)
    assert (b"6/6" in written) == (terminal and slow)
    assert (written == b"end") == (not (terminal and slow))


def scan_on_a_rank(rank: int, folder: str, run: str) -> dict[str, Any]:
    """Scan on one of two ranks; return the results and the images that this rank decoded."""
    decoded: list[str] = []

    def recorded(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        decoded.append(name)
        return decode(data, name, *options)

    checks.__dict__["decode"] = recorded  # this process runs only this test
    world = World(rank, 2, torch.device("cpu"))
    cache = f"{run}/{rank}"  # a separate folder per rank, as on two nodes
    out: dict[str, Any] = {}
    for name in ("first", "second"):
        decoded.clear()
        out[name] = scan(open_encoded(folder), max_bad=0.5, cache=cache, world=world), list(decoded)
    with pytest.raises(BadImages) as refused:
        scan(open_encoded(folder), max_bad=0.01, cache=cache, world=world)
    out["refused"] = str(refused.value)
    with pytest.raises(UserError) as refused_folder:
        scan(open_encoded(folder), max_bad=0.5, cache=f"{run}/file", world=world)
    out["no folder"] = str(refused_folder.value)
    with pytest.raises(ScanStopped):  # stopping one rank stops all
        scan(open_encoded(folder), max_bad=0.5, world=world, stop=lambda: rank == 1)
    source = open_encoded(folder)
    with pytest.raises(UserError) as different:
        scan(source if rank == 0 else source.subset(np.arange(len(source) - 1)), max_bad=0.5, world=world)
    out["different"] = str(different.value)
    single = source.subset(np.array([0]))  # fewer images than ranks
    out["single"] = scan(single, world=world)
    return out


def fail_on_rank_1(rank: int, folder: str) -> None:
    def fail(data: NDArray[np.uint8], name: str, pixels: PixelFormat) -> torch.Tensor:
        raise RuntimeError(f"an internal error on rank {rank}")

    if rank == 1:
        checks.__dict__["decode"] = fail
    scan(open_encoded(folder), world=World(rank, 2, torch.device("cpu")))


@pytest.mark.slow
def test_ranks_share_the_work_and_the_results(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", {f"{n:02}{name}": data for n, (name, data) in enumerate((GOOD | BAD).items())})
    write(tmp_path / "run", {"file": b""})
    expected = scan(open_encoded(folder), max_bad=0.5)
    results = run_ranks(2, scan_on_a_rank, str(folder), str(tmp_path / "run"))
    for result in results:
        assert_same(expected, result["first"][0])
        assert_same(expected, result["second"][0])
        assert result["first"][0].checked == len(GOOD) + len(BAD)
        assert result["second"][1] == [], "all ranks use the cache of rank 0"
        assert len(result["single"].source) == 1
    halves = [result["first"][1] for result in results]
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    assert sorted(halves[0] + halves[1]) == names(open_encoded(folder))
    assert not (tmp_path / "run" / "1").exists(), "only rank 0 writes"
    for case, words in {
        "refused": f"max_bad: got {len(BAD)} of {len(GOOD) + len(BAD)} images",
        "no folder": "cannot be written",
        "different": f"data: got {len(GOOD) + len(BAD) - 1} images on rank 1 and {len(GOOD) + len(BAD)} on rank 0",
    }.items():
        assert results[0][case] == results[1][case]
        assert words in results[0][case]


@pytest.mark.slow
def test_internal_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="an internal error on rank 1"):
        run_ranks(2, fail_on_rank_1, str(photo_folder(tmp_path, 9)), timeout_seconds=60)


def test_cache_is_compact(tmp_path: Path) -> None:
    scan(open_encoded(write(tmp_path / "photos", GOOD | BAD)), max_bad=0.5, cache=tmp_path)
    with np.load(tmp_path / CACHE_FILE) as saved:
        assert saved["entries"].dtype.itemsize == 32
        assert len(saved["entries"]) == len(GOOD) + len(BAD)
        assert len(json.loads(saved["faults"].tobytes())) == len(BAD)
