"""Depths and sizes of files: converted by the stated rule or refused by name, and refused before they take memory."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from pictures import ORIENTATIONS, encode, exif, kinds, photo, png16_rgb
from PIL import Image

from fastsimclr.data.dataset import open_pair
from fastsimclr.data.detect import detect_pixels
from fastsimclr.data.images import decode, decode_raw
from fastsimclr.data.opening import open_source
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.sources import decoded
from fastsimclr.distributed import SINGLE_PROCESS
from fastsimclr.errors import UserError

FILES = kinds()
RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
PHOTO = photo(20, 30)


def tiff(array: NDArray, **options: object) -> NDArray[np.uint8]:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def by_pillow(image: Image.Image, kind: str, **options: object) -> NDArray[np.uint8]:
    return np.frombuffer(encode(image, kind, **options), np.uint8).copy()


def pfm(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    header = f"Pf\n{array.shape[1]} {array.shape[0]}\n-1.0\n".encode()
    return np.frombuffer(header + array[::-1].tobytes(), np.uint8).copy()


@pytest.mark.parametrize("byteorder", "<>")
def test_sixteen_bits_become_the_upper_eight(byteorder: str) -> None:
    deep = RAMP.astype(np.uint16) * 256 + 255
    for data in (tiff(deep, byteorder=byteorder), tiff(65535 - deep, photometric="miniswhite", byteorder="<")):
        assert (decode(data, "gray") == torch.from_numpy(RAMP)).all()
        np.testing.assert_array_equal(decode_raw(data, "gray")[0].numpy(), deep)
    inverted = tiff(255 - RAMP, photometric="miniswhite", byteorder=byteorder)
    assert (decode(inverted, "gray") == torch.from_numpy(RAMP)).all()
    assert torch.equal(decode_raw(inverted, "gray")[0], torch.from_numpy(RAMP))


def test_depths_that_are_refused_as_rgb() -> None:
    unit = (RAMP / 255).astype(np.float32)
    for data, found in (
        (tiff(RAMP.astype(np.int32)), "signed or 32-bit integers"),
        (tiff(RAMP.astype(np.uint32)), "signed or 32-bit integers"),
        (tiff(RAMP.astype(np.int16)), "signed or 32-bit integers"),
        (tiff(unit), "pixels of float32, expected 8 or 16 bits: set --data.pixels float32"),
        (pfm(unit), "pixels of float32"),
    ):
        with pytest.raises(UserError, match=f"^deep: got .*{found}"):
            decode(data, "deep")
    for data in (tiff(unit), pfm(unit)):
        np.testing.assert_array_equal(decode_raw(data, "floats")[0].numpy(), unit)
    with pytest.raises(UserError, match="pixels of int32, expected uint8, uint16, float32"):
        decode_raw(tiff(RAMP.astype(np.int32)), "integers")
    with pytest.raises(UserError, match="floats of which 0 is white"):
        decode_raw(tiff(unit, photometric="miniswhite"), "inverted")


def test_palettes_and_few_bits_of_tiff() -> None:
    palette = by_pillow(Image.fromarray(PHOTO).quantize(64), "TIFF")
    assert torch.equal(decode_raw(palette, "palette"), decode(palette, "palette"))
    with pytest.raises(UserError, match="pixels of bool"):
        decode_raw(by_pillow(Image.fromarray(RAMP > 99), "TIFF"), "bits")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_format_is_upright(kind: str, orientation: int) -> None:
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    upright = decode(by_pillow(Image.fromarray(PHOTO), kind, **options), "upright")
    turned = decode(by_pillow(Image.fromarray(PHOTO), kind, exif=exif(orientation), **options), "turned")
    expected = {
        2: upright.flip(2),
        3: upright.flip(1, 2),
        4: upright.flip(1),
        5: upright.transpose(1, 2),
        6: upright.transpose(1, 2).flip(2),
        7: upright.transpose(1, 2).flip(1, 2),
        8: upright.transpose(1, 2).flip(1),
    }
    assert torch.equal(turned, expected[orientation])


def test_orientation_of_xmp_does_not_count() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for kind in ("TIFF", "PNG", "JPEG", "WEBP"):
        options = {"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp} if kind != "PNG" else {}
        assert decode(by_pillow(Image.fromarray(PHOTO), kind, **options), "xmp").shape == (3, 20, 30)


# Sizes


def bomb_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that claim to be large."""
    webp = encode(Image.fromarray(PHOTO), "WEBP", exif=exif(1))
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)})
    bands = io.BytesIO()
    np.lib.format.write_array_header_1_0(bands, {"descr": "|u1", "fortran_order": False, "shape": (9000, 9000, 16)})
    jpeg = bytearray(encode(Image.fromarray(PHOTO), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    sizes = {256: 60_000, 257: 60_000}
    tif = bytearray(encode(Image.fromarray(PHOTO), "TIFF", compression="tiff_deflate"))
    for number in range(struct.unpack_from("<H", tif, at := struct.unpack_from("<I", tif, 4)[0])[0]):
        tag = struct.unpack_from("<H", tif, at + 2 + 12 * number)[0]
        if tag in sizes:
            struct.pack_into("<HHII", tif, at + 2 + 12 * number, tag, 4, 1, sizes[tag])
    return {
        "bomb.png": bomb_png(30_000),
        "bomb.webp": webp[:24] + b"\xff\xff\x00\xff\xff\x00" + webp[30:],
        "bomb.npy": out.getvalue(),
        "bands.npy": bands.getvalue(),
        "bomb.jpg": bytes(jpeg),
        "bomb.tif": bytes(tif),
        "bomb.bmp": encode(Image.fromarray(PHOTO), "BMP").replace(struct.pack("<ii", 30, 20), b"\0\0\1\0" * 2),
        "bomb.ppm": b"P6\n60000 60000\n255\n" + bytes(99),
        "bomb.gif": b"GIF89a\xff\xff\xff\xff" + encode(Image.fromarray(PHOTO).quantize(8), "GIF")[10:],
    }


def test_bombs_are_refused_by_their_header() -> None:
    for name, data in bombs().items():
        with pytest.raises(
            UserError, match=rf"^{name}: got \d+ x \d+.* pixels, expected at most 200000000: raise --data"
        ):
            decode(np.frombuffer(data, np.uint8).copy(), name)


def test_a_false_shape_of_an_array_allocates_nothing() -> None:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (10_000, 10_000)})
    with pytest.raises(UserError, match=r"an array of shape \(10000, 10000\) in 3 bytes"):
        decode_raw(np.frombuffer(out.getvalue() + b"abc", np.uint8), "false.npy")


def test_max_pixels_is_an_option(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    detect_pixels(source, PixelOptions(max_pixels=600))
    assert decoded(source, 0).shape == (3, 20, 30)
    detect_pixels(source, PixelOptions(max_pixels=599))
    with pytest.raises(UserError, match=r"a\.png: got 20 x 30 = 600 pixels, expected at most 599"):
        decoded(source, 0)
    with pytest.raises(UserError, match=r"--data\.max_pixels: got 0, expected at least 1"):
        PixelOptions(max_pixels=0)


def test_pages_and_bands_count_as_pixels() -> None:
    data = tiff(np.zeros((5, 20, 30), np.uint8), photometric="minisblack")
    assert decode_raw(data, "pages", max_pixels=3000).shape == (5, 20, 30)
    with pytest.raises(UserError, match="got 20 x 30 x 5 = 3000 pixels, expected at most 2999"):
        decode_raw(data, "pages", max_pixels=2999)


@pytest.mark.parametrize("name", FILES)
def test_the_limit_of_pillow_neither_warns_nor_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.frombuffer(FILES[name], np.uint8).copy()
    expected = decode(data, name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert torch.equal(decode(data, name), expected)
    assert Image.MAX_IMAGE_PIXELS == 1


def test_a_note_says_that_16_bits_become_8(tmp_path: Path) -> None:
    pixels = np.zeros((4, 5, 3), np.uint16)
    (tmp_path / "a.png").write_bytes(png16_rgb(pixels))
    for options, noted in (
        (PixelOptions(), True),
        (PixelOptions(pixels="uint16"), False),
        (PixelOptions(pixels="uint8", channels=3), False),  # asked for
    ):
        source = open_source(str(tmp_path))
        detect_pixels(source, options)
        assert [("a.png has 16 bits" in note, "--data.pixels uint16" in note) for note in source.notes] == (
            [(True, True)] if noted else []
        )


def test_the_note_is_printed_when_a_run_opens_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png16_rgb(np.zeros((4, 5, 3), np.uint16)))
    open_pair(str(tmp_path), None, SINGLE_PROCESS)
    printed = "".join(capsys.readouterr())
    assert printed.count("a.png has 16 bits per channel: as 8-bit RGB, images keep the upper 8 of 16 bits") == 1
