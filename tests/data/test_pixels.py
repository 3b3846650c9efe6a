"""Images that are not 8-bit RGB, from the file to the batch."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from pictures import encode, photo, png16_rgb
from PIL import Image
from torch import Tensor

from fastsimclr import Augmentation
from fastsimclr.data import Batch, Source, open_views
from fastsimclr.data.crop import crop
from fastsimclr.data.detect import detect_pixels
from fastsimclr.data.images import decode, decode_raw
from fastsimclr.data.opening import open_source
from fastsimclr.data.orientation import orient
from fastsimclr.data.params import VIEW_PARAMS, sample_params, sample_params_in_numpy
from fastsimclr.data.photometric import photometric
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.pixels import RGB8, PixelFormat, default_format
from fastsimclr.data.scan import scan
from fastsimclr.data.sources import ArraySource, EncodedSource
from fastsimclr.data.statistics import with_statistics
from fastsimclr.errors import UserError

IMAGES = 6
FORMATS = [default_format(1, torch.uint8), PixelFormat(5, torch.uint16, (0, 4095)), default_format(3, torch.float32)]
EVERYTHING = Augmentation(
    image_size=24,
    vertical_flip_prob=0.5,
    rotate90_prob=0.5,
    saturation=0,
    hue=0,
    grayscale_prob=0,
    gain=0.3,
    solarize_prob=0.2,
    channel_drop_prob=0.3,
)
pytestmark = pytest.mark.usefixtures("one_thread")


def arrays(pixels: PixelFormat, sides: tuple[int, int] = (40, 37)) -> list[NDArray]:
    """Photos (H, W, C) of this format, whose channels differ."""
    colors = [photo(*sides, seed)[..., np.arange(pixels.channels) % 3] / 255 for seed in range(IMAGES)]
    scaled = [image ** np.linspace(0.5, 2, pixels.channels) * pixels.value_range[1] for image in colors]
    dtype = str(pixels.dtype).removeprefix("torch.")
    return [image.astype(dtype) for image in scaled]


def array_source(pixels: PixelFormat) -> ArraySource:
    source = ArraySource("array", torch.from_numpy(np.stack(arrays(pixels))), np.arange(IMAGES) % 2, ["a", "b"])
    detect_pixels(source, options(pixels))
    return source


def options(pixels: PixelFormat) -> PixelOptions:
    return PixelOptions(value_range=pixels.value_range)


def npy_folder(folder: Path, images: list[NDArray]) -> str:
    for number, image in enumerate(images):
        np.save(folder / f"{number}.npy", image)
    return str(folder)


def npy(array: NDArray) -> NDArray[np.uint8]:
    file = io.BytesIO()
    np.save(file, array)
    return as_bytes(file.getvalue())


def tiff(array: NDArray, **kwargs: object) -> NDArray[np.uint8]:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **kwargs)
    return as_bytes(file.getvalue())


def as_bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()


def load(data: str | Source, augmentation: Augmentation, **kwargs: object) -> Batch:
    loader = open_views(data, augmentation, IMAGES, **kwargs)
    batch = next(iter(loader))
    loader.close()
    return batch


# Files


def test_npy_and_tiff_keep_their_channels_and_depth() -> None:
    rng = np.random.default_rng(0)
    five = rng.integers(0, 65535, (7, 9, 5), dtype=np.uint16)
    expected = torch.from_numpy(five.transpose(2, 0, 1).copy())
    assert torch.equal(decode_raw(npy(five), "five"), expected)
    assert torch.equal(decode_raw(tiff(five, photometric="minisblack", planarconfig="contig"), "five"), expected)
    planes = five.transpose(2, 0, 1)  # one page per channel
    assert torch.equal(decode_raw(tiff(planes, photometric="minisblack"), "five"), expected)
    assert torch.equal(decode_raw(tiff(planes, photometric="minisblack", byteorder=">"), "five"), expected)
    floats = rng.random((7, 9), dtype=np.float32)
    assert torch.equal(decode_raw(tiff(floats), "floats"), torch.from_numpy(floats)[None])


@pytest.mark.parametrize("orientation", range(2, 9))
def test_tiff_is_upright(orientation: int) -> None:
    pixels = photo(8, 6)
    oriented = tiff(pixels, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    by_exif = encode(Image.fromarray(pixels), "PNG", exif=exif)
    assert torch.equal(decode_raw(oriented, "tiff"), decode_raw(as_bytes(by_exif), "png"))


def test_png_keeps_16_bits_on_request_only() -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint16).reshape(4, 5, 3) * 1000
    data = as_bytes(png16_rgb(pixels))
    kept = decode(data, "16 bits", default_format(3, torch.uint16))
    assert torch.equal(kept, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(decode(data, "16 bits"), torch.from_numpy((pixels >> 8).astype(np.uint8)).permute(2, 0, 1))
    gray = as_bytes(encode(Image.fromarray(pixels[..., 0]), "PNG"))
    assert torch.equal(decode(gray, "gray", default_format(1, torch.uint16)), torch.from_numpy(pixels[None, ..., 0]))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), "shape"),
        (np.zeros((4, 5, 17), np.uint8), "1 to 16 channels"),
        (np.zeros((4, 5), np.float64), "float64"),
        (np.zeros((4, 5), np.int16), "int16"),
    ],
)
def test_other_arrays_are_rejected(array: NDArray, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        decode_raw(npy(array), "array")


def test_bad_values_name_the_image(tmp_path: Path) -> None:
    good = np.full((4, 5), 0.5, np.float32)
    images = [good, good, good.copy(), good * 3, good[:, :, None].repeat(2, 2), good.astype(np.uint8)]
    images[2][1, 1] = np.nan
    source = open_source(npy_folder(tmp_path, images))
    detect_pixels(source, PixelOptions())
    assert isinstance(source, EncodedSource)
    assert scan(source).bad == {
        2: "got values that are NaN or infinite",
        3: "got values from 1.5 to 1.5",
        4: "got 2 channels of float32",
        5: "got 1 channel of uint8",
    }


def test_an_array_out_of_range_is_rejected_when_opened() -> None:
    images = torch.full((3, 4, 4, 1), 0.5)
    images[1, 2, 2] = 7
    source = ArraySource("mine", images, np.zeros(3, np.int64), ["a"])
    with pytest.raises(UserError, match=r"mine\[1\]: got values from 0.5 to 7; expected 0 to 1: set"):
        open_views(source, Augmentation(image_size=4).without_rgb(), 2)


def test_npy_beside_images_is_no_image(tmp_path: Path) -> None:
    Image.fromarray(photo(8, 8)).save(tmp_path / "a.jpg")
    np.save(tmp_path / "a.npy", np.zeros(128))
    assert open_source(str(tmp_path)).key(0) == "a.jpg"


# Options


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            PixelOptions(pixels="uint8"),
            r"--data.pixels: got uint8, but the images are uint16 \(.*0.npy\)",
        ),
        (PixelOptions(channels=3), r"--data.channels: got 3, but the images have 5 channels"),
    ],
)
def test_options_that_contradict_the_images(tmp_path: Path, asked: PixelOptions, message: str) -> None:
    source = open_source(npy_folder(tmp_path, arrays(FORMATS[1])))
    with pytest.raises(UserError, match=message):
        detect_pixels(source, asked)


def test_image_files_are_rgb_unless_asked(tmp_path: Path) -> None:
    Image.fromarray(photo(8, 8)[..., 0]).save(tmp_path / "gray.png")
    for asked, expected in (
        (PixelOptions(), RGB8),
        (PixelOptions(channels=3), RGB8),
        (PixelOptions(channels=1), default_format(1, torch.uint8)),
        (PixelOptions(pixels="uint8"), default_format(1, torch.uint8)),
    ):
        source = open_source(str(tmp_path))
        detect_pixels(source, asked)
        assert source.pixels == expected


def test_color_operations_need_rgb() -> None:
    source = array_source(FORMATS[1])
    with pytest.raises(UserError, match=r"--data.saturation: got 0.8 for images of 5 channels, .* --data.hue 0"):
        open_views(source, Augmentation(image_size=8), 2)
    open_views(source, Augmentation(image_size=8).without_rgb(), 2).close()
    with pytest.raises(UserError, match=r"--data.mean: got 2 numbers for images of 5 channels, expected 5, or auto"):
        open_views(source, Augmentation(mean=(0.5, 0.5), std=(1, 1)).without_rgb(), 2)


def test_statistics_are_those_of_the_pixels() -> None:
    source = array_source(FORMATS[1])
    augmentation, line = with_statistics(Augmentation().without_rgb(), source)
    pixels = source.images.double().flatten(0, 2) / 4095
    torch.testing.assert_close(torch.tensor(augmentation.mean), pixels.mean(0), atol=2e-6, rtol=0, check_dtype=False)
    expected = pixels.std(0, correction=0)
    torch.testing.assert_close(torch.tensor(augmentation.std), expected, atol=2e-6, rtol=0, check_dtype=False)
    assert line is not None
    assert "measured on 6 images, as the images have 5 channels" in line
    rgb, line = with_statistics(Augmentation(), array_source(FORMATS[2]))
    assert (rgb, line) == (Augmentation(), None)


def test_statistics_leave_out_bad_images(tmp_path: Path) -> None:
    images = [np.full((4, 5), value, np.float32) for value in (0.25, 0.75, 0.5)]
    folder = npy_folder(tmp_path, images)
    source = open_source(folder)
    detect_pixels(source, PixelOptions())
    augmentation = Augmentation(mean="auto", std=(1,)).without_rgb()
    whole, _ = with_statistics(augmentation, source)
    (tmp_path / "2.npy").write_bytes(b"bad")
    found, line = with_statistics(augmentation, source)
    assert found.mean == whole.mean == (0.5,)
    assert line is not None
    assert "measured on 2 images" in line
    source.bad = {0: "known to be bad"}
    assert with_statistics(augmentation, source)[0].mean == (0.75,)
    source.bad = {0: "known to be bad", 1: "too"}
    with pytest.raises(UserError, match="got 3 images to measure mean and std on, none of which can be used"):
        with_statistics(augmentation, source)


def test_a_constant_channel_has_no_auto_std() -> None:
    source = ArraySource("flat", torch.full((2, 4, 4, 2), 9, dtype=torch.uint8), np.zeros(2, np.int64), ["a"])
    with pytest.raises(UserError, match=r"--data.std: got auto, but channel 0 has the same value in all 2 images"):
        with_statistics(Augmentation().without_rgb(), source)


# Params


def test_new_operations_leave_the_other_params_unchanged() -> None:
    index, sizes = np.arange(50), np.tile([40, 37], (50, 1))
    before = sample_params(Augmentation(), 3, 1, index, 0, sizes)
    recipe = Augmentation(vertical_flip_prob=0.5, rotate90_prob=0.75, gain=0.3, channel_drop_prob=0.5)
    after = sample_params(recipe, 3, 1, index, 0, sizes)
    new = ("gain", "vertical_flip", "quarter_turns", "dropped")
    for name in VIEW_PARAMS.names or ():
        assert (before[name] == after[name]).all() == (name not in new)


def test_numpy_and_compiled_sample_the_same() -> None:
    index, sizes = np.arange(200), np.tile([40, 37], (200, 1))
    recipe = Augmentation(
        vertical_flip_prob=0.5, rotate90_prob=0.75, gain=1.5, channel_drop_prob=0.5, mean=(0.5,) * 5, std=(1.0,) * 5
    )
    params = sample_params(recipe, 3, 1, index, 0, sizes)
    expected = sample_params_in_numpy(recipe, 3, 1, index, 0, sizes)
    for name in ("gain", "vertical_flip", "quarter_turns", "dropped"):
        np.testing.assert_array_equal(params[name], expected[name])
    assert set(params["quarter_turns"]) == {0, 1, 2, 3}
    assert set(params["dropped"]) == {0, 1, 2, 3, 4, 5}
    assert params["gain"].min() >= 0
    assert params["gain"].max() <= 2.5
    assert params["gain"].std() > 0.5


def test_orientation_is_flip_then_turns() -> None:
    crops = torch.arange(8 * 3 * 3 * 2).view(8, 3, 3, 2).float()
    params = np.zeros(8, VIEW_PARAMS)
    params["vertical_flip"], params["quarter_turns"] = np.arange(8) >= 4, np.arange(8) % 4
    for upright, turned, n in zip(crops, orient(crops, params, Augmentation(rotate90_prob=0.5)), range(8), strict=True):
        assert torch.equal(turned, torch.rot90(upright.flip(0) if n >= 4 else upright, n % 4))
    assert orient(crops, params, Augmentation()) is crops


# Loaders


@pytest.mark.parametrize("pixels", FORMATS, ids=str)
def test_all_loaders_are_equal(pixels: PixelFormat, tmp_path: Path) -> None:
    augmentation, _ = with_statistics(EVERYTHING, array_source(pixels))
    std = torch.tensor(augmentation.std).view(-1, 1, 1)
    folder = npy_folder(tmp_path, arrays(pixels))
    expected = load(array_source(pixels), augmentation, backend="memory")
    for data in (folder, array_source(pixels)):
        for backend, workers in (("torchvision", 0), ("dali", 1)):
            batch = load(data, augmentation, backend=backend, workers=workers, pixels=options(pixels))
            assert torch.equal(batch.index, expected.index)
            for view, other in zip(batch.views, expected.views, strict=True):
                assert view.shape == (IMAGES, pixels.channels, 24, 24)
                assert view.is_contiguous(memory_format=torch.channels_last)
                difference = ((view - other) * std).abs()  # as a fraction of the value range
                # DALI pads crops that it enlarges differently, also those of 8-bit RGB.
                if backend == "dali":
                    assert difference.mean() < 2e-3
                else:
                    assert difference.max() < 1e-4


def test_values_are_not_rounded_to_8_bits(tmp_path: Path) -> None:
    """Values between two levels of 255 remain apart."""
    images = [np.full((9, 9, 2), value, np.uint16) for value in (30000, 30010, 30020, 30030, 30040, 30050)]
    plain = Augmentation(image_size=9, mean=(0.0, 0.0), std=(1.0, 1.0)).for_evaluation()
    folder = npy_folder(tmp_path, images)
    for backend in ("torchvision", "dali", "memory"):
        view = load(folder, plain, backend=backend, shuffle=False, workers=0 if backend != "dali" else 1).views[0]
        torch.testing.assert_close(view[:, 0, 4, 4] * 65535, torch.arange(30000.0, 30060, 10), atol=0.2, rtol=0)


def test_float_rgb_has_the_views_of_8_bit_rgb() -> None:
    """The float operations are those on levels, up to their rounding after every operation."""
    levels = torch.from_numpy(np.stack(arrays(RGB8)))
    recipe = Augmentation(image_size=24, solarize_prob=0)
    labels = np.zeros(IMAGES, np.int64)
    expected = load(ArraySource("levels", levels, labels, ["a"]), recipe)
    batch = load(ArraySource("floats", levels.float() / 255, labels, ["a"]), recipe)
    for view, other in zip(batch.views, expected.views, strict=True):
        error: Tensor = ((view - other) * torch.tensor(recipe.std).view(-1, 1, 1)).abs() * 255
        assert error.mean() < 2
        assert error.quantile(0.99) < 8  # levels; hue is sensitive to rounding near gray


# The compiled operations


@pytest.mark.parametrize("pixels", [*FORMATS, default_format(16, torch.uint16), RGB8], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_compiled_crops_are_those_of_pytorch(pixels: PixelFormat, interpolation: str) -> None:
    if pixels == RGB8:
        pixels = PixelFormat(value_range=(0, 200))
    images = torch.from_numpy(np.stack(arrays(pixels)))
    index, recipe = np.array([5, 0, 3, 3, 1]), replace(EVERYTHING, interpolation=interpolation)
    for size in (24, 60):  # shrinks and enlarges the crops of 40 by 37 pixels
        sized = replace(recipe, image_size=size)
        params = sample_params(sized, 0, 0, index, 0, np.tile([40, 37], (5, 1)))
        expected = crop(images, index, params, sized, "pytorch", pixels=pixels)
        torch.testing.assert_close(crop(images, index, params, sized, "compiled", pixels=pixels), expected)


@pytest.mark.parametrize("channels", [1, 3, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_colors_are_those_of_pytorch(channels: int, dtype: torch.dtype) -> None:
    # 50x41: more pixels than one strip of the CPU implementation, and rows that are no multiple of a vector
    crops = torch.rand(24, 50, 41, channels, generator=torch.Generator().manual_seed(channels))
    recipe = replace(EVERYTHING, image_size=50, mean=(0.4,) * channels, std=(0.3,) * channels)
    if channels == 3:
        recipe = replace(recipe, saturation=0.8, hue=0.2, grayscale_prob=0.3)
    params = sample_params(recipe, 0, 0, np.arange(24), 0, np.tile([50, 41], (24, 1)))
    views = photometric(crops, params, recipe, dtype, "compiled")
    expected = photometric(crops, params, recipe, torch.float32, "pytorch")
    assert (views.dtype, views.shape) == (dtype, (24, channels, 50, 41))
    # The compiled blur omits weights beyond four standard deviations, 6e-5 in total.
    tolerance = 6e-4 + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(views.float(), expected, rtol=tolerance, atol=tolerance)


def test_gain_and_drop_on_8_bit_rgb() -> None:
    crops = torch.from_numpy(np.stack(arrays(RGB8, (24, 24))))
    recipe = replace(Augmentation(image_size=24).without_color(), gain=0.5, channel_drop_prob=0.5)
    params = sample_params(recipe, 0, 0, np.arange(IMAGES), 0, np.tile([24, 24], (IMAGES, 1)))
    views = photometric(crops, params, recipe)
    mean, std = (torch.tensor(n).view(-1, 1, 1) for n in recipe.statistics)
    gain = torch.from_numpy(params["gain"][:, :3, None, None].copy())
    expected = ((crops.permute(0, 3, 1, 2) / 255 * gain).clamp(0, 1) - mean) / std
    for row, channel in enumerate(params["dropped"].astype(int)):
        expected[row, channel - 1 : channel or None] *= 0 if channel else 1
    assert params["dropped"].any()
    torch.testing.assert_close(views, expected, rtol=1e-5, atol=1e-5)
