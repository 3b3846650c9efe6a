"""Folders of images: find the files and their classes, and count what is passed over.

found                                      result
images in subfolders                       classes: the subfolders with images at any depth, in sorted order
images in the folder itself                no labels
both                                       those of which there are more; the classes if there are as many
only train/, val/, test/ and the like      UserError: expected one of them
no images                                  UserError

Passed over, and counted in `Source.notes`:
- hidden files and folders, whose names begin with a dot: .DS_Store, ._1.jpg, .ipynb_checkpoints, .Trash-1000
- folders that file systems and archivers keep for themselves: @eaDir, __MACOSX, lost+found, $RECYCLE.BIN
- links to folders above or already listed: each folder is listed once, by its own path if that is in the data
- folders that cannot be read, broken links, pipes, sockets, devices, and files with other endings than EXTENSIONS
- .npy files beside images, which hold something else, such as features
A broken link with the ending of an image is kept: git-annex and DVC make them for files whose content is elsewhere.
"""

import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from fastsimclr.data.images import EXTENSIONS
from fastsimclr.data.names import Names, printable
from fastsimclr.data.sources import NO_LABEL, FolderSource
from fastsimclr.errors import UserError

_THREADS = 16  # network storage answers them at the same time; on a local disk they neither gain nor cost time
_ENDINGS = tuple(map(os.fsencode, EXTENSIONS))
_ARRAY_ENDING = b".npy"
SYSTEM_FOLDERS = (
    *(b"@eaDir", b"#recycle", b"#snapshot", b"@Recycle", b"@Recently-Snapshot"),  # of Synology and QNAP
    *(b"__MACOSX", b"lost+found", b"$RECYCLE.BIN", b"System Volume Information"),
)
_PART = re.compile(r"(train(ing)?|val(id(ation)?)?|dev|eval|test(ing)?)[-_]?\d*", re.IGNORECASE)
_SHOWN_ENDINGS = 3

# Kinds of entries that are listed.
_IMAGE, _ARRAY, _FOLDER, _LINK = "image", "array", "folder", "link to a folder"
# Kinds that are passed over, as they are called in notes.
_HIDDEN_FILE = "hidden files passed over"
_HIDDEN_FOLDER = "hidden folders passed over"
_SYSTEM_FOLDER = "system folders passed over"
_BROKEN_LINK = "broken links passed over"
_BROKEN_IMAGE = "broken links kept as images that cannot be read"
_SPECIAL_FILE = "pipes, sockets and devices passed over"
_OTHER_FILE = "other files passed over"
_UNREADABLE = "folders that cannot be read passed over"
_REPEATED = "links to folders above or already listed passed over"
_ARRAY_BESIDE_IMAGES = ".npy files beside images passed over"
_STRAY_IMAGE = "images beside the class folders passed over"
_IN_SUBFOLDER = "images in subfolders passed over, as more are beside them"

Identity = tuple[int, int]  # device and inode


@dataclass
class _Folder:
    """A folder and its entries. Names are sorted.

    path: relative to the root; empty for the root. images, arrays: names, each followed by a zero byte, which no name
    contains: a list of a million names would take 100 MiB. folders, links: names of subfolders and links to folders.
    passed: number and first name of the other entries by kind. endings: number of other files by ending.
    """

    path: bytes
    images: bytes = b""
    arrays: bytes = b""
    folders: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)
    passed: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    endings: Counter[bytes] = field(default_factory=Counter)
    error: OSError | None = None

    def within(self, name: bytes) -> bytes:
        """Return the path of an entry relative to the root."""
        return self.path + b"/" + name if self.path else name


class _Notes:
    """Counts what is passed over by kind, and keeps the path of the first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, bytes]] = {}
        self._endings: Counter[bytes] = Counter()

    def add(self, kind: str, number: int, path: bytes) -> None:
        before, first = self._found.get(kind, (0, path))
        if number:
            self._found[kind] = before + number, first

    def add_entries(self, folder: _Folder) -> None:
        for kind, (number, name) in folder.passed.items():
            self.add(kind, number, folder.within(name))
        self._endings.update(folder.endings)

    def lines(self) -> list[str]:
        lines = [f"{kind}: {number:,} (first: {printable(path)})" for kind, (number, path) in self._found.items()]
        if self._endings:
            by_number = sorted(self._endings.items(), key=lambda each: (-each[1], each[0]))
            common = [f"{printable(ending)} {number:,}" for ending, number in by_number[:_SHOWN_ENDINGS]]
            lines.append(f"{_OTHER_FILE}: {self._endings.total():,} ({', '.join(common)})")
        return lines


def open_folder(root: str) -> FolderSource:
    """Open the images in a folder. Raises UserError if it has none, or its layout is not one of the above."""
    notes = _Notes()
    return _as_source(root, _walk(os.fsencode(root), notes), notes)


def open_listed(root: str, names: Iterable[str]) -> FolderSource:
    """Open the images among files of remote storage, which lists them all. Raises UserError like `open_folder`.

    names: of the files, relative to the folder `root`.
    """
    notes = _Notes()
    listed: defaultdict[bytes, defaultdict[str, list[bytes]]] = defaultdict(lambda: defaultdict(list))
    for path, _, name in (os.fsencode(name).rpartition(b"/") for name in names):
        kinds = [_kind_of_folder(part, _FOLDER) for part in path.split(b"/") if part]
        passed_over = next((kind for kind in kinds if kind != _FOLDER), None)
        if passed_over is None:
            listed[path][_kind_of_file(name)].append(name)
        else:
            notes.add(passed_over, 1, path)
    folders = [_from_entries(path, listed[path]) for path in sorted({b"", *listed})]
    for folder in folders:
        notes.add_entries(folder)
    return _as_source(root, folders, notes)


def _as_source(root: str, folders: list[_Folder], notes: _Notes) -> FolderSource:
    """Return the images in the folders, of which the first is the root, with the labels of their layout."""
    if not any(folder.images for folder in folders):
        for folder in folders:
            folder.images = folder.arrays
    else:
        for folder in folders:
            notes.add(_ARRAY_BESIDE_IMAGES, folder.arrays.count(b"\0"), folder.within(_first(folder.arrays)))
    top, classes = folders[0], _classes(folders[1:])
    numbers = [sum(folder.images.count(b"\0") for folder in of_class) for of_class in classes.values()]
    beside = top.images.count(b"\0")
    if not beside and not numbers:
        found = "".join(f"; {line}" for line in notes.lines())
        raise UserError(
            f"{root}: got a folder with no images in it or its subfolders, expected files ending in "
            f"{' '.join(EXTENSIONS)}{found}"
        )
    if beside > sum(numbers):
        for of_class, number in zip(classes.values(), numbers, strict=True):
            notes.add(_IN_SUBFOLDER, number, of_class[0].within(_first(of_class[0].images)))
        source = FolderSource(Names.of(_names([top])), np.full(beside, NO_LABEL), (), root)
    else:
        _check_parts(root, list(classes))
        notes.add(_STRAY_IMAGE, beside, _first(top.images))
        names = Names.of(name for of_class in classes.values() for name in _names(of_class))
        source = FolderSource(names, np.repeat(np.arange(len(numbers)), numbers), list(classes), root)
    source.notes = notes.lines()
    return source


def _classes(folders: Iterable[_Folder]) -> dict[str, list[_Folder]]:
    """Return the folders with images by their first path component, sorted by it."""
    classes: defaultdict[bytes, list[_Folder]] = defaultdict(list)
    for folder in folders:
        if folder.images:
            classes[folder.path.partition(b"/")[0]].append(folder)
    return {os.fsdecode(name): classes[name] for name in sorted(classes)}


def _check_parts(root: str, classes: list[str]) -> None:
    if len(classes) > 1 and all(map(_PART.fullmatch, classes)):
        train = next((name for name in classes if name.lower().startswith("train")), classes[0])
        raise UserError(
            f"{root}: got the folders {', '.join(classes)}, which are parts of a dataset and not classes; expected one "
            f"part, such as {os.path.join(root, train)}"
        )


def _names(folders: list[_Folder]) -> Iterator[bytes]:
    """Return the paths of the images in the folders, sorted."""
    paths = (folder.within(name[0]) for folder in folders for name in re.finditer(rb"[^\0]+", folder.images))
    return paths if len(folders) == 1 else iter(sorted(paths))


def _first(names: bytes) -> bytes:
    return names.partition(b"\0")[0]


# Listing


def _walk(root: bytes, notes: _Notes) -> list[_Folder]:
    """List the folder `root` and all below it, each real folder once. Links are followed after all other folders."""
    seen = _folders_above(root)
    folders: list[_Folder] = []
    waiting, links = [b""], list[bytes]()
    with ThreadPoolExecutor(_THREADS) as pool:
        while waiting or links:
            if not waiting:
                waiting, links = links, []
            new: list[bytes] = []
            for path, identity in zip(waiting, pool.map(lambda path: _identity(root, path), waiting), strict=True):
                if identity in seen:
                    notes.add(_REPEATED, 1, path)
                else:
                    new.append(path)
                if identity is not None:
                    seen.add(identity)
            waiting = []
            for folder in pool.map(lambda path: _list(root, path), new):
                if folder.error and not folder.path:
                    raise UserError(f"{os.fsdecode(root)}: cannot be read ({folder.error.strerror})") from folder.error
                notes.add(_UNREADABLE, folder.error is not None, folder.path)
                notes.add_entries(folder)
                folders.append(folder)
                waiting += map(folder.within, folder.folders)
                links += map(folder.within, folder.links)
    return folders


def _folders_above(root: bytes) -> set[Identity | None]:
    path = os.path.realpath(root)
    above: set[Identity | None] = set()
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        above.add(_identity(path, b""))
    return above - {None}


def _identity(root: bytes, path: bytes) -> Identity | None:
    """Return what all paths of a folder have in common; None if it cannot be read."""
    try:
        status = os.stat(os.path.join(root, path))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _list(root: bytes, path: bytes) -> _Folder:
    names: defaultdict[str, list[bytes]] = defaultdict(list)
    try:
        with os.scandir(os.path.join(root, path)) as entries:
            for entry in entries:
                names[_kind(entry)].append(entry.name)
    except OSError as error:
        return _Folder(path, error=error)
    return _from_entries(path, names)


def _from_entries(path: bytes, names: defaultdict[str, list[bytes]]) -> _Folder:
    """names: of the folder's entries, by kind."""
    images, arrays = names.pop(_IMAGE, []), names.pop(_ARRAY, [])
    images += names.get(_BROKEN_IMAGE, [])
    folders, links = names.pop(_FOLDER, []), names.pop(_LINK, [])
    endings = Counter(os.path.splitext(name)[1].lower() or name for name in names.pop(_OTHER_FILE, []))
    passed = {kind: (len(of_kind), min(of_kind)) for kind, of_kind in names.items()}
    return _Folder(path, _join(images), _join(arrays), sorted(folders), sorted(links), passed, endings)


def _join(names: list[bytes]) -> bytes:
    """Sort the names, in place, and return them with a zero byte after each."""
    names.sort()
    joined = bytearray()  # bytes.join would take 80 bytes of memory per name
    for name in names:
        joined += name + b"\0"
    return bytes(joined)


def _kind(entry: "os.DirEntry[bytes]") -> str:
    """Return the kind of an entry. Only links are read for it: of others, the folder itself tells."""
    if entry.is_file(follow_symlinks=False):
        return _kind_of_file(entry.name)
    if entry.is_dir(follow_symlinks=False):
        return _kind_of_folder(entry.name, _FOLDER)
    if not entry.is_symlink():
        return _SPECIAL_FILE
    try:
        mode = entry.stat().st_mode
    except OSError:
        return _BROKEN_IMAGE if _kind_of_file(entry.name) == _IMAGE else _BROKEN_LINK
    if stat.S_ISDIR(mode):
        return _kind_of_folder(entry.name, _LINK)
    return _kind_of_file(entry.name) if stat.S_ISREG(mode) else _SPECIAL_FILE


def _kind_of_file(name: bytes) -> str:
    if name.startswith(b"."):
        return _HIDDEN_FILE
    lower = name.lower()
    if not lower.endswith(_ENDINGS):
        return _OTHER_FILE
    return _ARRAY if lower.endswith(_ARRAY_ENDING) else _IMAGE


def _kind_of_folder(name: bytes, kind: str) -> str:
    if name.startswith(b"."):
        return _HIDDEN_FOLDER
    return _SYSTEM_FOLDER if name in SYSTEM_FOLDERS else kind
