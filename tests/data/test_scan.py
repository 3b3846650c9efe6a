"""The full check: which images are bad and why, what is read again, checks on several ranks, and use of the results."""

import fcntl
import importlib
import json
import os
import pickle
import pty
import re
import shutil
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
from fastsimclr.data.check_results import FOLDER, use_results
from fastsimclr.data.images import decode
from fastsimclr.data.pixels import PixelFormat
from fastsimclr.data.scan import Scan, scan
from fastsimclr.data.sources import Source
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError
from fastsimclr.stopping import Stopped

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


# Bad images


def lines(source: Source, bad: dict[int, str]) -> list[str]:
    return [f"{source.name(index)}: {reason}" for index, reason in bad.items()]


def test_good_files_have_their_size_and_bad_files_a_reason(tmp_path: Path) -> None:
    # Good and bad files alternate in name order, so that an index off by one is detected.
    write(tmp_path, {f"{i:02}-{name}": data for i, (name, data) in enumerate(GOOD.items())})
    write(tmp_path, {f"{3 * i:02}-{name}": data for i, (name, data) in enumerate(BAD.items())})
    source = open_encoded(tmp_path)
    result = scan(source)
    sizes = {name: decoded_size(data) for name, data in GOOD.items()} | dict.fromkeys(BAD, (0, 0))
    assert sizes["long.jpg"] == (2, 20_000)
    assert sizes["one.jpg"] == (1, 1)
    assert sizes["exif6.jpg"] == sizes["rgb.jpg"][::-1], "the size after EXIF rotation"
    for index, name in enumerate(names(source)):
        assert tuple(result.sizes[index]) == sizes[Path(name).name[3:]], name
    assert [Path(source.name(index)).name[3:] for index in result.bad] == list(BAD)
    for index, reason in result.bad.items():
        size = len(BAD[Path(source.name(index)).name[3:]])
        assert reason.startswith(f"got {size} bytes that do not decode as an image ("), reason
        assert reason.endswith(")"), "the fix is given once, not per file"
        assert "\n" not in reason
    assert source.sizes is None
    assert not source.bad, "the source is not modified"


def test_shard_members_are_checked_like_files(tmp_path: Path) -> None:
    members = [*GOOD.items(), *BAD.items()]
    members = [members[i] for i in np.random.default_rng(0).permutation(len(members))]
    cut = len(members) // 2
    write_tar(tmp_path / "0.tar", [(f"x/{name}", data) for name, data in members[:cut]])
    write_tar(tmp_path / "1.tar", [(f"y/{name}", data) for name, data in members[cut:]])
    result = scan(open_encoded(tmp_path / "{0..1}.tar"))
    sizes = [decoded_size(data) if name in GOOD else (0, 0) for name, data in members]
    assert [tuple(size) for size in result.sizes.tolist()] == sizes
    assert list(result.bad) == [i for i, (name, _) in enumerate(members) if name in BAD]


def test_subset_selects_images_sizes_and_bad_ones(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 9)
    write(folder, {"a/003.jpg": b"bad"})
    for source in (open_encoded(folder), open_encoded(write_tar(tmp_path / "s.tar", [*GOOD.items(), *BAD.items()]))):
        result = scan(source)
        source.sizes, source.bad = result.sizes, result.bad
        bad = min(result.bad)
        part = source.subset(np.array([5, bad, 2]))
        assert names(part) == [names(source)[index] for index in (5, bad, 2)]
        assert part.sizes is not None
        assert part.sizes.tolist() == result.sizes[[5, bad, 2]].tolist()
        assert part.bad == {1: result.bad[bad]}
        assert part.read(0).tobytes() == source.read(5).tobytes()


# Results in the cache folder


def test_only_new_and_changed_files_are_read_again(tmp_path: Path, decoded: list[str]) -> None:
    folder, cache = photo_folder(tmp_path / "photos", 12), tmp_path / "cache"
    write(folder, {"b/bad.jpg": b"bad", "c/gone.jpg": b"bad"})
    first = scan(open_encoded(folder), cache=cache)
    assert len(decoded) == first.read == 14
    decoded.clear()

    second = scan(open_encoded(folder), cache=cache)
    assert decoded == []
    assert second.read == 0
    assert_same(first, second)

    write(folder, {"a/new.jpg": jpeg(photo(30, 41)), "a/000.jpg": jpeg(photo(50, 61))})
    write(folder, {"b/bad.jpg": jpeg(photo(8, 9)), "b/001.jpg": b"bad now", "c/bad.jpg": b"new and bad"})
    (folder / "c" / "gone.jpg").unlink()
    (folder / "c" / "002.jpg").unlink()
    touch(folder / "a" / "003.jpg", 1)
    source = open_encoded(folder)
    third = scan(source, cache=cache)
    assert sorted(decoded) == ["000.jpg", "001.jpg", "003.jpg", "bad.jpg", "bad.jpg", "new.jpg"]
    assert_same(third, scan(source))
    assert [Path(source.name(index)).name for index in third.bad] == ["001.jpg", "bad.jpg"]
    decoded.clear()
    assert_same(third, scan(open_encoded(folder), cache=cache))
    assert decoded == []
    assert len(list((cache / FOLDER).iterdir())) == 1, "grown data keeps its file"


def touch(file: Path, ns: int) -> None:
    """Change the modification time by this many nanoseconds."""
    stat = os.stat(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + ns))


def assert_same(one: Scan, other: Scan) -> None:
    assert one.sizes.tolist() == other.sizes.tolist()
    assert one.bad == other.bad


def test_only_changed_shards_are_read_again(tmp_path: Path, decoded: list[str]) -> None:
    members = [[(f"{s}{n}.jpg", jpeg(photo(9 + s, 9 + n)) if n else b"bad") for n in range(4)] for s in range(3)]
    for s in range(2):
        write_tar(tmp_path / f"{s}.tar", members[s])
    first = scan(open_encoded(tmp_path / "*.tar"), cache=tmp_path)
    assert len(decoded) == 8
    decoded.clear()
    assert_same(first, scan(open_encoded(tmp_path / "*.tar"), cache=tmp_path))
    assert decoded == []
    write_tar(tmp_path / "2.tar", members[2])  # new
    write_tar(tmp_path / "1.tar", members[1][::-1])
    third = scan(open_encoded(tmp_path / "*.tar"), cache=tmp_path)
    assert sorted(decoded) == sorted(name for s in (1, 2) for name, _ in members[s])
    assert_same(third, scan(open_encoded(tmp_path / "*.tar")))


def test_copies_share_results_and_other_data_of_the_same_names_does_not(tmp_path: Path, decoded: list[str]) -> None:
    first = photo_folder(tmp_path / "first", 6)
    write(first, {"a/bad.jpg": b"bad"})
    result = scan(open_encoded(first), cache=tmp_path / "cache")
    decoded.clear()
    copy = Path(shutil.copytree(first, tmp_path / "node" / "local"))  # with the modification times
    assert_same(result, scan(open_encoded(copy), cache=tmp_path / "cache"))
    assert decoded == []
    for file in copy.rglob("*.jpg"):
        touch(file, 1)
    scan(open_encoded(copy), cache=tmp_path / "cache")
    assert len(decoded) == 7
    decoded.clear()
    scan(open_encoded(first), cache=tmp_path / "cache")
    assert decoded == [], "each has a file of its own"


def test_a_part_of_the_data_uses_and_keeps_the_results_of_the_whole(tmp_path: Path, decoded: list[str]) -> None:
    source = open_encoded(photo_folder(tmp_path / "photos", 12))
    scan(source.subset(np.arange(3)), cache=tmp_path)
    assert len(decoded) == 3
    for part, read in ((source, 9), (source.subset(np.arange(5)), 0), (source, 0)):
        decoded.clear()
        scan(part, cache=tmp_path)
        assert len(decoded) == read


def test_invalid_results_are_replaced(tmp_path: Path, decoded: list[str]) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    write(folder, {"a/bad.jpg": b"bad"})
    first = scan(open_encoded(folder), cache=tmp_path)
    assert first.file is not None
    file = first.file
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
        "other decoder versions": parts | {"made_by": np.array("fastsimclr check 1, torchvision 0.1, Pillow 1.0")},
        "unsorted": parts | {"entries": parts["entries"][::-1]},
        "missing reasons": parts | {"reasons": np.frombuffer(b"{}", np.uint8)},
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
        source = open_encoded(folder)
        use_results(source, tmp_path, SINGLE_PROCESS)
        assert source.sizes is None, case
        decoded.clear()
        assert_same(first, scan(source, cache=tmp_path))
        assert len(decoded) == 7, case
        decoded.clear()
        assert_same(first, scan(source, cache=tmp_path))
        assert decoded == [], f"{case}: the file was not replaced"
    assert list((tmp_path / FOLDER).iterdir()) == [file], "no temporary file remains"


def test_unreadable_files_are_bad_but_not_kept(tmp_path: Path) -> None:
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

    result = scan(source, cache=tmp_path)
    assert lines(source, result.bad) == [
        f"{folder}/a/link.jpg: cannot be read (No such file or directory)",
        f"{gone}: cannot be read (No such file or directory)",
    ]
    assert scan(source, cache=tmp_path).read == 2
    write(tmp_path, {"later.jpg": data, "photos/c/002.jpg": data})
    os.utime(gone, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = scan(source, cache=tmp_path)
    assert (result.read, result.bad) == (2, {})

    result = scan(shrunk, cache=tmp_path)
    assert lines(shrunk, result.bad)[-1].startswith(f"{shard}: 3.jpg: got 0 of ")
    assert scan(shrunk, cache=tmp_path).read == len(result.bad)


def test_out_of_memory_while_decoding_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        cause = (
            MemoryError() if name.endswith("000.jpg") else RuntimeError("DefaultCPUAllocator: can't allocate memory")
        )
        raise UserError(f"{name}: got {len(data)} bytes that do not decode") from cause

    folder = photo_folder(tmp_path / "photos", 6)
    with monkeypatch.context() as patch:
        patch.setattr(checks, "decode", fails)
        assert len(scan(open_encoded(folder), cache=tmp_path).bad) == 6
    result = scan(open_encoded(folder), cache=tmp_path)
    assert (result.read, result.bad) == (6, {})


def test_a_cache_folder_that_cannot_be_written_does_not_stop_the_check(tmp_path: Path) -> None:
    write(tmp_path, {"file": b""})
    folder = photo_folder(tmp_path / "photos", 6)
    result = scan(open_encoded(folder), cache=tmp_path / "file")
    assert (result.read, result.file) == (6, None)
    use_results(open_encoded(folder), tmp_path / "file", SINGLE_PROCESS)


def test_file_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate((b"\xff.jpg", b"\xfe.jpg", "ü.jpg".encode(), b"new\nline.jpg")):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(
            jpeg(photo(9, 9 + number)) if number else b"bad"
        )
    source = open_encoded(folder)
    first = scan(source, cache=tmp_path)
    assert [line.partition(": ")[0] for line in lines(source, first.bad)] == [f"{folder}/\udcff.jpg"]
    second = scan(open_encoded(folder), cache=tmp_path)
    assert second.read == 0
    assert_same(first, second)


# Use by a run


def test_a_run_uses_the_results_of_unchanged_bad_images(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 6)
    bad = ("a/bad.jpg", "b/changed.jpg", "c/gone.jpg", "c/touched.jpg")
    write(folder, dict.fromkeys(bad, b"bad"))
    source = open_encoded(folder)
    use_results(source, tmp_path, SINGLE_PROCESS)
    assert (source.sizes, dict(source.bad)) == (None, {}), "there are none"
    result = scan(source, cache=tmp_path)
    write(folder, {"b/changed.jpg": jpeg(photo(9, 9)), "b/new.jpg": jpeg(photo(9, 9))})
    touch(folder / "c/touched.jpg", 1)
    (folder / "a/000.jpg").unlink()
    (folder / "c/gone.jpg").unlink()
    source = open_encoded(folder)
    use_results(source, tmp_path, SINGLE_PROCESS)
    assert {source.key(index): reason for index, reason in source.bad.items()} == {"a/bad.jpg": result.bad[2]}
    assert source.sizes is not None
    known = {name: tuple(size) for name, size in zip(names(open_encoded(folder)), source.sizes.tolist(), strict=True)}
    assert known[f"{folder}/b/new.jpg"] == (0, 0)
    good = Path(f"{folder}/a/003.jpg")
    assert known[str(good)] == decoded_size(good.read_bytes())
    assert pickle.loads(pickle.dumps(source)).sizes is None, "workers do without"


def test_images_of_another_format_are_checked_for_it(tmp_path: Path, decoded: list[str]) -> None:
    source = open_encoded(photo_folder(tmp_path / "photos", 3))
    scan(source, cache=tmp_path)
    source.pixels = PixelFormat(1)
    use_results(source, tmp_path, SINGLE_PROCESS)
    assert source.sizes is None
    scan(source, cache=tmp_path)
    assert len(decoded) == 6
    source.max_pixels = 10  # fewer than an image has
    assert len(scan(source, cache=tmp_path).bad) == 3


# Long checks and ranks


def test_stopped_check_keeps_its_results(tmp_path: Path, decoded: list[str]) -> None:
    folder = photo_folder(tmp_path / "photos", 40)
    with pytest.raises(Stopped):
        scan(open_encoded(folder), cache=tmp_path, stop=lambda: len(decoded) >= 5)
    done = len(decoded)
    assert 5 <= done < 5 + len(os.sched_getaffinity(0)), "each thread may decode one more image"
    source = open_encoded(folder)
    use_results(source, tmp_path, SINGLE_PROCESS)
    assert source.sizes is not None
    assert np.count_nonzero(source.sizes[:, 0]) == done
    decoded.clear()
    assert scan(open_encoded(folder), cache=tmp_path).read == 40 - done
    assert len(decoded) == 40 - done


def test_interrupted_check_keeps_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert 1 <= scan(open_encoded(folder), cache=tmp_path).read < 30


def test_long_check_saves_its_results_periodically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photo_folder(tmp_path / "photos", 30)
    monkeypatch.setattr(checks, "_ROUND_S", 0.02)
    monkeypatch.setattr(scan_module, "_SAVE_EVERY_S", 0.0)
    entries = []

    def decode_and_read_cache(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        time.sleep(0.005)
        for file in (tmp_path / FOLDER).glob("*.npz"):
            with np.load(file) as saved:  # written atomically: readable at any time
                entries.append(np.count_nonzero(saved["entries"]["height"] > 0))
        return decode(data, name, *options)

    monkeypatch.setattr(checks, "decode", decode_and_read_cache)
    scan(open_encoded(folder), cache=tmp_path)
    assert 0 < entries[-1] < 30
    assert len(set(entries)) > 2


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
    """Check on one of two ranks; return the results and the images that this rank decoded."""
    decoded: list[str] = []

    def recorded(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        decoded.append(name)
        return decode(data, name, *options)

    checks.__dict__["decode"] = recorded  # this process runs only this test
    world = World(rank, 2, torch.device("cpu"))
    cache = Path(run) / str(rank)  # a separate folder per rank, as on two nodes
    out: dict[str, Any] = {}
    source = open_encoded(folder)
    for name in ("first", "second"):
        decoded.clear()
        out[name] = scan(source, cache=cache, world=world), list(decoded)
    use_results(source, cache, world)
    out["used"] = source.bad
    with pytest.raises(Stopped):  # stopping one rank stops all
        scan(source, world=world, stop=lambda: rank == 1)
    with pytest.raises(UserError) as different:
        scan(source if rank == 0 else source.subset(np.arange(len(source) - 1)), world=world)
    out["different"] = str(different.value)
    out["single"] = scan(source.subset(np.array([0])), world=world)  # fewer images than ranks
    return out


def fail_on_rank_1(rank: int, folder: str) -> None:
    def fail(data: NDArray[np.uint8], name: str, *options: Any) -> torch.Tensor:
        raise RuntimeError(f"an internal error on rank {rank}")

    if rank == 1:
        checks.__dict__["decode"] = fail
    scan(open_encoded(folder), world=World(rank, 2, torch.device("cpu")))


@pytest.mark.slow
def test_ranks_share_the_work_and_the_results(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", {f"{n:02}{name}": data for n, (name, data) in enumerate((GOOD | BAD).items())})
    source = open_encoded(folder)
    expected = scan(source)
    results = run_ranks(2, scan_on_a_rank, str(folder), str(tmp_path / "run"))
    for result in results:
        assert_same(expected, result["first"][0])
        assert_same(expected, result["second"][0])
        assert result["first"][0].read == len(GOOD) + len(BAD)
        assert result["second"][1] == [], "all ranks use the cache of rank 0"
        assert result["used"] == expected.bad
        assert len(result["single"].sizes) == 1
    halves = [result["first"][1] for result in results]
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    assert sorted(halves[0] + halves[1]) == names(source)
    assert not (tmp_path / "run" / "1").exists(), "only rank 0 writes"
    assert results[0]["different"] == results[1]["different"]
    assert f"got {len(source) - 1} images on rank 1 and {len(source)} on rank 0" in results[0]["different"]


@pytest.mark.slow
def test_internal_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="an internal error on rank 1"):
        run_ranks(2, fail_on_rank_1, str(photo_folder(tmp_path, 9)))


def test_results_are_compact(tmp_path: Path) -> None:
    file = scan(open_encoded(write(tmp_path / "photos", GOOD | BAD)), cache=tmp_path).file
    assert file is not None
    with np.load(file) as saved:
        assert saved["entries"].dtype.itemsize == 32
        assert len(saved["entries"]) == len(GOOD) + len(BAD)
        assert len(json.loads(saved["reasons"].tobytes())) == len(BAD)
