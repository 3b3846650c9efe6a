"""Find the members of an uncompressed tar by its headers alone, at 2 µs each: tarfile takes 30.

Formats: v7, ustar, pax and GNU, in any mix, and archives one after another in a file, as `cat a.tar b.tar` writes them.
"""

import posixpath
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

Member = tuple[bytes, int, int]
"""Name, byte offset and size of a file in a tar. The name is as stored: any bytes, of any path."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)  # one marks the end of an archive, and more may pad it
_WINDOW = 1 << 14  # small members lie close together; of large ones no more is read in vain
_MAX_EXTENSION = 1 << 20  # longest extended header: names have at most a few thousand bytes
_MAX_TEXT = 1 << 16
_MAX_LINKS = 40  # from link to link, as in Linux
# Types of members, and of headers that extend the next one: pax records, GNU's long names
_FILES, _LINK, _SYMLINK, _SPARSE = b"0\x007", ord("1"), ord("2"), ord("S")
_NO_DATA = b"123456"  # links, devices, folders and pipes, whatever size their header states
_EXTENSIONS, _SHARED, _LONG_NAME, _LONG_LINK = b"xXgLK", ord("g"), ord("L"), ord("K")


class ReadableFile(Protocol):
    """What a tar is read from. size: of the file in bytes."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, less where the file ends."""


class DamagedTar(Exception):
    """The file is no tar, or an incomplete one. The message says why, and at which byte."""


@dataclass
class Archive:
    """Members of one archive, in their order. Links have the offset and size of the file that they lead to."""

    members: list[Member] = field(default_factory=list)
    texts: dict[bytes, str] = field(default_factory=dict)
    """What the members whose contents were asked for say, by name."""
    dead_links: list[bytes] = field(default_factory=list)
    """Names of links that lead to no file of the archive."""
    sparse: list[bytes] = field(default_factory=list)
    """Names of sparse files, whose bytes do not lie one after another."""


class Window:
    """A file of which the last part that was read is kept."""

    def __init__(self, file: ReadableFile) -> None:
        self.size = file.size
        self._file, self._start, self._data = file, 0, b""

    def read(self, offset: int, size: int) -> bytes:
        at = offset - self._start
        if at >= 0 and len(data := self._data[at : at + size]) == size:
            return data
        self._data, self._start = self._file.read(offset, max(size, _WINDOW)), offset
        return self._data[:size]


def read_archives(
    file: ReadableFile,
    wanted: tuple[bytes, ...] = (),
    read_text: Callable[[bytes, bytes], str | None] = lambda *_: None,
) -> Iterator[Archive]:
    """Yield the archives of a tar file. Raises DamagedTar.

    wanted: endings of the names of members to read. read_text: gets the name and the bytes of one; returns its text.
    """
    window = Window(file)
    offset = 0
    while True:
        archive = Archive()
        offset = _read_archive(window, offset, archive, wanted, read_text)
        yield archive
        while (block := window.read(offset, _BLOCK)) == _ZEROS:
            offset += _BLOCK
        if not block.strip(b"\0"):
            return


def _read_archive(
    window: Window,
    offset: int,
    archive: Archive,
    wanted: tuple[bytes, ...],
    read_text: Callable[[bytes, bytes], str | None],
) -> int:
    """Read the archive at `offset` up to its end marker, and return the offset of that."""
    links: list[tuple[int, bytes, bytes]] = []  # position among the members, name, name of the target
    shared: dict[bytes, bytes] = {}  # pax records of all following members
    extended: dict[bytes, bytes] = {}  # pax records and long names of the next member
    members = archive.members
    while True:
        header = window.read(offset, _BLOCK)
        if header == _ZEROS and not extended:
            break
        check_header(header, offset)
        kind = header[156]
        start = offset + _BLOCK
        size = _number(header[124:136], offset)
        if kind in _EXTENSIONS:
            _read_extension(window, offset, kind, size, shared, extended)
            offset = start + _padded(size)
            continue
        if shared or extended:
            records = {**shared, **extended}
            extended = {}
            name = records.get(b"path") or _name(header)
            size = _decimal(records[b"size"], offset) if b"size" in records else size
        else:
            records = {}
            name = _name(header)
        if kind == _SPARSE or b"GNU.sparse.major" in records or b"GNU.sparse.map" in records:
            archive.sparse.append(records.get(b"GNU.sparse.name", name))
            more = kind == _SPARSE and header[482] != 0  # maps of further blocks lie between header and data
            while more:
                more = window.read(start, _BLOCK)[504:505] not in (b"\0", b"")
                start += _BLOCK
        elif kind in _FILES and not name.endswith(b"/"):
            if start + size > window.size:
                raise DamagedTar(f"a member from byte {start} on has {size} bytes, the file has {window.size}")
            members.append((name, start, size))
            if name.endswith(wanted) and size <= _MAX_TEXT:
                text = read_text(name, window.read(start, size))
                if text is not None:
                    archive.texts[name] = text
        elif kind in (_LINK, _SYMLINK):
            target = records.get(b"linkpath") or header[157:257].split(b"\0", 1)[0]
            links.append((len(members), name, _target(name, target, kind)))
        offset = start + (0 if kind in _NO_DATA else _padded(size))
    if links:
        _resolve(links, archive)
    return offset


def check_header(header: bytes, offset: int) -> None:
    """Raise DamagedTar if the block at `offset` is no header with the right checksum."""
    if len(header) < _BLOCK:
        raise DamagedTar(f"it ends without an end marker, at byte {offset + len(header)}")
    field = header[148:156]
    try:
        stored = int(field.strip(b"\0 "), 8)
    except ValueError:
        stored = -1
    # The low half of Adler-32 is 1 plus the sum of all bytes, modulo 65521, and takes a 30th of the time of sum(). In
    # its own sum the checksum counts as eight spaces.
    error = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 256 - stored
    if error % 65521:
        negative = sum(256 for byte in header[:148] + header[156:] if byte > 127)
        if stored < 0 or (error - negative) % 65521:  # old programs summed signed bytes
            raise DamagedTar(f"neither a header nor the end marker at byte {offset}")


def _padded(size: int) -> int:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _number(text: bytes, offset: int) -> int:
    """Return the number in a field of a header: octal, or in GNU tars base 256 from 8 GiB on."""
    try:
        number = int(text.rstrip(b"\0 "), 8)  # as nearly all programs write it
    except ValueError:
        if text[0] == 0x80:
            number = int.from_bytes(text[1:], "big")
        else:
            digits = text.split(b"\0", 1)[0].strip() or b"0"
            number = int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
    if number < 0:
        raise DamagedTar(f"the header at byte {offset} has no valid size")
    return number


def _decimal(text: bytes, offset: int) -> int:
    if not text.isdigit() or len(text) > 18:
        raise DamagedTar(f"the extended header before byte {offset} has no valid size")
    return int(text)


def _name(header: bytes) -> bytes:
    name = header[:100].rstrip(b"\0")
    if b"\0" in name:
        name = name.split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU tars have times in the place of the prefix
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _read_extension(
    window: Window, offset: int, kind: int, size: int, shared: dict[bytes, bytes], extended: dict[bytes, bytes]
) -> None:
    """Read a pax header or a GNU long name into the records of all following members or of the next one."""
    data = window.read(offset + _BLOCK, min(size, _MAX_EXTENSION + 1))
    if len(data) != size or size > _MAX_EXTENSION:
        raise DamagedTar(f"the extended header at byte {offset} has {size} bytes, of which {len(data)} are there")
    if kind in (_LONG_NAME, _LONG_LINK):
        extended[b"path" if kind == _LONG_NAME else b"linkpath"] = data.split(b"\0", 1)[0]
        return
    records = shared if kind == _SHARED else extended
    while data.strip(b"\0"):  # records: "LENGTH KEY=VALUE\n"
        length, _, rest = data.partition(b" ")
        end = _decimal(length, offset + _BLOCK) if length.isdigit() else 0
        key, equals, value = rest[: max(0, end - len(length) - 1)].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise DamagedTar(f"the extended header at byte {offset} is no list of records")
        records[key] = value[:-1]
        data = data[end:]


def _target(name: bytes, target: bytes, kind: int) -> bytes:
    """Return the normalized name that a link leads to. A symbolic link counts from its own folder."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target) if kind == _SYMLINK else target)


def _resolve(links: list[tuple[int, bytes, bytes]], archive: Archive) -> None:
    """Insert the links that lead to a file, at their places among the members."""
    files = {posixpath.normpath(name): (start, size) for name, start, size in archive.members}
    texts = {posixpath.normpath(name): text for name, text in archive.texts.items()}
    next_names = {posixpath.normpath(name): target for _, name, target in links}
    merged: list[Member] = []
    done = 0
    for position, name, target in links:
        merged += archive.members[done:position]
        done = position
        for _ in range(_MAX_LINKS):
            if target in files:
                merged.append((name, *files[target]))
                if target in texts:
                    archive.texts[name] = texts[target]
                break
            target = next_names.get(target, target)
        else:
            archive.dead_links.append(name)
    archive.members[:] = merged + archive.members[done:]
