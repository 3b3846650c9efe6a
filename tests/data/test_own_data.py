"""Images of the user's own code: Datasets, arrays, Hugging Face datasets, lists of files, and references to objects."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import photo, photo_folder
from PIL import Image
from ranks import run_ranks
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from fastsimclr import Augmentation, open_views
from fastsimclr.data import Batch, Source, choose_backend, open_source
from fastsimclr.data.arrays import MappedSource
from fastsimclr.data.dataset import open_dataset, open_pair
from fastsimclr.data.datasets import DatasetSource
from fastsimclr.data.scan import scan
from fastsimclr.data.sources import ArraySource, DecodedSource, WrongForm, decoded
from fastsimclr.data.workers import _ByValue
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError

SMALL = Augmentation(image_size=16)
PIXELS = np.stack([photo(24, 20, seed=i) for i in range(12)])  # (N, H, W, 3) uint8
LABELS = np.arange(12) % 3


class Items(Dataset[Any]):
    """Dataset of the items that `make` returns for an index. At module level, as ranks pickle it by name."""

    def __init__(self, make: Callable[[int], Any], length: int = len(PIXELS), **attributes: Any) -> None:
        self.make, self.length = make, length
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def chw(index: int) -> torch.Tensor:
    return torch.from_numpy(PIXELS[index]).permute(2, 0, 1)


def pair(index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(PIXELS[index]), int(LABELS[index])


def images(source: Source) -> list[torch.Tensor]:
    assert isinstance(source, DecodedSource)
    return [source.image(i) for i in range(len(source))]


def error(data: Any) -> str:
    with pytest.raises(UserError) as raised:
        open_source(data)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def scan_error(make: Callable[[int], Any], kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as raised:
        scan(open_source(Items(make)))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Datasets


@pytest.mark.parametrize(
    "make",
    [
        lambda i: Image.fromarray(PIXELS[i]),
        lambda i: (PIXELS[i], LABELS[i]),
        lambda i: (chw(i), torch.tensor(LABELS[i]), "more"),
        lambda i: {"name": "x", "img": PIXELS[i][:, ::-1][:, ::-1], "target": int(LABELS[i])},
        lambda i: {"pixel_values": chw(i), "label": "abc"[LABELS[i]]},
    ],
    ids=["PIL", "array", "tensor", "dict", "names"],
)
def test_items_of_every_form_are_the_same_images(make: Callable[[int], Any]) -> None:
    source = open_source(Items(make))
    assert all(torch.equal(image, chw(i)) for i, image in enumerate(images(source)))
    has_labels = isinstance(make(0), tuple | dict)
    assert source.labels.tolist() == (LABELS if has_labels else np.full(12, -1)).tolist()
    assert [source.class_name(label) for label in range(len(source.classes))] == (
        []
        if not has_labels
        else ["a", "b", "c"]
        if make(0).__class__ is dict and "label" in make(0)
        else ["0", "1", "2"]
    )
    assert source.name(7) == "Items[7]"


@pytest.mark.parametrize(
    ("image", "channels", "dtype"),
    [
        (np.full((8, 9), 700, np.uint16), 1, torch.uint16),
        (np.full((8, 9), 700, ">u2"), 1, torch.uint16),
        (np.full((8, 9, 5), 0.5), 5, torch.float32),
        (torch.full((2, 8, 9), 0.5, dtype=torch.float16), 2, torch.float32),
        (torch.zeros(8, 9, dtype=torch.uint8), 1, torch.uint8),
        (Image.new("L", (9, 8)), 3, torch.uint8),
        (Image.new("CMYK", (9, 8)), 3, torch.uint8),
    ],
)
def test_pixels_keep_their_channels_and_depth(image: Any, channels: int, dtype: torch.dtype) -> None:
    source = open_source(Items(lambda _: image))
    (first, *_) = images(source)
    assert (first.shape, first.dtype) == ((channels, 8, 9), dtype)
    assert (source.pixels.channels, source.pixels.dtype) == (channels, dtype)
    if dtype == torch.uint16:
        assert first.to(torch.int32).unique().tolist() == [700]


def test_listed_labels_are_used_without_reading_the_items() -> None:
    read: list[int] = []

    def recorded(index: int) -> Any:
        read.append(index)
        return pair(index)

    listed = Items(recorded, targets=LABELS.tolist(), classes=["x", "y", "z"])
    assert open_source(listed).classes == ["x", "y", "z"]
    part = open_source(Subset(listed, [4, 3, 11]))
    assert (part.labels.tolist(), len(read)) == ([1, 0, 2], 2)
    # A target_transform changed the labels: those of the items count.
    changed = open_source(Items(lambda i: (PIXELS[i], 5 + int(LABELS[i])), labels=LABELS))
    assert (changed.labels.tolist(), changed.classes) == ((5 + LABELS).tolist(), ["5", "6", "7"])


def test_items_that_fail_are_known_once_all_are_read_for_their_labels() -> None:
    read: list[int] = []

    def fails(index: int) -> Any:
        read.append(index)
        if index % 6 == 1:
            raise KeyError("x")
        return pair(index)

    source = open_dataset(Items(fails), None, world=SINGLE_PROCESS, backend="torchvision").train
    assert source.bad == {1: "KeyError: 'x'", 7: "KeyError: 'x'"}
    good = [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert source.labels[good].tolist() == LABELS[good].tolist()
    assert source.has_labels
    assert source.subset(np.array([2, 7])).bad == {1: "KeyError: 'x'"}
    assert sorted(read) == sorted([0, *range(12)]), "the first item for the form, then each once"
    assert scan(source).bad == source.bad
    read.clear()
    assert open_pair(Items(fails), None, SINGLE_PROCESS, labels=False).train.labels.tolist() == [-1] * 12
    assert read == [0], "without labels, only for the form"
    loader = open_views(Items(fails), SMALL, 4, backend="torchvision", workers=0, max_bad=0.2)
    assert not {1, 7} & {int(index) for batch in loader for index in batch.index}
    assert loader.bad == {1: "KeyError: 'x'", 7: "KeyError: 'x'"}


def test_a_dataset_loads_like_the_files_that_it_opens(tmp_path: Path) -> None:
    files = open_source(str(photo_folder(tmp_path, 9)))
    own = Items(lambda i: (Image.open(files.name(i)), int(files.labels[i])), len(files))
    with_files, with_own = (
        list(open_views(data, SMALL, 4, backend="torchvision", workers=0, seed=3)) for data in (files, own)
    )
    for expected, batch in zip(with_files, with_own, strict=True):
        assert same(expected, batch, atol=0.05)  # Pillow and torchvision decode JPEG to within one level


def same(first: Batch, second: Batch, *, atol: float = 0.0) -> bool:
    views = zip(first.views, second.views, strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in views) and all(
        map(torch.equal, first[1:3], second[1:3])
    )


def test_resumed_epoch_and_ranks_are_those_of_a_single_rank() -> None:
    whole = list(open_views(Items(pair), SMALL, 4, workers=0, seed=1))
    loader = open_views(Items(pair), SMALL, 4, workers=0, seed=1)
    state = next(iter(loader)).position
    resumed = open_views(Items(pair), SMALL, 4, workers=0, seed=1)
    resumed.load_state_dict(state)
    assert all(map(same, whole[1:], resumed))
    ranks = [open_views(Items(pair), SMALL, 4, workers=0, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.index, torch.cat([part.index for part in parts]))
        assert torch.equal(batch.views[0], torch.cat([part.views[0] for part in parts]))


def per_rank(rank: int, difference: str) -> tuple[list[int], dict[int, str]] | str:
    """Open a Dataset of 12 items, or one with this difference on rank 1; return its labels and the bad images."""

    def make(index: int) -> Any:
        if index == 5:
            raise OSError("gone")
        if index == 8 and difference == "form":
            return PIXELS[index], 0
        return pair(index)

    own = Items(make, 10 if rank and difference == "length" else 12)
    if difference == "labels":
        own.targets = LABELS[::-1] if rank else LABELS  # type: ignore[attr-defined]
    try:
        source = open_dataset(own, None, world=World(rank, 2, torch.device("cpu")), backend="torchvision").train
    except UserError as raised:
        return str(raised)
    return source.labels.tolist(), dict(source.bad)


def all_ranks(rank: int) -> list[tuple[list[int], dict[int, str]] | str]:
    return [per_rank(rank, difference) for difference in ("", "length", "labels", "form")]


@pytest.mark.slow
def test_ranks_share_the_reading_of_labels_and_fail_together() -> None:
    first, second = run_ranks(2, all_ranks)
    assert first == second
    same_items, length, labels, form = first
    assert same_items == (np.where(np.arange(12) == 5, -1, LABELS).tolist(), {5: "OSError: gone"})
    assert "got 10 images on rank 1 and 12 on rank 0" in length
    assert "expected the same names and labels on all ranks" in labels
    assert "Items[8]: got a NumPy array" in form


# Errors of Datasets, before the first step


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda i: Image.fromarray(PIXELS[i]) if i < 9 else chw(i),
            "Items[9]: got a tensor (channels: 3, uint8), but a P",
        ),
        (
            lambda i: chw(i)[: 1 if i == 4 else 3],
            "Items[4]: got a tensor (channels: 1, uint8), but a tensor (channels: 3",
        ),
        (
            lambda i: PIXELS[i].astype(np.uint16 if i == 2 else np.uint8),
            "Items[2]: got a NumPy array (channels: 3, uint16)",
        ),
        (
            lambda i: np.full((8, 8), np.nan if i == 3 else 1, np.float32),
            "Items[3]: got values that are NaN or infinite",
        ),
        (lambda i: chw(i).float(), "Items[0]: got values from"),
        (
            lambda i: (chw(i), 0.5 if i == 6 else 1),
            "Items[6]: got label 0.5 of type float, expected an integer or the na",
        ),
    ],
)
def test_items_that_vary_or_have_invalid_values_are_named(make: Callable[[int], Any], expected: str) -> None:
    assert scan_error(make).startswith(expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda i: {"pixels": PIXELS[i], "y": 1},
            "Items[0]: got a dict with 'pixels', 'y', expected the image by the key",
        ),
        (lambda i: "a.jpg", "Items[0]: got str, expected a PIL image, a NumPy array or a tensor"),
        (lambda i: chw(i).long(), "Items[0]: got pixels of int64, expected uint8, uint16 or floats from 0 to 1"),
        (lambda i: chw(i).numpy(), "Items[0]: got a NumPy array of shape (3, 24, 20), expected (H, W, C) or (H, W)"),
        (lambda i: (chw(i), chw(i)), "Items[0]: got label of type Tensor, expected an integer or the name of a class;"),
        (
            lambda i: 1 / 0,
            "data: got 12 items of Items that all fail, the first with Items[0]: ZeroDivisionError: division",
        ),
    ],
)
def test_items_of_no_valid_form_raise_when_opened(make: Callable[[int], Any], expected: str) -> None:
    assert error(Items(make)).startswith(expected)


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return map(pair, range(12))


def test_data_without_an_index_says_what_to_do() -> None:
    for data in (Streamed(), map(pair, range(12)), 3, None):
        assert "expected a map-style Dataset with __len__ and __getitem__: add them, or write" in error(data)
    assert error({"images": PIXELS}).startswith("data: got dict, expected a Dataset, an array or a pair")
    assert error(Items(pair, 0)) == "data: got Items of length 0, expected images"


# Workers


def run_script(path: Path, text: str) -> str:
    path.write_text(text)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


OWN_DATASET = """
import numpy as np, torch
from fastsimclr import Augmentation, open_views
class Mine:
    def __len__(self): return 10
    def __getitem__(self, index): return offset + torch.full((3, 24, 24), index, dtype=torch.uint8), index % 2
offset = 7
loader = open_views(Mine(), Augmentation(image_size=16), 5, backend="torchvision", workers=1, seed=0)
print(sorted(index for batch in loader for index in batch.index.tolist()))
loader.close()
"""


@pytest.mark.slow
def test_workers_read_a_dataset_of_an_unguarded_script_and_of_a_notebook(tmp_path: Path) -> None:
    assert run_script(tmp_path / "script.py", OWN_DATASET) == f"{list(range(10))}\n"
    notebook = (
        "import __main__\n"
        "del __main__.__file__\n"  # cells are compiled without a file and run in __main__
        f"exec(compile({OWN_DATASET!r}, '<cell 1>', 'exec'), vars(__main__))\n"
    )
    assert run_script(tmp_path / "notebook.py", notebook) == f"{list(range(10))}\n"


@pytest.mark.slow
def test_workers_have_the_environment_of_their_start(tmp_path: Path) -> None:
    script = """
import os, torch
from fastsimclr import Augmentation, open_views
class Mine:
    def __len__(self): return 4
    def __getitem__(self, index): return torch.full((3, 8, 8), int(os.environ["SHADE"]), dtype=torch.uint8)
for shade in ("0", "255"):
    os.environ["SHADE"] = shade
    plain = Augmentation(image_size=8, mean=(0, 0, 0), std=(1, 1, 1)).for_evaluation()
    loader = open_views(Mine(), plain, 4, backend="torchvision", workers=1)
    print([float(batch.views[0].max()) for batch in loader])
    loader.close()
"""
    assert run_script(tmp_path / "script.py", script) == "[0.0]\n[1.0]\n"


@pytest.mark.slow
def test_workers_read_own_data_like_this_process(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", PIXELS)
    mapped = np.load(tmp_path / "array.npy", mmap_mode="r")
    shared = torch.from_numpy(PIXELS)
    for data in (mapped[2:], Items(lambda i: mapped[i]), Items(lambda i: shared[i].permute(2, 0, 1))):
        here, in_worker = (
            list(open_views(data, SMALL, 4, backend="torchvision", workers=workers, seed=2)) for workers in (0, 1)
        )
        assert all(map(same, here, in_worker))


def test_a_dataset_that_cannot_be_pickled_says_what_to_do(tmp_path: Path) -> None:
    with open(tmp_path / "opened", "w") as file:
        loader = open_views(Items(pair, file=file), SMALL, 4, backend="torchvision", workers=1)
        with pytest.raises(
            UserError, match=r"cannot be sent to worker.*open files in __getitem__ .*, or set workers to 0"
        ):
            next(iter(loader))
        loader.close()


def test_files_opened_at_first_use_are_not_sent_to_workers(tmp_path: Path) -> None:
    class Lazy(Items):
        file: Any = None

        def __getitem__(self, index: int) -> Any:
            self.file = self.file or open(__file__)  # noqa: SIM115
            self.file.seek(0)
            return pair(index)

    source = open_source(Lazy(pair))
    received = pickle.loads(pickle.dumps(_ByValue(source)))  # type: ignore[arg-type]
    assert torch.equal(received.image(3), chw(3))
    for reader in (source, received):
        assert isinstance(reader, DatasetSource)
        reader._reader.file.close()


def test_a_dataset_that_cannot_be_copied_is_read_as_it_is() -> None:
    class Handle(Items):
        def __reduce__(self) -> Any:
            raise TypeError("objects of this library cannot be pickled")

    assert open_source(Handle(pair)).labels.tolist() == LABELS.tolist()


# Arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [None, 1, 5])
def test_arrays_are_not_copied_and_keep_their_depth(tmp_path: Path, dtype: Any, channels: int | None) -> None:
    rng = np.random.default_rng(0)
    array = rng.random((6, 8, 9) + (() if channels is None else (channels,)))
    array = (array * (1 if dtype is np.float32 else np.iinfo(dtype).max)).astype(dtype)
    np.save(tmp_path / "array.npy", array)
    in_memory, as_tensor = open_source(array), open_source(torch.from_numpy(array))
    mapped = open_source(str(tmp_path / "array.npy")).subset(np.array([4, 1]))
    assert isinstance(in_memory, ArraySource)
    assert isinstance(mapped, MappedSource)
    array.flat[0] += dtype(0)
    assert in_memory.images.data_ptr() == array.ctypes.data
    for source in (in_memory, as_tensor):
        assert np.array_equal(images(source)[3].numpy(), array.reshape(6, 8, 9, -1)[3].transpose(2, 0, 1))
    assert np.array_equal(images(mapped)[1].numpy(), array.reshape(6, 8, 9, -1)[1].transpose(2, 0, 1))
    assert (mapped.name(0), in_memory.name(4)) == (f"{tmp_path}/array.npy[4]", "array[4]")
    assert mapped.pixels == in_memory.pixels


def test_labels_of_arrays(tmp_path: Path) -> None:
    assert open_source((PIXELS, LABELS)).labels.tolist() == LABELS.tolist()
    named = open_source((torch.from_numpy(PIXELS), np.array(["b", "a", "c"])[LABELS]))
    assert (named.classes, named.labels[:3].tolist()) == (["a", "b", "c"], [1, 0, 2])
    gaps = open_source((PIXELS, LABELS * 10))
    assert (gaps.classes, gaps.class_name(20)) == (["0", "10", "20"], "20")
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "a.labels.npy", LABELS)
    assert open_source(str(tmp_path / "a.npy")).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (PIXELS.astype(np.int64), "array: got an array of int64, expected uint8, uint16 or float32 (from 0 to 1)"),
        (PIXELS.astype(">u2"), "array: got an array of >u2"),
        (
            PIXELS[0, 0],
            "array: got an array of shape (20, 3), expected (N, H, W, C) or (N, H, W), with 1 to 16 channels",
        ),
        (PIXELS.transpose(0, 3, 1, 2), "array: got an array of shape (12, 3, 24, 20)"),
        ((PIXELS, LABELS[:5]), "array: got 12 images and 5 labels"),
        ((PIXELS, LABELS / 2), "array: got labels of float64, expected integers or names of classes"),
        ((PIXELS, LABELS - 2), "array[0]: got label -2, expected 0 or above, or -1 for no label"),
    ],
)
def test_invalid_arrays(data: Any, expected: str) -> None:
    assert error(data).startswith(expected)


def test_invalid_values_of_float_arrays_are_found_when_opened_or_from_a_file_when_met(tmp_path: Path) -> None:
    array = np.zeros((6, 8, 8, 3), np.float32)
    array[4, 0, 0, 0] = np.inf
    np.save(tmp_path / "array.npy", array)
    with pytest.raises(UserError, match=r"array\[4\]: got values that are NaN or infinite"):
        open_dataset(array, None, world=SINGLE_PROCESS)
    mapped = open_dataset(str(tmp_path / "array.npy"), None, world=SINGLE_PROCESS).train
    for meet in (scan, lambda source: decoded(source, 4)):
        with pytest.raises(WrongForm, match=r"array.npy\[4\]: got values that are NaN or infinite"):
            meet(mapped)
    with pytest.raises(UserError, match=r"array\[4\]: got values that are NaN or infinite"):
        open_views(array, SMALL, 4)


def test_memory_mapped_arrays_reach_workers_as_their_file(tmp_path: Path) -> None:
    large = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (50, 100, 100, 3))
    large[:] = np.arange(50)[:, None, None, None]
    part = np.load(tmp_path / "a.npy", mmap_mode="r")[40:20:-2, 10:]
    sent = pickle.dumps(_ByValue(SimpleNamespace(inside=part)))  # type: ignore[arg-type]
    assert len(sent) < 4096
    assert np.array_equal(pickle.loads(sent).inside, part)


def test_backend_chosen_for_own_data(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    np.save(tmp_path / "array.npy", PIXELS)
    assert choose_backend(open_source(PIXELS), cpu)[0] == "memory"
    assert choose_backend(open_source(np.zeros((2, 200, 200, 3), np.uint8)), cpu)[0] == "torchvision"
    assert choose_backend(open_source(str(tmp_path / "array.npy")), cpu)[0] == "torchvision"
    own = open_source(Items(lambda i: Image.fromarray(PIXELS[i])))
    assert choose_backend(own, cpu)[0] == "memory"
    kept = open_views(own, SMALL, 4, seed=1)
    assert all(map(same, kept, open_views(PIXELS, SMALL, 4, seed=1)))


# Hugging Face


def hugging_face(**columns: Any) -> datasets.Dataset:
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "species": datasets.ClassLabel(names=["x", "y", "z"]),
            "id": datasets.Value("int64"),
        }
    )
    rows = {"photo": [Image.fromarray(image) for image in PIXELS], "species": LABELS.tolist(), "id": list(range(12))}
    return datasets.Dataset.from_dict({**rows, **columns}, features=features)


def test_hugging_face_dataset() -> None:
    data = hugging_face()
    source = open_source(data)
    assert all(torch.equal(image, chw(i)) for i, image in enumerate(images(source)))
    assert (source.labels.tolist(), source.classes) == (LABELS.tolist(), ["x", "y", "z"])
    shuffled = open_source(data.shuffle(seed=1))
    assert all(
        torch.equal(image, chw(i)) for i, image in zip(data.shuffle(seed=1)["id"], images(shuffled), strict=True)
    )
    assert shuffled.labels.tolist() == data.shuffle(seed=1)["species"][:]
    changed = open_source(data.with_transform(lambda batch: {"photo": [np.zeros((4, 4))] * len(batch["photo"])}))
    assert (images(changed)[0].shape, changed.has_labels) == ((1, 4, 4), False)


def test_hugging_face_errors() -> None:
    data = hugging_face()
    assert error(datasets.DatasetDict(train=data, test=data)) == (
        "data: got DatasetDict of the splits train, test, expected one of them, such as dataset['train']"
    )
    assert "expected a map-style Dataset" in error(data.to_iterable_dataset())
    assert "expected a column of images" in error(data.select_columns(["id", "species"]))
    two = datasets.concatenate_datasets([data, data.select_columns("photo").rename_column("photo", "other")], axis=1)
    assert "got the Image columns photo, other, expected one" in error(two)


# Lists of files, and references


def test_list_of_files(tmp_path: Path) -> None:
    folder = open_source(str(photo_folder(tmp_path, 6)))
    files = [Path(folder.name(i)) for i in (4, 0)]
    source = open_source(files)
    assert [source.name(i) for i in range(2)] == list(map(str, files))
    assert not source.has_labels


def test_reference_to_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_data_of_a_test.py").write_text(
        "import numpy as np\n"
        "class Mine:\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, index): return np.full((8, 8, 3), index, np.uint8), index\n"
        "mine = Mine()\n"
        "def make(): return mine\n"
        "def fails(): raise KeyError('no data')\n"
    )
    for name in ("Mine", "mine", "make"):
        source = open_source(f"{tmp_path}/own_data_of_a_test.py:{name}")
        assert (len(source), source.labels.tolist(), source.name(1)) == (4, [0, 1, 2, 3], "Mine[1]")
    assert "fails when called without arguments: KeyError: 'no data'" in error(
        f"{tmp_path}/own_data_of_a_test.py:fails"
    )


def test_tensor_dataset_and_torchvision_style() -> None:
    tensors = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    source = open_source(TensorDataset(tensors, torch.from_numpy(LABELS)))
    assert source.labels.tolist() == LABELS.tolist()
    assert isinstance(source, DatasetSource)
    kept: NDArray[np.int64] = np.array([5, 2])
    part = source.subset(kept)
    assert torch.equal(part.image(1), chw(2))
    assert part.labels.tolist() == LABELS[kept].tolist()
