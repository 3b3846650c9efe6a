"""PNG of every color type, depth, filter and interlacing decodes to its pixels; damaged ones raise UserError."""

import struct
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import encode, photo
from PIL import Image

from fastsimclr.data.images import decode, decode_raw
from fastsimclr.errors import UserError

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16)]
KINDS += [(6, 8), (6, 16)]
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]  # Adam7
PALETTE = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def lines(values: NDArray[np.int64], depth: int) -> bytes:
    """Filter the rows of values (H, W, C), by all five filters in turn."""
    height, _, channels = values.shape
    if depth == 16:
        rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    rows = np.pad(rows.astype(np.int64), ((1, 0), (step := max(1, channels * depth // 8), 0)))
    row, left, up, corner = rows[1:, step:], rows[1:, :-step], rows[:-1, step:], rows[:-1, :-step]
    distances = np.abs([up - corner, left - corner, left + up - 2 * corner])
    paeth = np.choose(distances.argmin(0), [left, up, corner])  # the first of the nearest: left, up, corner
    predicted = [0 * row, left, up, (left + up) // 2, paeth]
    filtered = [bytes([n % 5]) + (row[n] - predicted[n % 5][n]).astype(np.uint8).tobytes() for n in range(height)]
    return b"".join(filtered)


def png(values: NDArray[np.int64], color: int, depth: int, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """Encode values (H, W, C); extra: chunks before the pixels."""
    passes = [values[y::dy, x::dx] for y, x, dy, dx in PASSES] if interlaced else [values]
    body = zlib.compress(b"".join(lines(part, depth) for part in passes if part.size))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, color, 0, 0, interlaced)
    if color == 3:
        extra = chunk(b"PLTE", PALETTE[: 2**depth].tobytes()) + extra
    chunks = [chunk(b"IDAT", part) for part in (body[:50], body[50:])]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + b"".join(chunks) + chunk(b"IEND", b"")


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()


@pytest.mark.parametrize(("color", "depth"), KINDS)
def test_every_kind_decodes_to_its_pixels(color: int, depth: int) -> None:
    # 13 x 19: odd, not a multiple of 8; every pass has pixels
    values = np.random.default_rng(0).integers(0, 2**depth, (13, 19, CHANNELS[color]))
    expected = PALETTE[values[..., 0]].astype(np.int64) if color == 3 else values * (255 // min(255, 2**depth - 1))
    if depth == 16:
        expected = values
    rgb = (expected >> 8 if depth == 16 else expected)[..., [0, 0, 0] if color in (0, 4) else [0, 1, 2]]
    transparent = chunk(b"tRNS", {0: bytes(2), 2: bytes(6), 3: bytes(2)}[color]) if color in (0, 2, 3) else b""
    for interlaced in (False, True):
        for extra in (b"", transparent):
            data = array(png(values, color, depth, interlaced, extra))
            raw = decode_raw(data, "file")
            assert raw.dtype == (torch.uint16 if depth == 16 else torch.uint8)
            np.testing.assert_array_equal(raw.permute(1, 2, 0).numpy(), expected)
            np.testing.assert_array_equal(decode(data, "file").permute(1, 2, 0).numpy(), rgb)


@pytest.mark.parametrize(("color", "depth"), KINDS)
def test_damaged_pixels_raise(color: int, depth: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**depth, (20, 30, CHANNELS[color]))
    whole = png(values, color, depth)
    at = whole.index(b"IDAT")
    for damaged in (
        whole[:at] + whole[at:].replace(whole[at + 20 : at + 22], b"\x55\xaa"),  # the checksum finds it
        png(values, color, depth)[: at - 4] + chunk(b"IDAT", b"\x78\x9c" + b"\x55" * 90),  # valid checksum, no stream
        whole[: at - 4] + chunk(b"IDAT", zlib.compress(b"\x09" * 9000)) + chunk(b"IEND", b""),  # no such filter
        whole[: at - 4] + chunk(b"IEND", b""),
        whole[: at + 30],
    ):
        for decoder in (decode, decode_raw):
            with pytest.raises(UserError, match=rf"^bad\.png: got {len(damaged)} bytes that do not decode"):
                decoder(array(damaged), "bad.png")


def test_damage_to_metadata_and_long_texts_do_not_matter() -> None:
    whole = encode(Image.fromarray(photo(20, 30)), "PNG")
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5 << 20)))
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(5 << 20)))
    damaged = text[:20] + b"\xff" + text[21:]
    expected = decode(array(whole), "file")
    for extra in (text, profile, damaged):
        assert torch.equal(decode(array(whole[:33] + extra + whole[33:]), "file"), expected)
    with pytest.raises(UserError, match="unknown chunk b'CgBI'"):
        decode(array(whole[:33] + chunk(b"CgBI", b"1234") + whole[33:]), "file")
