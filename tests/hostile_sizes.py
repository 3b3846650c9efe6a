"""Hostile sizes, layouts and arguments for the extension, which kernel_variants.check runs under sanitizers.

Each call has the result of the reference in PyTorch or NumPy, or raises an error. In a build with sanitizers, an access
out of bounds or undefined behavior ends the process.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from oracle import views
from torch import Tensor

from fastsimclr import Augmentation
from fastsimclr.data.crop import crop
from fastsimclr.data.native import Implementation
from fastsimclr.data.params import VIEW_PARAMS, ViewParams, sample_params, sample_params_in_numpy
from fastsimclr.data.photometric import photometric
from fastsimclr.data.pixels import RGB8, PixelFormat, default_format
from fastsimclr.loss import nt_xent

FAR = 2**30  # elements: the offset of the third row or column exceeds 32 bits


def are_wrong(module: Any) -> bool:
    """Make all calls that `module`, _C or _emulated, can serve. Returns whether one was wrong, and prints these."""
    if hasattr(module, "probe"):
        checks = [crops("emulated"), colors("emulated"), projections(), invalid_projections(), invalid_launches(module)]
    else:
        checks = [crops("compiled"), colors("compiled"), boxes(), invalid_calls(module)]
    wrong = [problem for check in checks for problem in check]
    print(*wrong, sep="\n")
    return bool(wrong)


def fails(error: type[Exception], call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        call(*args, **kwargs)
    except error:
        return True
    return False


# ----------------------------------------------------------------------------------------------------------- the loss


def layouts(z: Tensor) -> dict[str, Tensor]:
    """Return z (N, D), or some of its values, in layouts that the kernels read without a copy."""
    n, d = z.shape
    found = {
        "contiguous": z,
        "transposed": z.T.contiguous().T,
        "two columns apart": torch.stack([z, z], dim=2)[:, :, 0],
        "at the end of its storage": torch.cat([z.new_ones(3), z.flatten()])[3:].view(n, d),
        "negative bit": torch._neg_view(-z),
        "equal rows": z[:1].expand(n, d),
        "equal columns": z[:, :1].expand(n, d),
    }
    if z.shape == (3, 3) and z.dtype.itemsize == 2:  # memory of 4 GiB, of which a few pages are used
        found["rows far apart"] = z.new_empty(2 * FAR + 3).as_strided((3, 3), (FAR, 1)).copy_(z)
        found["columns far apart"] = z.new_empty(2 * FAR + 3).as_strided((3, 3), (1, FAR)).copy_(z)
    return found


def projections() -> Iterator[str]:
    # 1, 7, 9: rows are padded to a multiple of 8. 33: 2 rows past a tile of 64. 2048: the largest width.
    sizes = [(1, 1), (1, 2048), (2, 7), (3, 3), (7, 1), (33, 65)]
    for (n, d), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16, torch.float16)):
        both = [layouts(z) for z in views(n, d, dtype)]
        for number, name in enumerate(both[0]):
            temperature = (0.1, 0.005)[number % 2]
            z1, z2 = (each[name] for each in both)
            got = losses_and_dz(z1, z2, temperature, backend="emulated", precision="highest")
            exact = losses_and_dz(z1.double(), z2.double(), temperature, backend="reference")
            for what, a, b in zip(("losses", "dz"), got, exact, strict=True):
                # A loose bound: test_fused.py tests the accuracy.
                if not (a - b).abs().max() <= 0.02 * (1 + b.abs().max()):
                    yield f"{what} of {n} x {d} {dtype}, {name}, temperature {temperature}: {a}, expected {b}"


def losses_and_dz(z1: Tensor, z2: Tensor, temperature: float, **options: Any) -> tuple[Tensor, Tensor]:
    """As in oracle.py, without copying the projections, and with a gradient (2N,) whose elements share their memory."""
    z1, z2 = (z.detach().requires_grad_() for z in (z1, z2))
    losses = nt_xent(z1, z2, temperature, reduction="none", **options)
    dz = torch.autograd.grad(losses, (z1, z2), losses.new_ones(1).expand_as(losses))
    return losses.detach().double(), torch.cat(dz).double()


def invalid_projections() -> Iterator[str]:
    z = torch.ones(2, 3)
    shapes = [torch.ones(shape) for shape in ((0, 3), (3, 0), (0, 0), (3,), (), (2, 3, 1), (2, 2049))]
    # More than 2^30 rows, in the memory of one.
    shapes += [torch.ones(1, 1).expand(n, 1) for n in (2**29 + 1, 2**30, 2**31, 2**62)]
    dtypes = [z.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e5m2)]
    for same in (*shapes, *dtypes, z.to("meta")):
        if not fails(ValueError, nt_xent, same, same, backend="emulated"):
            yield f"no error for {same.dtype} of {tuple(same.shape)} on {same.device}"
    for other in (torch.ones(3, 3), torch.ones(2, 4), z.half(), z.to("meta")):
        if not (fails(ValueError, nt_xent, z, other, backend="emulated")):
            yield f"no error for {z.shape} and {other.dtype} of {tuple(other.shape)} on {other.device}"
    numbers = (0.0, -1.0, np.nan, np.inf)
    for temperature in (*numbers, *map(torch.tensor, numbers), torch.ones(1), torch.tensor(1)):
        if not fails(ValueError, nt_xent, z, z, temperature, backend="emulated"):
            yield f"no error for a temperature of {temperature}"


def invalid_launches(module: Any) -> Iterator[str]:
    split = {"rows": 2, "columns": 2, "planes": 1, "width": 8}
    assert module.nt_xent_backward_splits(**split, device=0) == 1
    for change in ({"rows": 2**31}, {"rows": -(2**31) - 1}, {"columns": 0.5}, {"width": None}, {"planes": "1"}):
        if not fails(TypeError, module.nt_xent_backward_splits, **(split | change), device=0):
            yield f"no error for {change}"
    if not fails(RuntimeError, module.nt_xent_backward_splits, **split, device=1):
        yield "no error for device 1"


# ---------------------------------------------------------------------------------------------------------- the views


def crops(implementation: Implementation) -> Iterator[str]:
    formats = [RGB8]
    if implementation == "compiled":
        formats += [default_format(1, torch.uint8), default_format(5, torch.uint16), default_format(16, torch.float32)]
    sizes = [(1, 1), (1, 70), (70, 1), (2, 3), (999, 2), (64, 64)]
    for (height, width), pixels, size in itertools.product(sizes, formats, (1, 2, 33)):
        images = random_images((2, height, width), pixels)
        for interpolation, count in (("bicubic", 5), ("bilinear", 0)):
            recipe = Augmentation(image_size=size, interpolation=interpolation)
            index = np.arange(count) % 2
            params = sample_params(recipe, 0, 0, index, 0, np.tile([height, width], (count, 1)))
            got, expected = (
                crop(images, index, params, recipe, name, pixels=pixels).double()
                for name in (implementation, "pytorch")
            )
            if not ((got - expected).abs() <= (1.1 if pixels == RGB8 else 1e-4)).all():
                yield f"{count} crops of {height} x {width} {pixels} to {size}: {got}, expected {expected}"

    # Over 2^31 bytes, of which a few pages are used: the last pixels of the last image.
    images = torch.empty(3, 1000, 400_000, 3, dtype=torch.uint8)
    images[2, -40:, -50:] = corner = random_images((40, 50), RGB8)
    recipe, params = Augmentation(image_size=33), np.zeros(1, VIEW_PARAMS)
    params["box"] = 960, 399_950, 40, 50
    got = crop(images, np.array([2]), params, recipe, implementation)
    params["box"] = 0, 0, 40, 50
    expected = crop(corner[None], np.array([0]), params, recipe, "pytorch")
    if (got.int() - expected.int()).abs().max() > 1:
        yield f"a crop of large images: {got}, expected {expected}"


def random_images(shape: tuple[int, ...], pixels: PixelFormat) -> Tensor:
    unit = np.random.default_rng(0).random((*shape, pixels.channels), np.float32)
    return torch.from_numpy(unit * np.float32(pixels.value_range[1])).to(pixels.dtype)


def colors(implementation: Implementation) -> Iterator[str]:
    sizes = [(1, 1), (1, 70), (70, 1), (2, 2), (33, 17), (64, 64)]
    channels = [3] if implementation == "emulated" else [3, 1, 16]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for number, ((height, width), count) in enumerate(itertools.product(sizes, channels)):
        of_rgb = dict.fromkeys(("grayscale_prob", "hue", "saturation"), 0.2 if count == 3 else 0.0)
        recipe = Augmentation(
            **of_rgb,
            image_size=64,
            blur_prob=0.7,
            blur_kernel=1.0,
            blur_sigma=(0.01, 30),
            jitter_prob=0.9,
            solarize_prob=0.5,
            mean=(0.5,) * count,
            std=(1 / 255,) * count,
        )
        images = random_images((5, height, width), RGB8 if count == 3 else default_format(count, torch.float32))
        params = sample_params(recipe, 0, 0, np.arange(5), 0, np.tile([height, width], (5, 1)))
        for part in (slice(5), slice(0)):
            got, expected = (
                photometric(images[part], params[part], recipe, dtypes[number % 3], name).double()
                for name in (implementation, "pytorch")
            )
            if part.stop and not (got - expected).abs().mean() < 0.5:  # levels; a loose bound
                yield f"colors of {height} x {width} with {count} channels: {got}, expected {expected}"


def boxes() -> Iterator[str]:
    largest = 2**31 - 1
    sizes = np.array([(1, 1), (1, largest), (largest, 1), (largest, largest), (2, 3), (65535, 7)])
    index = np.array([0, 1, -1, 2**63 - 1, -(2**63), 2**32])
    options: list[dict[str, Any]] = [
        {},
        {"ratio": (3.0, 4.0)},
        {"ratio": (0.01, 0.02)},
        {"scale": (1e-9, 1e-9)},
        {"crop": "center"},
        {"rotate90_prob": 1.0, "vertical_flip_prob": 0.5, "channel_drop_prob": 1.0, "gain": 0.5},
    ]
    for changed, seed, epoch in itertools.product(options, (0, 2**32 - 1), (0, 2**32 - 1)):
        recipe = Augmentation(**changed)
        got, expected = (f(recipe, seed, epoch, index, 0, sizes) for f in (sample_params, sample_params_in_numpy))
        if problem := differing(got, expected) or outside(got, sizes):
            yield f"{changed}, seed {seed}, epoch {epoch}: {problem}"


def differing(got: ViewParams, expected: ViewParams) -> str:
    for name in VIEW_PARAMS.names or ():
        if not np.allclose(got[name], expected[name], rtol=1e-6, atol=0):
            return f"{name} {got[name]}, expected {expected[name]}"
    return ""


def outside(params: ViewParams, sizes: NDArray[np.int64]) -> str:
    corner, sides = params["box"][:, :2].astype(np.int64), params["box"][:, 2:]
    inside = (corner >= 0) & (sides > 0) & (corner + sides <= sizes)
    return "" if inside.all() else f"boxes {params['box']} in images of {sizes}"


def invalid_calls(module: Any) -> Iterator[str]:
    no_images = {
        "crops": 0, "view_params": 0, "images": 0, "height": 1, "width": 1, "blur_taps": 3, "scale": [1.0] * 3,
        "shift": [0.0] * 3, "dtype": module.PixelType.float32, "out": 0, "is_float": False, "threads": 1,
    }  # fmt: skip
    module.photometric(**no_images)
    invalid: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"scale": [1.0] * 17, "shift": [0.0] * 17}),
        (ValueError, {"scale": [], "shift": []}),
        (ValueError, {"scale": [1.0] * 4}),
        (TypeError, {"scale": None}),
        (TypeError, {"height": 2**31}),
        (TypeError, {"images": 2**63}),
        (TypeError, {"out": -1}),
        (TypeError, {"dtype": 0}),
        (TypeError, {"unknown": 0}),
    ]
    for error, change in invalid:
        if not fails(error, module.photometric, **(no_images | change)):
            yield f"no error for {change}"
