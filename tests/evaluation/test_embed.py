"""python -m fastsimclr.embed: features of all images in the source's order, a map of them, and nearest neighbors."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import broken, jpeg, photo, photo_folder, write, write_tar
from PIL import Image
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from weights import randomize_norms, save_run

from fastsimclr import Augmentation, UserError, encoder, open_views
from fastsimclr.data import open_source
from fastsimclr.data.images import decode
from fastsimclr.distributed import World
from fastsimclr.embed import main
from fastsimclr.evaluation import neighbors
from fastsimclr.evaluation.config import MAP_METHODS
from fastsimclr.evaluation.feature_file import expect_one_disk
from fastsimclr.models import Encoder, EncoderSpec
from fastsimclr.pretrained import load_encoder
from fastsimclr.reporting import embedding_pictures as pictures
from fastsimclr.reporting.contact_sheet import GAP, RED, text_width

IMAGES = 21  # batches of 4, and a last one of 1 image: none for the second rank
QUICK = ["--batch_size=4", "--workers=0", "--device=cpu", "--precision=fp32", "--map=none", "--gallery=0"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(photo_folder(tmp_path_factory.mktemp("photos"), IMAGES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: str) -> Path:
    """A run folder with a ResNet-18 with the ImageNet stem and an image size of 24."""
    torch.manual_seed(0)
    model = randomize_norms(encoder("resnet18", stem="imagenet"))
    return save_run(tmp_path_factory.mktemp("run"), model, f"--data.train={photos}", "--data.image_size=24")


def embed(run: Path, output: Path, *options: str) -> NDArray[np.float32]:
    """Run the command and return the features that it writes."""
    assert main([f"--checkpoint={run}", f"--output={output}", *QUICK, *options]) == 0
    return np.load(output / "features.npy", mmap_mode="r")


def read_table(output: Path) -> list[list[str]]:
    """Return the rows of images.csv."""
    with open(output / "images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def pixels_of(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def rgb(code: str) -> list[int]:
    return [int(code[k : k + 2], 16) for k in (1, 3, 5)]


def blobs(classes: int, images: int, features: int = 32) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return features in well-separated clusters, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % classes
    return (5 * rng.normal(size=(classes, features))[labels] + rng.normal(size=(images, features))).astype("f4"), labels


# Features


def test_features_are_of_the_central_squares_in_file_order(run: Path, photos: str, tmp_path: Path) -> None:
    features = embed(run, tmp_path / "out")
    assert isinstance(features, np.memmap)
    assert features.dtype == np.float32
    mean, std = ([[[value]] for value in values] for values in (Augmentation().mean, Augmentation().std))
    files, model = sorted(Path(photos).rglob("*.jpg")), load_encoder(run)
    for row, file in enumerate(files):
        image = decode(np.fromfile(file, np.uint8), file.name)
        height, width = image.shape[1:]
        side = round(min(height, width) * 0.875)
        box = [(height - side) // 2, (width - side) // 2, side, side]
        view = TF.resized_crop(image, *box, [24, 24], InterpolationMode.BICUBIC, antialias=True)
        with torch.inference_mode():
            expected = model(((view / 255 - torch.tensor(mean)) / torch.tensor(std))[None])[0]
        np.testing.assert_allclose(features[row], expected, rtol=1e-4, atol=1e-4, err_msg=file.name)
    classes = {"a": "0", "b": "1", "c": "2"}
    assert read_table(tmp_path / "out") == [
        ["row", "image", "label", "class"],
        *([str(row), str(file), classes[file.parent.name], file.parent.name] for row, file in enumerate(files)),
    ]


@pytest.mark.slow
def test_two_ranks_write_the_same_files_as_one(run: Path, tmp_path: Path) -> None:
    one = embed(run, tmp_path / "one")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastsimclr.embed"]
    done = subprocess.run(
        [sys.executable, *command, f"--checkpoint={run}", f"--output={tmp_path / 'two'}", *QUICK, "--gallery=1"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    two = np.load(tmp_path / "two" / "features.npy")
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    assert read_table(tmp_path / "two") == read_table(tmp_path / "one")
    files = {"features.npy", "images.csv", "embed.json", "gallery.png"}
    assert {file.name for file in (tmp_path / "two").iterdir()} - {"image_scan.npz"} == files


def test_safetensors_hold_features_and_labels(run: Path, photos: str, tmp_path: Path) -> None:
    features = embed(run, tmp_path / "npy")
    assert main([f"--checkpoint={run}", f"--output={tmp_path / 'out'}", *QUICK, "--format=safetensors"]) == 0
    file = tmp_path / "out" / "features.safetensors"
    tensors = load_file(file)
    assert tensors.keys() == {"features", "labels"}
    assert np.array_equal(tensors["features"].numpy(), features)
    assert tensors["labels"].tolist() == sorted(i % 3 for i in range(IMAGES))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header == {"checkpoint": str(run), "origin": "fastsimclr run, step 7", "data": photos}

    flat = write(tmp_path / "flat", {f"{k}.jpg": jpeg(photo(40, 50, seed=k)) for k in range(3)})
    options = [*QUICK, f"--data={flat}", "--format=safetensors", f"--output={tmp_path / 'unlabeled'}"]
    assert main([f"--checkpoint={run}", *options]) == 0
    assert load_file(tmp_path / "unlabeled" / "features.safetensors").keys() == {"features"}
    assert read_table(tmp_path / "unlabeled")[1] == ["0", str(flat / "0.jpg"), "", ""]


def test_run_folder_sets_data_recipe_and_output(
    run: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = save_run(tmp_path / "run", load_encoder(run), f"--data.train={photos}", "--data.image_size=24")
    features = embed(run, tmp_path / "elsewhere")
    capsys.readouterr()
    assert main([f"--checkpoint={mine / 'checkpoints' / 'last.pt'}", *QUICK]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"{mine / 'embed'}: features.npy, images.csv, embed.json; 21 images of {photos}, 512 feat")
    assert np.array_equal(np.load(mine / "embed" / "features.npy"), features)
    record = json.loads((mine / "embed" / "embed.json").read_text())
    assert record["encoder"] == asdict(EncoderSpec("resnet18"))
    assert (record["images"], record["features"], record["classes"], record["data"]) == (IMAGES, 512, 3, photos)
    assert record["recipe"]["image_size"] == 24
    assert record["images_per_second"] == pytest.approx(IMAGES / record["seconds"])


def test_built_in_data_uses_the_held_out_part(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(embed(run, tmp_path / "out", "--data=digits", "--batch_size=128")) == 364
    assert "364 images of digits (held-out part)" in capsys.readouterr().out
    assert [int(row[2]) for row in read_table(tmp_path / "out")[1:]] == open_source(
        "digits", split="val"
    ).labels.tolist()


def test_recipe_of_a_foreign_checkpoint_comes_from_the_options(
    photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "foreign.pth"
    torch.manual_seed(0)
    torch.save(randomize_norms(resnet18()).state_dict(), file)
    recipe = ["--data.image_size=20", "--data.mean=[0.5, 0.4, 0.3]", "--data.std", "[0.3,0.2,0.1]"]
    recipe += ["--data.interpolation=bilinear", "--data.center_fraction=1"]
    features = embed(file, tmp_path / "out", f"--data={photos}", *recipe)
    assert "prepared with the default options at 20 pixels" in capsys.readouterr().out
    changes = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1), "interpolation": "bilinear", "center_fraction": 1.0}
    augmentation = Augmentation(
        image_size=20, crop="center", flip_prob=0, jitter_prob=0, grayscale_prob=0, blur_prob=0, num_views=1, **changes
    )
    batch = next(iter(open_views(photos, augmentation, IMAGES, shuffle=False)))
    with torch.inference_mode():
        torch.testing.assert_close(
            torch.from_numpy(np.array(features)), load_encoder(file)(batch.views[0]), rtol=1e-4, atol=1e-5
        )


def test_subset_depends_on_the_seed_and_keeps_file_order(run: Path, tmp_path: Path) -> None:
    whole = embed(run, tmp_path / "whole")
    names = [row[1] for row in read_table(tmp_path / "whole")[1:]]
    chosen = []
    for name, seed in (("a", 3), ("again", 3), ("other", 4)):
        features = embed(run, tmp_path / name, "--images=7", f"--seed={seed}")
        rows = [names.index(row[1]) for row in read_table(tmp_path / name)[1:]]
        assert len(rows) == 7
        assert rows == sorted(rows)
        np.testing.assert_allclose(features, whole[rows], rtol=1e-4, atol=1e-5)
        chosen.append(rows)
    assert chosen[0] == chosen[1] != chosen[2]


def test_table_holds_file_names_of_any_bytes(run: Path, tmp_path: Path) -> None:
    names = ['a, "b"/x, y.jpg', 'a, "b"/two\nlines.jpg', "ü/plain.jpg", os.fsdecode(b"\xff/\xfe.jpg")]
    folder = write(tmp_path / "odd", {name: jpeg(photo(30, 30, seed=k)) for k, name in enumerate(names)})
    embed(run, tmp_path / "out", f"--data={folder}")
    rows = read_table(tmp_path / "out")[1:]
    assert {row[1] for row in rows} == {str(folder / name) for name in names}
    assert all(Path(row[1]).is_file() for row in rows)
    assert {row[3] for row in rows} == {'a, "b"', "ü", os.fsdecode(b"\xff")}


def test_class_numbers_with_gaps_are_kept(run: Path, tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data) for n in (5, 30) for kind, data in (("jpg", jpeg(photo(30, 30))), ("cls", b"%d" % n))
    ]
    embed(run, tmp_path / "out", f"--data={write_tar(tmp_path / 'gaps.tar', members)}")
    assert [row[2:] for row in read_table(tmp_path / "out")[1:]] == [["5", "5"], ["30", "30"]]


# Errors


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_bad_images_are_left_out_and_listed(
    run: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    good = {str(f.relative_to(photos)): f.read_bytes() for f in Path(photos).rglob("*.jpg")}
    folder = write(tmp_path / "photos", good | {"a/005.jpg": broken()["half.jpg"]})
    whole = embed(run, tmp_path / "whole", f"--data={folder}", "--max_bad=0.1")
    (folder / "a" / "005.jpg").unlink()
    options = [f"--checkpoint={run}", f"--data={folder}", f"--output={tmp_path / 'out'}", f"--format={kind}", *QUICK]
    assert main(options) == 0
    expected = read_features(tmp_path / "out", kind)
    assert len(expected) == len(whole) == len(good)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)  # other images are in their batches

    write(folder, {"a/005.jpg": broken()["half.jpg"]})
    assert main([*options, "--force"]) == 2
    assert f"max_bad: got 1 of {len(good) + 1} images that cannot be used" in capsys.readouterr().err
    assert main([*options, "--force", "--max_bad=0.1"]) == 0
    np.testing.assert_allclose(read_features(tmp_path / "out", kind), expected, rtol=1e-4, atol=1e-5)
    assert "left out 1 that cannot be used, see skipped_images.txt" in capsys.readouterr().out
    assert (tmp_path / "out" / "skipped_images.txt").read_text().startswith(f"{folder}/a/005.jpg: got ")
    assert "a/005" not in str(read_table(tmp_path / "out"))


def read_features(folder: Path, kind: str) -> NDArray[np.float32]:
    if kind == "npy":
        return np.load(folder / "features.npy")  # type: ignore[no-any-return]
    return load_file(folder / "features.safetensors")["features"].numpy()  # type: ignore[no-any-return]


def test_existing_files_are_overwritten_only_with_force(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(run, tmp_path, "--gallery=1")
    for kind in ("npy", "safetensors"):
        assert main([f"--checkpoint={run}", f"--output={tmp_path}", *QUICK, f"--format={kind}"]) == 2
        assert f"{tmp_path}/features.npy, which already exists" in capsys.readouterr().err
    options = [f"--output={tmp_path}", *QUICK, "--format=safetensors", "--images=3", "--force"]
    assert main([f"--checkpoint={run}", *options]) == 0
    assert len(load_file(tmp_path / "features.safetensors")["features"]) == 3
    assert not (tmp_path / "features.npy").exists(), "the old features would not match the new table"
    assert not (tmp_path / "gallery.png").exists()


@pytest.mark.slow
def test_killed_process_leaves_no_features_and_a_rerun_succeeds(run: Path, tmp_path: Path) -> None:
    large = write(tmp_path, {"large.jpg": jpeg(photo(500, 500).repeat(4, 0).repeat(4, 1))}) / "large.jpg"
    (tmp_path / "photos").mkdir()
    for number in range(24):  # links to one file that take seconds to decode
        (tmp_path / "photos" / f"{number}.jpg").symlink_to(large)
    output = tmp_path / "out"
    options = [f"--checkpoint={run}", f"--data={tmp_path / 'photos'}", f"--output={output}", *QUICK]
    process = subprocess.Popen([sys.executable, "-m", "fastsimclr.embed", *options])
    deadline = time.monotonic() + 120
    while not (output / "features.npy.partial").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not list(output.glob("features.*y"))
    assert not (output / "embed.json").exists()
    assert main(options) == 0
    assert len(np.load(output / "features.npy")) == 24
    assert not list(output.glob("*.partial"))


def test_interrupt_keeps_existing_files(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = embed(run, tmp_path)[:]
    forward = Encoder.forward
    calls = []

    def interrupted(self: Encoder, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(Encoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([f"--checkpoint={run}", f"--output={tmp_path}", *QUICK, "--images=20", "--force"])
    assert np.array_equal(np.load(tmp_path / "features.npy"), before)
    assert len(read_table(tmp_path)) == 1 + IMAGES
    assert not list(tmp_path.glob("*.partial"))


def test_lack_of_disk_space_is_reported_before_embedding(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("called before the check")

    monkeypatch.setattr("fastsimclr.evaluation.embedding.embed_batches", fail)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # less than the 43,136 bytes needed
    try:
        assert main([f"--checkpoint={run}", f"--output={tmp_path}", *QUICK]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/features.npy, where 43,136 bytes cannot be written (File too large)" in capsys.readouterr().err
    assert not list(tmp_path.glob("features*"))


def test_features_that_are_not_finite_are_a_user_error(
    run: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_encoder(run)
    model.layer4[1].bn2.bias.data[7] = torch.nan
    diverged = save_run(tmp_path, model, f"--data.train={photos}", "--data.image_size=24")
    assert main([f"--checkpoint={diverged}", *QUICK]) == 2
    error = capsys.readouterr().err
    assert f"got features of {photos}/a/000.jpg that are not finite" in error
    assert not list(tmp_path.rglob("features.*"))


def _errors_on_a_rank(rank: int, files: list[list[Path]]) -> list[str]:
    """Return the error, or "", for each list of the ranks' files."""
    errors = []
    for files_of_ranks in files:
        try:
            expect_one_disk(files_of_ranks[rank], World(rank, 2, torch.device("cpu")))
            errors.append("")
        except UserError as error:
            errors.append(str(error))
    return errors


@pytest.mark.slow
def test_ranks_with_different_folders_raise_on_all_ranks(tmp_path: Path) -> None:
    mine, other, missing = (tmp_path / name / "features.npy.partial" for name in ("a", "b", "c"))
    for file in (mine, other):
        file.parent.mkdir()
        file.write_text("as long")
    one, two = run_ranks(2, _errors_on_a_rank, [[mine, mine], [mine, other], [mine, missing]])
    assert one[0] == two[0] == ""
    for rank, place in ((one, "a"), (two, "b")):
        assert f"{tmp_path / place}, which is not the same folder on rank 1" in rank[1]
    assert "on rank 1" in one[2]
    assert "on rank 1" in two[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--checkpoint"]),
        (["--checkpoint=gone.pt", "--output=out"], ["gone.pt: got no such file", "expected a checkpoint"]),
        (["--checkpoint={run}", "--output=out", "--data=nowhere"], ["nowhere: got nothing", "expected a folder"]),
        (["--checkpoint={run}", "--output=out", "--data=."], ["got a folder with no images", "expected files"]),
        (["--checkpoint={foreign}", "--data=digits"], ["--output: got none", "expected a folder"]),
        (["--checkpoint={foreign}", "--output=out"], ["--data: got none", "expected a folder of images"]),
        (["--checkpoint={run}", "--output=out", "--data.image_size=big"], ["--data.image_size: got big", "int"]),
        (["--checkpoint={run}", "--output=out", "--data.mean=0.5"], ["--data.mean"]),
        (["--checkpoint={run}", "--output=out", "--data.center_fraction=2"], ["--data.center_fraction: got 2.0"]),
        (["--checkpoint={run}", "--output=out", "--data.flip_prob=1"], ["--data.flip_prob"]),
        (["--checkpoint={run}", "--output=out", "--format=csv"], ["--format", "csv", "safetensors"]),
        (["--checkpoint={run}", "--output=out", "--images=0"], ["--images: got 0, expected at least 1"]),
        (["--checkpoint={run}", "--output=out", "--gallery=101"], ["--gallery: got 101, expected from 0 to 100"]),
        (["--checkpoint={run}", "--output=out", "--max_bad=2"], ["--max_bad: got 2.0, expected from 0 to 1"]),
        (["--checkpoint={run}", "--output=out", "--device=tpu"], ["--device: got 'tpu'"]),
        (["--checkpoint={run}", "--output=/dev/null/out", "--data=digits"], ["/dev/null/out", "cannot be written"]),
    ],
)
def test_user_error_is_one_line_with_exit_code_2(
    options: list[str],
    words: list[str],
    run: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign = tmp_path_factory.mktemp("foreign") / "resnet.pth"
    torch.save(resnet18().state_dict(), foreign)
    monkeypatch.chdir(tmp_path)
    assert main([option.format(run=run, foreign=foreign) for option in options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsimclr.embed: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert list(tmp_path.iterdir()) == []


# Pictures


def test_command_line_offers_every_map_method() -> None:
    assert tuple(neighbors.METHODS) == MAP_METHODS


def test_map_and_gallery_need_enough_images(
    run: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--map=pca", "--gallery=3"]
    embed(run, tmp_path / "out", *options)
    assert "map.png (PCA), gallery.png; 21 images" in capsys.readouterr().out
    height, width, _ = pixels_of(tmp_path / "out" / "map.png").shape
    assert 900 <= width <= 1200
    assert 500 <= height <= 1100
    height, width, _ = pixels_of(tmp_path / "out" / "gallery.png").shape
    assert 9 * pictures.THUMB < width < 11 * pictures.THUMB
    assert 3 * pictures.THUMB < height < 6 * pictures.THUMB
    embed(run, tmp_path / "few", *options, "--images=9")
    assert "no pictures of only 9 images" in capsys.readouterr().out
    assert not list((tmp_path / "few").glob("*.png"))


def test_nearest_neighbors_match_all_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "features.npy", rng.normal(size=(130, 16)).astype(np.float32))
    features = np.load(tmp_path / "features.npy", mmap_mode="r")
    monkeypatch.setattr(neighbors, "BLOCK_BYTES", 4 * 16 * 3)  # blocks of three rows, fewer than neighbors
    queries = np.array([0, 64, 129])
    cosines, nearest = neighbors.nearest(features, queries, 8)
    unit = features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    all_cosines = unit[queries] @ unit.T
    all_cosines[[0, 1, 2], queries] = -np.inf
    expected = np.argsort(-all_cosines, axis=1)[:, :8]
    assert np.array_equal(nearest, expected)
    np.testing.assert_allclose(cosines, np.take_along_axis(all_cosines, expected, 1), atol=1e-6)
    assert neighbors.nearest(features[:4], np.array([2]), 8)[1].shape == (1, 3)


def test_queries_cover_all_classes() -> None:
    labels = np.repeat([2, 0, 1], [50, 40, 10])
    chosen = neighbors.choose_queries(labels, 5, seed=1)
    assert len(set(chosen.tolist())) == 5
    assert labels[chosen].tolist() == sorted(labels[chosen].tolist())
    assert set(np.bincount(labels[chosen])) == {1, 2}
    assert np.array_equal(chosen, neighbors.choose_queries(labels, 5, seed=1))
    assert not np.array_equal(chosen, neighbors.choose_queries(labels, 5, seed=2))
    assert len(neighbors.choose_queries(np.full(3, -1), 5, seed=0)) == 3


@pytest.mark.parametrize("method", ["umap", "tsne", "pca"])
def test_map_separates_clusters(method: str) -> None:
    if method == "umap" and find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
    features, labels = blobs(classes=3, images=90)
    places = neighbors.project(features, method, seed=0)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    same = labels[:, None] == labels[None]
    assert distances[same].max() < distances[~same].min()
    assert np.array_equal(places, neighbors.project(features, method, seed=0))


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_identical_features_have_a_map(method: str) -> None:
    places = neighbors.project(np.ones((12, 8), np.float32), method, seed=0)
    assert pictures.draw_map("title", [], places, np.full(12, -1), {})[:4] == b"\x89PNG"


def test_auto_uses_umap_if_installed() -> None:
    assert neighbors.choose_method("auto")[0] == ("umap" if find_spec("umap") else "tsne")
    assert neighbors.choose_method("pca") == ("pca", "")


def test_broken_umap_is_reported_and_replaced_by_tsne(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)  # importing it then fails
    monkeypatch.setattr("fastsimclr.evaluation.neighbors.version", lambda package: "0.5")
    embed(run, tmp_path, "--map=auto")
    assert "map.png (t-SNE: umap-learn cannot be imported: import of umap halted" in capsys.readouterr().out
    assert pixels_of(tmp_path / "map.png").ndim == 3
    assert main([f"--checkpoint={run}", f"--output={tmp_path}", *QUICK, "--map=umap", "--force"]) == 2
    assert "--map: got umap, but umap-learn cannot be imported" in capsys.readouterr().err
    assert (tmp_path / "features.npy").is_file(), "features are kept, since they take the time"


def drawn_map(
    tmp_path: Path, places: NDArray[np.float64], labels: list[int], names: dict[int, str]
) -> NDArray[np.uint8]:
    file = tmp_path / "map.png"
    file.write_bytes(pictures.draw_map("title", ["note"], places, np.array(labels), names))
    return pixels_of(file)


def test_points_have_their_positions_and_class_colors(tmp_path: Path) -> None:
    places = np.array([[0.0, 0.0], [4.0, 1.0], [4.0, 0.0], [2.0, 0.5]])
    sheet = drawn_map(tmp_path, places, [0, 1, 2, -1], {0: "zero", 1: "one", 2: "two"}).astype(int)
    plot = sheet[80:, : pictures.MARGIN + pictures.PLOT]  # below the title
    centers = []
    for code in (*pictures.COLORS[:3], pictures.GRAY):
        shade = np.array(rgb(code)) * 0.8 + 255 * 0.2  # points are slightly transparent
        y, x = np.nonzero(np.abs(plot - shade).max(2) < 4)
        centers.append((x.mean(), y.mean()))
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = centers
    assert x1 == pytest.approx(x2, abs=1)
    assert y0 == pytest.approx(y2, abs=1)
    assert y1 < y0, "the y axis points up"
    assert (x1 - x0) == pytest.approx(4 * (y0 - y1), abs=4), "both axes have the same scale"
    assert (x3, y3) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=1)


def test_legend_up_to_20_classes_and_names_in_the_map_above(tmp_path: Path) -> None:
    places, widths = np.random.default_rng(0).uniform(size=(200, 2)), []
    for classes in (2, 20, 21):
        names = {label: f"class {label}" for label in range(classes)}
        sheet = drawn_map(tmp_path, places, (np.arange(200) % classes).tolist(), names)
        widths.append(sheet.shape[1])
        if classes <= 20:
            left = pictures.MARGIN + pictures._fit(places)[1] + 24
            dots = (sheet[:, left : left + 16] < 250).any(axis=(1, 2)).astype(int)
            assert (np.diff(dots) == 1).sum() == classes
    assert min(widths[:2]) > widths[2] + 100


def test_names_in_the_map_do_not_overlap_or_leave_it() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 150
    at = (rng.uniform(50, 850, (150, 2))[labels] + rng.normal(0, 30, (2000, 2))).clip(0, 900)
    names = {label: "abcdefghijkl"[: 3 + label % 10] for label in range(150)}
    medians = {label: np.median(at[labels == label], axis=0) for label in names}
    named = pictures._place_names(medians, labels, names, (900, 900))
    assert len(named) > 100
    boxes = [(x, y, text_width(names[label], weight="bold") / 2) for label, x, y in named]
    for k, (x, y, half) in enumerate(boxes):
        assert half <= x <= 900 - half
        assert 7 <= y <= 893
        assert all(abs(x - u) >= half + w or abs(y - v) >= 14 for u, v, w in boxes[:k])


def test_gallery_shows_each_image_and_frames_other_classes(photos: str, tmp_path: Path) -> None:
    source, augmentation = open_source(photos), Augmentation()
    names = neighbors.class_names(source)
    queries = np.array([0, 20])
    nearest = np.array([[1, 7, 2], [19, 18, 0]])  # seven images of each class a, b, c
    cosines = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]], np.float32)
    file = tmp_path / "gallery.png"
    file.write_bytes(pictures.draw_gallery("title", ["note"], source, augmentation, names, queries, cosines, nearest))
    sheet = pixels_of(file)
    side = pictures.THUMB
    lefts = [pictures.MARGIN + k * (side + GAP) for k in range(4)]
    tops = []
    for row, images in enumerate(np.concatenate([queries[:, None], nearest], axis=1).tolist()):
        for left, image in zip(lefts, images, strict=True):
            strip, thumbnail = sheet[:, left : left + side], pictures.thumbnail(source, image, augmentation)
            top = next(y for y in range(len(strip) - side) if np.array_equal(strip[y : y + side], thumbnail))
            tops.append(top)
            framed = sheet[top + side // 2, left - 2].tolist() == rgb(RED)
            assert framed == (source.labels[image] != source.labels[queries[row]])
    assert len(set(tops[:4])) == len(set(tops[4:])) == 1, "aligned"
    assert tops[4] > tops[0] + side
    assert sheet.shape[1] == lefts[-1] + side + pictures.MARGIN


def test_thumbnail_is_the_encoders_input(tmp_path: Path) -> None:
    image = np.zeros((80, 200, 3), np.uint8)
    image[5:75, 65:135] = 255  # the central 70 of 80
    Image.fromarray(image).save(tmp_path / "square.png")
    source = open_source(str(tmp_path))
    assert pictures.thumbnail(source, 0, Augmentation()).min() == 255
    assert pictures.thumbnail(source, 0, Augmentation(center_fraction=1.0)).min() == 0


def test_map_of_many_images_uses_a_subset(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsimclr.evaluation.embedding.MAX_MAPPED", 12)
    mapped, project = [], neighbors.project

    def recorded(features: NDArray[np.float32], method: str, seed: int) -> NDArray[np.float64]:
        mapped.append(np.array(features))
        return project(features, method, seed)

    monkeypatch.setattr(neighbors, "project", recorded)
    whole = embed(run, tmp_path, "--map=pca")
    assert mapped[0].shape == (12, 512)
    assert all((whole == row).all(1).any() for row in mapped[0])
