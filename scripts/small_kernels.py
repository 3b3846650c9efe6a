"""Run the loss and view kernels at small sizes and compare the results with those of the CPU.

    python scripts/small_kernels.py                # on a GPU, also under compute-sanitizer
    python scripts/small_kernels.py --emulated     # the same kernels, emulated on the CPU

Everything else runs on the CPU, so that compute-sanitizer checks few kernels of other libraries. Exit code 1: a result
is wrong.
"""

import argparse
import sys
from typing import Any

import numpy as np
import torch

from fastsimclr import Augmentation
from fastsimclr.data.crop import crop
from fastsimclr.data.params import sample_params
from fastsimclr.data.photometric import photometric
from fastsimclr.loss import nt_xent

# No size is a multiple of a tile; widths below, at and above one block, which is half as wide for "highest".
LOSS_SIZES = ((65, 30), (131, 128), (67, 264))
BOUNDS = {"medium": (1e-3, 2e-2), "highest": (1e-5, 1e-4)}  # relative errors of the loss and of dz


def check_loss(device: str, backend: str) -> None:
    torch.manual_seed(0)
    for n, width in LOSS_SIZES:
        z = [torch.randn(n, width) for _ in range(2)]
        expected = loss_and_dz(z, backend="tiled", precision="highest")
        for precision, bounds in BOUNDS.items():
            got = loss_and_dz([each.to(device) for each in z], backend=backend, precision=precision)
            errors = [float((a.cpu() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
            report(f"loss of 2 x {n} x {width}, {precision}", errors, bounds)


def loss_and_dz(z: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    z1, z2 = (each.detach().requires_grad_() for each in z)
    loss = nt_xent(z1, z2, 0.1, **options)
    return loss.detach(), torch.cat([each.cpu() for each in torch.autograd.grad(loss, (z1, z2))])


def check_views(device: str, backend: Any) -> None:
    images = torch.randint(0, 256, (5, 45, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = np.arange(5)
    for interpolation in ("bilinear", "bicubic"):
        # All color operations. 37: not a multiple of a tile.
        augmentation = Augmentation(
            image_size=37,
            interpolation=interpolation,
            jitter_prob=1.0,
            grayscale_prob=0.5,
            blur_prob=1.0,
            solarize_prob=0.5,
        )
        params = sample_params(augmentation, 0, 0, index, 0, np.full((5, 2), (45, 50)))
        expected = crop(images, index, params, augmentation)
        got = crop(images.to(device), index, params, augmentation, backend).cpu()
        levels = (got.int() - expected.int()).abs().float()
        # float32 sums in another order may round a half to a different level.
        report(f"crops, {interpolation}, levels", [float(levels.mean()), float(levels.max())], (0.02, 1.0))
        for dtype in (torch.float32, torch.bfloat16):
            expected_view = photometric(expected, params, augmentation, dtype).float()
            view = photometric(expected.to(device), params, augmentation, dtype, backend).cpu().float()
            error = float((view - expected_view).norm() / expected_view.norm())
            report(f"colors, {interpolation}, {dtype}", [error], (0.01,))


def report(what: str, errors: list[float], bounds: tuple[float, ...]) -> None:
    is_correct = all(error <= bound for error, bound in zip(errors, bounds, strict=True))  # False for NaN
    values = ", ".join(f"{error:.2g} (at most {bound:g})" for error, bound in zip(errors, bounds, strict=True))
    print(f"{what}: {values}{'' if is_correct else ': WRONG'}", flush=True)
    if not is_correct:
        sys.exit(f"{what}: the result of the kernel differs from the CPU's")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true", help="emulate the kernels on the CPU")
    parser.add_argument("--only", choices=("loss", "views"), help="run only this check")
    options = parser.parse_args()
    if options.only != "views":
        check_loss("cpu" if options.emulated else "cuda", "emulated" if options.emulated else "fused")
    if options.only != "loss":
        check_views("cpu" if options.emulated else "cuda", "emulated" if options.emulated else "compiled")
