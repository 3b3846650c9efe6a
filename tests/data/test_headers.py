"""Headers: format, size and orientation of every kind of file, also where EXIF is unusual; garbage raises UserError."""

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import ORIENTATIONS, encode, exif, jpeg, kinds, photo
from PIL import Image

from fastsimclr.data.headers import Header, is_regular_jpeg, read_header
from fastsimclr.data.images import decode
from fastsimclr.errors import UserError

FILES = kinds()
PHOTO = photo(20, 30)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x/>"


def header(data: bytes) -> Header:
    return read_header(np.frombuffer(data, np.uint8), "file")


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff_of(value: int, order: str = "<", kind: str = "H") -> bytes:
    """EXIF data with one tag, the orientation."""
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 1)
    tag = struct.pack(order + "HHI" + kind, 274, {"H": 3, "I": 4}[kind], 1, value)
    return head + tag.ljust(12, b"\0") + bytes(4)


@pytest.mark.parametrize("name", FILES)
def test_size_is_that_of_the_decoded_image(name: str) -> None:
    data = np.frombuffer(FILES[name], np.uint8).copy()
    found = read_header(data, name)
    assert found.upright_size == tuple(decode(data, name).shape[1:])
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "gif": "GIF"}
    assert found.format == kind.get(name.split(".")[1], "PPM")


def test_size_of_arrays_avif_and_bigtiff() -> None:
    out = io.BytesIO()
    np.save(out, np.zeros((20, 30, 5), np.float32))
    assert header(out.getvalue()) == Header("NPY", 20, 30, bands=5)
    turned = header(encode(Image.fromarray(PHOTO), "AVIF", exif=exif(6)))
    assert turned == Header("AVIF", 20, 30, 6)
    assert turned.upright_size == (30, 20)
    big = header(encode(Image.fromarray(PHOTO), "TIFF", big_tiff=True, exif=exif(5)))
    assert big == Header("TIFF", 20, 30, 5)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", "HI")
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_of_either_type_and_byte_order(order: str, kind: str, orientation: int) -> None:
    tiff = tiff_of(orientation, order, kind)
    plain = {name: encode(Image.fromarray(PHOTO), name) for name in ("JPEG", "PNG")}
    app1 = segment(0xE1, b"Exif\0\0" + tiff)
    start = plain["JPEG"].index(b"\xff\xdb")
    assert header(plain["JPEG"][:start] + app1 + plain["JPEG"][start:]).orientation == orientation
    # After XMP, as phones write it; and after the frame header, just before the scan.
    for at, before in ((2, segment(0xE1, XMP)), (plain["JPEG"].index(b"\xff\xda"), b"")):
        assert header(plain["JPEG"][:at] + before + app1 + plain["JPEG"][at:]).orientation == orientation
    png = plain["PNG"]
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5 << 20)))
    for at in (33, len(png) - 12):  # before and after the pixels
        assert header(png[:at] + text + chunk(b"eXIf", tiff) + png[at:]) == Header("PNG", 20, 30, orientation)
    for prefix in (b"", b"Exif\0\0"):
        webp = encode(Image.fromarray(PHOTO), "WEBP", exif=prefix + tiff)
        assert header(webp) == Header("WEBP", 20, 30, orientation)


def test_invalid_orientations_are_upright() -> None:
    for value in (0, 9, 65535):
        assert header(jpeg(PHOTO, exif=b"Exif\0\0" + tiff_of(value))) == Header("JPEG", 20, 30)
    for damaged in (
        b"",
        b"II",
        b"XX*\0" + bytes(30),
        tiff_of(6)[:12],
        b"II*\0\xff\xff\xff\xff",
        b"MM\0+" + b"\xff" * 30,
    ):
        assert header(jpeg(PHOTO, exif=b"Exif\0\0" + damaged)).orientation == 1


def test_animated_webp() -> None:
    frames = [Image.fromarray(photo(20, 30, seed=seed)) for seed in (0, 1)]
    animation = header(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert animation == Header("WEBP", 20, 30, is_animated=True)


@pytest.mark.parametrize("name", ["rgb.jpg", "exif6.jpg", "rgb.png", "exif6.webp", "lossy.webp", "rgb.tif", "rgb.bmp"])
def test_truncated_at_any_length_and_garbage(name: str) -> None:
    whole = FILES[name]
    for length in range(0, min(len(whole), 700)):
        expect_size_or_error(whole[:length])
        expect_size_or_error(whole[:length] + b"\xff" * 200)  # lengths and offsets far outside of the file
        expect_size_or_error(whole[:length] + bytes(200))


def test_random_bytes_after_each_signature() -> None:
    rng = np.random.default_rng(0)
    starts = {FILES[name][:length] for name in FILES for length in (2, 4, 12, 16, 20)} | {b"", b"\x93NUMPY\x01\0"}
    for start in sorted(starts):
        for _ in range(20):
            expect_size_or_error(start + rng.bytes(rng.integers(400)))


def test_a_long_file_of_tiny_segments_ends() -> None:
    with pytest.raises(UserError, match="a JPEG without a frame"):
        header(b"\xff\xd8" + segment(0xE0, b"") * 50_000)
    with pytest.raises(UserError, match="a JPEG without a frame"):
        header(b"\xff\xd8\xff" + b"\xff\0" * 100_000)


def test_check_pixels() -> None:
    image = Header("PNG", 30_000, 20_000)
    image.check_pixels(600_000_000, "large.png")
    with pytest.raises(
        UserError, match=r"^large\.png: got 30000 x 20000 = 600000000 pixels, expected at most 599999999"
    ):
        image.check_pixels(599_999_999, "large.png")


def expect_size_or_error(data: bytes) -> None:
    values: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    try:
        found = read_header(values, "damaged")
    except UserError as error:
        assert str(error).startswith(f"damaged: got {len(data)} bytes that do not decode as an image (")  # noqa: PT017
        return
    assert found.height >= 1
    assert found.width >= 1
    assert 1 <= found.orientation <= 8


def test_regular_jpegs_have_a_header_without_faults() -> None:
    image = Image.fromarray(photo(24, 30))
    progressive = io.BytesIO()
    image.save(progressive, "JPEG", progressive=True)
    cmyk = io.BytesIO()
    image.convert("CMYK").save(cmyk, "JPEG")
    plain = jpeg(photo(24, 30))
    frame, scan = plain.index(b"\xff\xc0"), plain.index(b"\xff\xda")
    for good in (plain, progressive.getvalue(), cmyk.getvalue(), jpeg(photo(24, 30), exif=b"Exif\0\0" + bytes(20))):
        assert is_regular_jpeg(np.frombuffer(good, np.uint8))
    two_channels = plain[: frame + 9] + b"\x02" + plain[frame + 10 :]
    lossless = plain[: frame + 1] + b"\xc3" + plain[frame + 2 :]
    gap = plain[:frame] + b"\0" + plain[frame:]
    for bad in (plain[:scan], plain[: frame + 5], two_channels, lossless, gap, plain[:2]):
        assert not is_regular_jpeg(np.frombuffer(bad, np.uint8))
