"""The pixel format of a source: what its images are, and what the options state about them."""

from dataclasses import replace

from fastsimclr.data.headers import read_header
from fastsimclr.data.images import decode_raw
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.pixels import (
    DTYPES,
    MAX_CHANNELS,
    RGB8,
    PixelFormat,
    count_channels,
    default_format,
    dtype_name,
)
from fastsimclr.data.sources import EncodedSource, Source
from fastsimclr.errors import UserError

_SIXTEEN_BITS = (
    "{name} has {bits} bits per channel: as 8-bit RGB, images keep the upper 8 of 16 bits, and values below 256 become "
    "0; --data.pixels uint16 keeps all bits"
)
_MAX_TRIED = 100  # images at the start of a source that may be bad


def detect_pixels(source: Source, options: PixelOptions) -> None:
    """Set `source.pixels`, `max_pixels` and `scaled_decode`. Raises UserError if the images contradict the options.

    Image files are 8-bit RGB, unless the options ask for another format, or they are .npy arrays: then they have the
    format of the first one that decodes. If the first has 16 bits, a note says that they become 8.
    """
    source.max_pixels, source.scaled_decode = options.max_pixels, options.scaled_decode
    named, found = "", source.pixels
    if isinstance(source, EncodedSource):
        named, found = _of_files(source, options)
    if options.pixels is not None and DTYPES[options.pixels] != found.dtype:
        got = dtype_name(found.dtype)
        raise UserError(f"--data.pixels: got {options.pixels}, but the images are {got}{named}; expected {got}")
    if options.channels is not None and options.channels != found.channels:
        raise UserError(
            f"--data.channels: got {options.channels}, but the images have {count_channels(found.channels)}{named}; "
            f"expected {found.channels}"
        )
    if not 1 <= found.channels <= MAX_CHANNELS:
        raise UserError(f"data: got images of {found.channels} channels, expected 1 to {MAX_CHANNELS}, last in arrays")
    source.pixels = replace(found, value_range=options.value_range) if options.value_range else found


def _of_files(source: EncodedSource, options: PixelOptions) -> tuple[str, PixelFormat]:
    """Return the format of image files, and a note that names the file that has it."""
    may_be_rgb8 = options.pixels in (None, "uint8") and options.channels in (None, 3)
    is_rgb8 = may_be_rgb8 and (options.pixels is None or options.channels is not None)  # unless they are .npy arrays
    error: UserError | None = None
    for index in range(min(len(source), _MAX_TRIED)):
        name = source.name(index)
        try:
            data = source.read(index)
            header = read_header(data, name)
            if is_rgb8 and header.format != "NPY":
                if header.bits > 8 and options.pixels is None:
                    source.notes = (*source.notes, _SIXTEEN_BITS.format(name=name, bits=header.bits))
                return "", RGB8
            image = decode_raw(data, name, source.max_pixels)
            return f" ({name})", default_format(image.shape[0], image.dtype)
        except UserError as bad:  # replaced or reported when it is used
            error = error or bad
    if is_rgb8:
        return "", RGB8
    assert error is not None  # a source has images
    raise error
