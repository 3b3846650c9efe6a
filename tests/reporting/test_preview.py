"""python -m fastsimclr.preview: the sheet shows the loader's own pixels, and under them what was drawn."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import broken, photo, photo_folder, write
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from fastsimclr import Augmentation, open_views
from fastsimclr.config import parse, to_yaml
from fastsimclr.data.params import VIEW_PARAMS
from fastsimclr.data.photometric import photometric
from fastsimclr.data.torchvision import crop
from fastsimclr.preview import main
from fastsimclr.reporting.contact_sheet import GAP, MARGIN, TAG, Page, fitted, text_width, wrapped
from fastsimclr.reporting.preview import (
    TEXT_WIDTH,
    Row,
    describe_augmentation,
    describe_params,
    draw_sheet,
    first_batch,
    to_levels,
)

IMAGES = 7
BACKENDS = ["torchvision", "dali"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(photo_folder(tmp_path_factory.mktemp("photos"), IMAGES))


def drawn(**values: object) -> np.void:
    """Parameters of an unflipped crop without color changes, except for `values`."""
    one = np.zeros(1, VIEW_PARAMS)
    one["box"], one["factors"], one["order"] = (30, 12, 98, 120), (1.21, 0.8, 1.1, 0.04), (3, 0, 2, 1)
    for name, value in values.items():
        one[name] = value
    return one[0]


def rows_of(
    data: str, augmentation: Augmentation, *, backend: str = "auto", images: int = 3, seed: int = 0
) -> list[Row]:
    loader = open_views(data, augmentation, images, backend=backend, seed=seed, workers=0)
    try:
        return first_batch(loader, seed, 0)
    finally:
        loader.close()


def pixels_of(file: Path | bytes) -> NDArray[np.uint8]:
    with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def where(part: NDArray[np.uint8], whole: NDArray[np.uint8], left: int) -> int:
    """The top of `part` in the columns of `whole` from `left` on; -1 if it is not there."""
    height, width = part.shape[:2]
    strip = whole[:, left : left + width]
    return next((y for y in range(len(strip) - height + 1) if np.array_equal(strip[y : y + height], part)), -1)


# What is said


def test_the_words_are_those_of_the_draw() -> None:
    assert describe_params(drawn(), Augmentation()) == [["120×98 at 12,30"], ["no jitter"], []]
    everything = drawn(flip=True, jitter=True, grayscale=True, sigma=1.34, solarize=True)
    assert describe_params(everything, Augmentation()) == [
        ["120×98 at 12,30", "flipped"],
        ["hue +0.04", "brightness ×1.21", "saturation ×1.10", "contrast ×0.80"],  # in the order applied
        ["grayscale", "blur σ 1.3", "solarized"],
    ]


def test_what_a_recipe_never_changes_is_not_named() -> None:
    no_color = Augmentation(saturation=0.0, hue=0.0)
    assert describe_params(drawn(jitter=True), no_color)[1] == ["brightness ×1.21", "contrast ×0.80"]
    assert describe_params(drawn(), Augmentation(jitter_prob=0.0))[1] == []


def test_the_recipe_is_described_by_its_values() -> None:
    phrases = describe_augmentation(
        Augmentation(image_size=96, scale=(0.2, 1.0), flip_prob=0.0, blur_prob=0.25, blur_sigma=(0.1, 1.5))
    )
    assert phrases[0] == "crop of 0.2–1 of the area, aspect ratio 0.75–1.33, bicubic to 96×96"
    assert {"no flip", "blur 0.25 (σ 0.1–1.5)", "no solarize"} < set(phrases)
    assert describe_augmentation(Augmentation().for_evaluation())[0] == "crop of the central 0.875, bicubic to 224×224"


def test_lines_are_as_wide_as_they_may_be_and_break_between_phrases() -> None:
    phrases = [f"contrast ×{k}.00" for k in range(9)]
    lines = wrapped(phrases, 230)
    assert ", ".join(phrases) == " ".join(lines)
    assert len(lines) == 5  # two on a line
    assert max(map(text_width, lines)) <= 230
    assert fitted("photos/train/daisy/0001.jpg", 100) == "…/0001.jpg"
    assert fitted("a.tar: daisy/0001.jpg", 110) == "…daisy/0001.jpg"
    assert text_width(fitted("w" * 100, 50)) <= 50


# What is shown


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_views_are_the_crops_of_the_boxes_where_no_colour_changes(photos: str, backend: str) -> None:
    recipe = Augmentation(image_size=40, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0)
    for row in rows_of(photos, recipe, backend=backend):
        for view, sample_params in zip(row.views, row.params, strict=True):
            image = torch.from_numpy(row.original).permute(2, 0, 1)
            piece = TF.resized_crop(
                image, *sample_params["box"].tolist(), [40, 40], InterpolationMode.BICUBIC, antialias=True
            )
            piece = TF.horizontal_flip(piece) if sample_params["flip"] else piece
            off = np.abs(piece.permute(1, 2, 0).numpy().astype(int) - view)
            assert off.max() == 0 if backend == "torchvision" else off.mean() < 1.5  # DALI resamples in its own way


def test_the_draws_are_those_that_the_views_were_made_by(photos: str) -> None:
    recipe = Augmentation(image_size=32, solarize_prob=0.3)
    for row in rows_of(photos, recipe, backend="torchvision", images=IMAGES, seed=5):
        for view, sample_params in zip(row.views, row.params, strict=True):
            params = np.array([sample_params])
            made = crop(torch.from_numpy(row.original).permute(2, 0, 1), recipe, params)
            again = to_levels(photometric(made[None], params, recipe)[0], recipe)
            assert np.array_equal(again, view)


def test_levels_survive_normalisation() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    recipe = Augmentation()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    assert np.array_equal(to_levels((levels / 255 - mean) / std, recipe), levels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sheet_holds_every_pixel_of_every_view(photos: str, backend: str) -> None:
    small = {"image_size": 20, "scale": (0.05, 0.2)}
    recipe = Augmentation(image_size=48, num_views=4, per_view=({}, {"solarize_prob": 1.0}, small, small))
    rows = rows_of(photos, recipe, backend=backend)
    assert [view.shape for view in rows[0].views] == [(48, 48, 3)] * 2 + [(20, 20, 3)] * 2
    png, (width, height) = draw_sheet("title", [["a note"]], rows, recipe)
    sheet = pixels_of(png)
    assert sheet.shape == (height, width, 3)
    for view in range(4):
        left = width - MARGIN + GAP - (4 - view) * (TEXT_WIDTH + GAP)  # all are as wide as their text
        tops = [where(row.views[view].repeat(4, 0).repeat(4, 1), sheet, left) for row in rows]  # 224 // 48 = 4
        assert tops[0] > MARGIN
        assert tops == sorted(set(tops))


def test_a_crop_is_outlined_in_its_place() -> None:
    page = Page()
    page.image(10, 10, np.zeros((100, 100, 3), np.uint8))
    page.crops(10, 10, [np.array([20.0, 30.0, 60.0, 40.0])])  # top, left, height, width
    red = (pixels_of(page.png(120, 120)).astype(int) @ [1, -1, 0]) > 100
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((30, 90, 40, 80), abs=1.5)


def test_crops_that_coincide_still_have_their_numbers_side_by_side() -> None:
    page = Page()
    page.crops(0, 0, [np.array([0.0, 0.0, 5.0, 5.0])] * 8)
    places = [text.get_position()[0] for text in page.axes.texts]
    assert len(places) == 8
    assert np.diff(places).min() >= TAG


# The command line


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_writes_a_sheet_and_says_so(
    photos: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "sheet.png"
    options = ["--data", photos, "--data.image_size", "32", "--images=50", "--backend", backend]
    assert main([*options, "--output", str(output)]) == 0
    height, width, _ = pixels_of(output).shape
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for words in (f"{output}: {width}x{height} pixels", f"{IMAGES} images of {photos}, 2 views", f"by {backend} (as"):
        assert words in said
    assert width > 3 * 220  # a column for the image and for each view
    assert height > IMAGES * 224


def test_without_options_it_shows_the_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--images=2"]) == 0
    assert (tmp_path / "preview.png").is_file()
    assert "2 images of digits, 2 views each; loaded by memory" in capsys.readouterr().out


def test_a_runs_configuration_gives_data_recipe_and_seed(photos: str, tmp_path: Path) -> None:
    recipe = ["--config=cifar10", f"--data.train={photos}", "--data.num_views=3", "--seed=4"]
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(parse(recipe)))
    for name, options in (("file", [f"--config={config}"]), ("line", [*recipe, "--data.image_size=32"])):
        assert main([*options, "--images=2", f"--output={tmp_path / name}.png"]) == 0
    file, line = (pixels_of(tmp_path / f"{name}.png") for name in ("file", "line"))
    assert file.shape[1] == line.shape[1] > 4 * 220
    assert np.array_equal(file[-200:], line[-200:])  # below the title, which names the recipe


def test_unshuffled_images_stay_from_epoch_to_epoch_and_their_views_do_not(photos: str, tmp_path: Path) -> None:
    options = ["--data", photos, "--data.image_size=32", "--images=1", "--unshuffled"]
    sheets = []
    for epoch in (0, 1):
        assert main([*options, f"--epoch={epoch}", f"--output={tmp_path / str(epoch)}.png"]) == 0
        sheets.append(pixels_of(tmp_path / f"{epoch}.png"))
    first, second = (sheet[-200:] for sheet in sheets)
    assert not np.array_equal(first[:, 300:], second[:, 300:])


def test_a_name_of_any_characters_is_drawn(tmp_path: Path) -> None:
    for name in ("$x^2$ {.png", "日本.png", "w" * 200 + ".png"):
        Image.fromarray(photo(30, 400)).save(tmp_path / name)
    assert main(["--data", str(tmp_path), "--data.image_size=16", f"--output={tmp_path / 'sheet.png'}"]) == 0


def test_a_file_is_overwritten_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sheet.png"
    output.write_text("dear")
    assert main(["--images=1", "--output", str(output)]) == 2
    assert output.read_text() == "dear"
    assert "--force" in capsys.readouterr().err
    assert main(["--images=1", "--output", str(output), "--force"]) == 0
    assert pixels_of(output).ndim == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data=nowhere"], ["nowhere: got nothing", "expected a folder"]),
        (["nowhere"], ["got nowhere", "--data nowhere"]),
        (["--data=digits", "--backend=dalli"], ["dalli", "torchvision"]),
        (["--config=mine"], ["--config: got 'mine'", "preset"]),
        (["--images=0"], ["--images: got 0", "1 to"]),
        (["--images=many"], ["--images", "many"]),
        (["--epoch=-1"], ["--epoch: got -1"]),
        (["--data.image_size=big"], ["--data.image_size: got big", "int"]),
        (["--data.hue=0.7"], ["--data.hue: got 0.7"]),
        (["--batch_size=8"], ["--batch_size", "--data.*"]),
        (["--output=sheet.jpg"], ["sheet.jpg", ".png"]),
        (["--images=1", "--output=/dev/null/sheet.png"], ["/dev/null/sheet.png", "cannot be written"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    options: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsimclr.preview: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_does_not_decode_is_named(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "photos", {"half.jpg": broken()["half.jpg"]})
    output = tmp_path / "sheet.png"
    assert main(["--data", str(folder), "--backend", backend, "--output", str(output)]) == 2
    assert "half.jpg" in capsys.readouterr().err
    assert not output.exists()


def test_it_shows_three_channels_of_other_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(2):
        np.save(tmp_path / f"data/{number}.npy", rng.integers(0, 65536, (40, 40, 5)).astype(np.uint16))
    whole = Augmentation(image_size=40, center_fraction=1.0).for_evaluation()
    loader = open_views(str(tmp_path / "data"), whole, 2, workers=0, shuffle=False)
    rows = first_batch(loader, 0, 0, (4, 2, 0))
    for number, row in enumerate(rows):
        image = np.load(tmp_path / f"data/{number}.npy")[..., [4, 2, 0]]
        np.testing.assert_array_equal(row.original, (image / 65535 * 255).round())
        np.testing.assert_allclose(row.views[0].astype(int), row.original.astype(int), atol=1)
    options = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "x.png"), "--show_channels", "0,1,5"]
    assert main(options) == 2
