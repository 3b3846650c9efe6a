"""Decode damaged image files, made by a seed. As a program: `python tests/mutations.py FIRST END`, with limits.

The program writes the number of each file to stderr before it decodes it, so that the last one is known if it dies.
"""

import os
import resource
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from pictures import kinds

from fastsimclr.data.headers import read_header
from fastsimclr.data.images import decode, decode_raw
from fastsimclr.errors import UserError

FILES = kinds()
EXTRA_MEMORY = 2 << 30  # bytes of address space beyond those in use after the imports
MAX_SECONDS = 10  # per file


def damaged(number: int) -> tuple[str, bytes]:
    """Return the name and the bytes of damaged file `number`: one to three damages of one of five sorts."""
    rng = np.random.default_rng(number)
    name = sorted(FILES)[number % len(FILES)]
    data = bytearray(FILES[name])
    for _ in range(rng.integers(1, 4)):
        at = int(len(data) ** rng.uniform(0.3, 1)) - 1  # headers more often than pixels
        match rng.integers(5):
            case 0:
                data[at] ^= 1 << rng.integers(8)
            case 1:
                data[at : at + 4] = rng.bytes(4)
            case 2:
                data[at:at] = rng.bytes(rng.integers(1, 600))
            case 3:
                data[at : at + 512] = bytes([rng.choice([0, 255])]) * len(data[at : at + 512])
            case 4:
                del data[max(at, 1) :]
    if name.endswith(".png") and rng.integers(2):
        correct_checksums(data)
    return name, bytes(data)


def correct_checksums(png: bytearray) -> None:
    """Make the checksums of a damaged PNG valid, so that its pixels are decoded."""
    at = 8
    while (end := at + 8 + int.from_bytes(png[at : at + 4], "big")) <= len(png) - 4:
        png[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


def decode_damaged(number: int) -> bool:
    """Decode damaged file `number` in both ways; return whether an image came of it. Raises all but UserError."""
    name, content = damaged(number)
    data = np.frombuffer(content, np.uint8).copy()
    decoded = False
    for decoder in (decode, decode_raw):
        try:
            size = read_header(data, name).upright_size
            image = decoder(data, name)
        except UserError as error:
            assert str(error).startswith(f"{name}: got "), error  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            continue
        decoded = True
        assert tuple(image.shape[1:]) == size
        assert image.dtype in (torch.uint8, torch.uint16, torch.float32)
        image.float().sum()  # reads all of its memory
    return decoded


def main(first: int, end: int) -> None:
    torch.set_num_threads(1)
    decode_damaged(0)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + EXTRA_MEMORY, -1))
    for number in range(first, end):
        os.write(2, f"{number}\n".encode())
        signal.alarm(MAX_SECONDS)
        decode_damaged(number)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
