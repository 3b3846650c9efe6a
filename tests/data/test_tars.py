"""Tar shards: their members by raw headers, layouts, labels, patterns, the index, and errors for damaged ones."""

import bz2
import gzip
import io
import lzma
import os
import random
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from pictures import jpeg, names, open_encoded, photo, write, write_tar

from fastsimclr.data import open_source
from fastsimclr.data import tars as tars_module
from fastsimclr.data.sources import TarSource
from fastsimclr.data.tars import expand, open_tars
from fastsimclr.errors import UserError

SMALL = jpeg(photo(8, 8))


def error_of(path: Path | str) -> str:
    """Return the one-line error that open_source raises for `path`."""
    with pytest.raises(UserError) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def members_of(source: TarSource) -> list[str]:
    return list(source.members)


def open_members(path: Path, members: Sequence[str | tuple[str, bytes]]) -> TarSource:
    """Open a tar of the members, whose content is their name unless given."""
    write_tar(path, [(m, m.encode("utf-8", "surrogateescape")) if isinstance(m, str) else m for m in members])
    source = open_source(str(path))
    assert isinstance(source, TarSource)
    return source


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
        [
            ("0001.cls", b" 7\n"),
            ("0001.jpg", b"a"),
            ("v1.2/0001.jpg", b"c"),
            ("v1.2/0001.cls", b"11"),
            ("v1.2/0001.json", b"{}"),
        ],
    )
    source = open_encoded(shard)
    assert source.labels.tolist() == [7, 11]
    assert source.classes == ["7", "11"], "sorted as numbers"
    assert source.read(1).tobytes() == b"c"


def test_labels_from_folders_inside_the_shard(tmp_path: Path) -> None:
    members = [("./train/rose/1.jpg", b"1"), ("train/daisy/2.jpg", b"2"), ("train/rose/3.jpg", b"3")]
    source = open_encoded(write_tar(tmp_path / "s.tar", members))
    assert source.classes == ["daisy", "rose"]
    assert source.labels.tolist() == [1, 0, 1]


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


# Formats


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("name", FORMATS)
def test_long_and_foreign_names_in_all_formats(tmp_path: Path, name: str) -> None:
    folder = "d" * 99
    members = [f"{folder}/{'e' * 90}.jpg", "../../up.jpg", "new\nline.jpg", "/root.jpg", "\udcff.jpg", "ü.jpg"]
    if name != "ustar":
        members += [f"{'ü' * 200}/{'f' * 600}.jpg", "100" * 33 + "x.jpg"]
    with tarfile.open(tmp_path / "s.tar", "w", format=FORMATS[name], pax_headers={"comment": "shared by all"}) as tar:
        for n, member in enumerate(members):
            info = tarfile.TarInfo(member)
            info.size = n
            tar.addfile(info, io.BytesIO(bytes([n]) * n))
    source = open_encoded(tmp_path / "s.tar")
    assert isinstance(source, TarSource)
    assert members_of(source) == members
    assert [source.read(n).tolist() for n in range(len(members))] == [[n] * n for n in range(len(members))]
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert source.extents[:, 1].tolist() == [info.offset_data for info in tar]


def test_sizes_in_base_256_and_by_pax(tmp_path: Path) -> None:
    def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
        block = bytearray(name.ljust(124, b"\0") + size + b" " * 20 + kind.rjust(1)).ljust(512, b"\0")
        block[148:156] = b" " * 8
        block[156:157] = kind
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    data = b"12345".ljust(512, b"\0")
    octal = lambda size: b"%011o\0" % size  # noqa: E731
    record = b"10 size=5\n"
    blocks = header(b"a.jpg", b"\x80" + (5).to_bytes(11, "big")) + data
    blocks += header(b"x", octal(len(record)), b"x") + record.ljust(512, b"\0") + header(b"b.jpg", octal(0)) + data
    blocks += header(b"c.jpg", b"          5 ") + data
    write(tmp_path, {"s.tar": blocks + bytes(1024), "negative.tar": header(b"a.jpg", b"\xff" * 12) + bytes(1024)})
    source = open_encoded(tmp_path / "s.tar")
    assert [source.read(n).tobytes() for n in range(3)] == [b"12345"] * 3
    assert "(the header at byte 0 has no valid size)" in error_of(tmp_path / "negative.tar")


def test_links_lead_to_members_of_the_shard(tmp_path: Path) -> None:
    links = [
        ("hard.jpg", tarfile.LNKTYPE, "a/1.jpg"),
        ("soft.jpg", tarfile.SYMTYPE, "./a/1.jpg"),
        ("a/same_folder.jpg", tarfile.SYMTYPE, "2.jpg"),
        ("a/two_steps.jpg", tarfile.SYMTYPE, "../soft.jpg"),
        ("a/hard.cls", tarfile.LNKTYPE, "a/1.cls"),
        ("outside.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("round.jpg", tarfile.SYMTYPE, "round.jpg"),
    ]
    path = write_tar(tmp_path / "s.tar", [("a/1.jpg", b"1"), ("a/1.cls", b"4")])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        for name in ("a/2.jpg", "a/hard.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"2"))
    source = open_encoded(path)
    assert isinstance(source, TarSource)
    read = {name: source.read(n).tobytes() for n, name in enumerate(source.members)}
    assert read == {
        "a/1.jpg": b"1",
        "hard.jpg": b"1",
        "soft.jpg": b"1",
        "a/same_folder.jpg": b"2",
        "a/two_steps.jpg": b"1",
        "a/2.jpg": b"2",
        "a/hard.jpg": b"2",
    }
    assert source.labels[members_of(source).index("a/hard.jpg")] == 4
    assert source.notes[0] == f"links to no file of their shard passed over: 2 (first: {path}: outside.jpg)"


def test_sparse_files_are_passed_over(tmp_path: Path) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        for n in range(40):  # more parts than a header has room for
            file.seek(n << 17)
            file.write(b"x")
    write(tmp_path, {"1.jpg": b"1"})
    for form in ("gnu", "posix"):
        subprocess.run(
            ["tar", "-C", tmp_path, f"--format={form}", "--sparse", "-cf", f"{tmp_path}/s.tar", "holes.jpg", "1.jpg"],
            check=True,
        )
        source = open_encoded(tmp_path / "s.tar")
        assert (names(source), source.read(0).tobytes()) == ([f"{tmp_path}/s.tar: 1.jpg"], b"1"), form
        assert source.notes == [f"sparse files passed over: 1 (first: {tmp_path}/s.tar: holes.jpg)"]


def test_concatenated_tars_are_read_through(tmp_path: Path) -> None:
    a = write_tar(tmp_path / "a.tar", [("0.jpg", b"a"), ("0.cls", b"0")]).read_bytes()
    b = write_tar(tmp_path / "b.tar", [("0.jpg", b"b"), ("0.cls", b"1")]).read_bytes()
    write(tmp_path, {"s.tar": a + b})
    source = open_encoded(tmp_path / "s.tar")
    assert [source.read(n).tobytes() for n in range(2)] == [b"a", b"b"]
    assert source.labels.tolist() == [0, 1], "a key is one of its own archive"
    write(tmp_path, {"s.tar": a + b[512:]})
    assert f"(neither a header nor the end marker at byte {len(a)})" in error_of(tmp_path / "s.tar")


def test_compressed_and_foreign_files_raise(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", SHARD).read_bytes()
    for command, packed in (("gzip -d", gzip.compress(whole)), ("bzip2 -d", bz2.compress(whole))):
        for name in ("s.tar", "s.tar.gz", "s.tgz"):
            message = error_of(write(tmp_path, {name: packed}) / name)
            assert message.startswith(f"{tmp_path}/{name}: got a compressed file, expected an uncompressed tar")
            assert command in message
    assert "xz -d" in error_of(write(tmp_path, {"s.tar.xz": lzma.compress(whole)}) / "s.tar.xz")
    assert "got a Parquet file" in error_of(write(tmp_path, {"0.parquet": b"PAR1" * 999}) / "0.parquet")
    assert error_of(write(tmp_path, {"page.tar": b"<html>404</html>" * 99}) / "page.tar").startswith(f"{tmp_path}/page")
    os.mkfifo(tmp_path / "pipe.tar")
    assert "got a device or pipe" in error_of(tmp_path / "pipe.tar")


@pytest.mark.parametrize("seed", range(100))
def test_mutated_tars_open_as_they_were_or_raise(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    members = [(f"{'x' * draw.choice((1, 150))}/{n:04}.jpg", SMALL[: draw.randrange(len(SMALL))]) for n in range(12)]
    path = write_tar(tmp_path / "s.tar", members)
    with tarfile.open(path) as tar:
        headers = [info.offset_data - 512 for info in tar]
    data = bytearray(path.read_bytes())
    at = draw.choice(headers) + draw.randrange(500)
    mutation = draw.choice(("flip", "truncate", "insert", "delete", "zero", "fill"))
    if mutation == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif mutation == "truncate":
        del data[at:]
    elif mutation == "insert":
        data[at:at] = draw.randbytes(draw.choice((1, 7, 512)))
    elif mutation == "delete":
        del data[at : at + draw.choice((1, 512))]
    else:
        data[at : at + 12] = (b"\0" if mutation == "zero" else b"\xff") * 12
    path.write_bytes(data)
    try:
        source = open_encoded(path)
    except UserError:
        assert error_of(path).startswith(f"{path}: got a truncated or damaged tar (")
        return
    assert names(source) == [f"{path}: {name}" for name, _ in members], mutation
    assert [source.read(n).tobytes() for n in range(12)] == [content for _, content in members], mutation


# Layouts


def test_members_of_the_current_folder_have_no_class(tmp_path: Path) -> None:
    write(tmp_path / "photos", {"0.jpg": b"0", "1.jpg": b"1"})
    subprocess.run(["tar", "-C", tmp_path / "photos", "-cf", tmp_path / "s.tar", "."], check=True)
    source = open_encoded(tmp_path / "s.tar")
    assert (source.labels.tolist(), list(source.classes), list(source.notes)) == ([-1, -1], [], [])
    source = open_members(tmp_path / "t.tar", ["photos/0.jpg", "photos/1.jpg"])
    assert source.labels.tolist() == [-1, -1], "the one folder that was packed is no class"
    source = open_members(tmp_path / "u.tar", ["./0.jpg", "./b/1.jpg", "./a/2.jpg", "../3.jpg"])
    assert (source.labels.tolist(), source.classes) == ([-1, 1, 0, -1], ["a", "b"])
    assert source.notes == [
        f"images in no folder and so without a label, unlike others: 2 (first: {tmp_path}/u.tar: ./0.jpg)"
    ]


def test_a_missing_cls_is_no_folder_class(tmp_path: Path) -> None:
    source = open_members(tmp_path / "s.tar", ["a/0.jpg", "a/1.jpg", ("a/1.cls", b"rose"), "b/2.jpg"])
    assert (source.labels.tolist(), source.classes) == ([-1, 0, -1], ["rose"])
    assert source.notes == [
        f"images without a label in a .cls or .json, unlike others: 2 (first: {tmp_path}/s.tar: a/0.jpg)"
    ]


def test_labels_of_unlabeled_images(tmp_path: Path) -> None:
    source = open_members(
        tmp_path / "s.tar", ["0.jpg", ("0.cls", b"-1\n"), "1.jpg", ("1.cls", b"2"), "2.jpg", ("2.cls", b"")]
    )
    assert (source.labels.tolist(), source.classes, list(source.notes)) == ([-1, 2, -1], ["2"], [])


def test_labels_from_json(tmp_path: Path) -> None:
    contents = [
        b"3",
        b' {"label": 5, "caption": "x"}',
        b'{"cls": "7"}',
        b'{"caption": "label"}',
        b'{"label": [1]}',
        b"{",
    ]
    members = [m for n, content in enumerate(contents) for m in (f"{n}.jpg", (f"{n}.json", content))]
    source = open_members(tmp_path / "s.tar", [*members, ("0.cls", b"4")])
    assert source.labels.tolist() == [4, 5, 7, -1, -1, -1], "a .cls comes first"
    assert open_members(tmp_path / "t.tar", ["a/0.jpg", ("a/0.json", b'{"url": ""}'), "b/1.jpg"]).classes == ["a", "b"]


def test_classes_are_named_by_a_file_beside_the_shards(tmp_path: Path) -> None:
    write(tmp_path, {"classes.txt": "cat\nHund, groß\nfish\n".encode()})
    source = open_members(tmp_path / "s.tar", ["0.jpg", ("0.cls", b"1"), "1.jpg", ("1.cls", b"0")])
    assert (source.labels.tolist(), source.classes) == ([1, 0], ["cat", "Hund, groß", "fish"])
    write_tar(tmp_path / "t.tar", [("0.jpg", b""), ("0.cls", b"3")])
    assert "got 3 names of classes for labels up to 3" in error_of(tmp_path / "t.tar")
    write_tar(tmp_path / "u.tar", [("0.jpg", b""), ("0.cls", b"\xff")])
    assert error_of(tmp_path / "u.tar").startswith(f"{tmp_path}/u.tar: 0.cls: got a label that is no text")


def test_a_mask_beside_its_image_is_none(tmp_path: Path) -> None:
    members: list[str | tuple[str, bytes]] = [
        "0.jpg",
        "0.seg.png",
        "0.depth.png",
        ("0.cls", b"1"),
        "v1.2/1.left.jpg",
        "v1.2/1.right.jpg",
    ]
    members += [("v1.2/1.cls", b"2"), "img.v2.jpg", ("img.v2.cls", b"3"), "img.v3.jpg", ("img.v3.cls", b"4")]
    source = open_members(tmp_path / "s.tar", members)
    kept = ["0.jpg", "v1.2/1.left.jpg", "v1.2/1.right.jpg", "img.v2.jpg", "img.v3.jpg"]
    assert dict(zip(source.members, source.labels.tolist(), strict=True)) == dict(
        zip(kept, (1, 2, 2, 3, 4), strict=True)
    )
    assert source.notes == [f"masks such as 0.seg.png beside 0.jpg passed over: 2 (first: {tmp_path}/s.tar: 0.seg.png)"]


def test_hidden_members_and_arrays_beside_images_are_passed_over(tmp_path: Path) -> None:
    hidden = ["._0.jpg", "a/._0.jpg", "__MACOSX/0.jpg", "a/.thumbnails/0.jpg", "./.Trash-1000/x.jpg"]
    source = open_members(tmp_path / "s.tar", [*hidden, "./0.jpg", "a../1.jpg", "features.npy"])
    assert members_of(source) == ["./0.jpg", "a../1.jpg"]
    assert source.notes == [
        f"hidden images passed over: 5 (first: {tmp_path}/s.tar: ._0.jpg)",
        f".npy files beside images passed over: 1 (first: {tmp_path}/s.tar: features.npy)",
    ]
    assert len(open_members(tmp_path / "t.tar", ["0.npy", "1.npy"])) == 2


# Patterns


def test_patterns(tmp_path: Path) -> None:
    files = [f"{tmp_path}/{name}.tar" for name in ("a0", "a1", "b0", "b1", "b10", "s[1]", "s1", "{x,y}")]
    write(tmp_path, {os.path.basename(file): b"" for file in files})

    def short(pattern: str) -> list[str]:
        return [os.path.basename(file)[:-4] for file in expand(f"{tmp_path}/{pattern}.tar")]

    assert short("{b,a}{0..1}") == ["b0", "b1", "a0", "a1"]
    assert sorted(short("{a{0..1},b*}")) == ["a0", "a1", "b0", "b1", "b10"]
    assert short("{a0,a?}") == ["a0", "a1"], "each file once"
    assert short("s[1]") == ["s[1]"], "a file of that name wins"
    assert short("{x,y}") == ["{x,y}"]
    assert short("{000..2}") == ["000", "001", "002"], "which need not exist yet"
    bracketed = write(tmp_path / "d[1]", {"0.tar": b""})
    assert expand(f"{bracketed}/*.tar") == [f"{bracketed}/0.tar"]


# The index


def test_index_is_used_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars_module, "MIN_IMAGES", 1)
    shards = [str(write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", b"x"), (f"{n}.cls", b"%d" % n)])) for n in range(3)]
    write_tar(tmp_path / "2.tar", [("\udcff.jpg", b"x"), ("._0.jpg", b"x"), ("\udcff.cls", b"2")])

    def open_and_compare() -> None:
        found = [open_tars(shards, tmp_path / "cache"), open_tars(shards, tmp_path / "none")]
        for source in found:
            assert [source.name(n) for n in range(len(source))] == [found[0].name(n) for n in range(len(found[0]))]
            assert source.extents.tolist() == found[0].extents.tolist()
            assert (source.labels.tolist(), source.classes, source.notes) == (
                found[0].labels.tolist(),
                found[0].classes,
                found[0].notes,
            )

    open_and_compare()
    (index,) = (tmp_path / "cache" / "tars").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tars_module, "read_shards", None)  # would be called
        assert open_tars(shards, tmp_path / "cache").digest() == open_tars(shards, tmp_path / "cache").digest()
    whole = index.read_bytes()
    for damaged in (b"", whole[:100], whole[:-100], whole[:999] + bytes(99) + whole[1098:], b"x" * 999):
        index.write_bytes(damaged)
        open_and_compare()
    write_tar(tmp_path / "1.tar", [("new.jpg", b"x")])
    open_and_compare()
    assert "new.jpg" in open_tars(shards, tmp_path / "cache").name(1)
