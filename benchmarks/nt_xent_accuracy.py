"""Relative errors of the fused loss and its gradient against float64, on features that share a large mean.

    python -m benchmarks.nt_xent_accuracy --json accuracy.json [--num_views 8192,32768] [--width 128] [--backend fused]

Tensor cores truncate while they accumulate. If all features share a mean, all products have the same sign, and the
errors of a sum add up: the hardest case for precision "highest", whose bound is 1e-5. Exit code 1 if an error is above
its bound.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimclr.loss import nt_xent

TEMPERATURE = 0.1
MEAN = 3.5  # in standard deviations: the cosine of unrelated rows is MEAN^2 / (1 + MEAN^2) = 0.92
BOUNDS = {"highest": 1e-5, "medium": None}  # bf16 products have no bound here: their errors are only recorded


def features(num_views: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the features of two views of num_views / 2 images, each (num_views / 2, width) float32."""
    random = torch.Generator().manual_seed(0)
    image = torch.randn(num_views // 2, width, generator=random)
    pair = [image + 0.5 * torch.randn(image.shape, generator=random) for _ in range(2)]
    z1, z2 = (MEAN + z * (width**0.5 / z.norm(dim=1, keepdim=True)) for z in pair)
    return z1.to(device), z2.to(device)


def losses_and_dz(z1: Tensor, z2: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the losses (M,) and the gradient of their mean (M, D), both in float64."""
    z1, z2 = (z.detach().requires_grad_() for z in (z1, z2))
    losses = nt_xent(z1, z2, TEMPERATURE, reduction="none", **options)
    dz = torch.cat(torch.autograd.grad(losses.mean(), (z1, z2)))
    return losses.detach().double(), dz.double()


def measure(num_views: int, width: int, precision: str, backend: str, device: torch.device) -> dict[str, Any]:
    z1, z2 = features(num_views, width, device)
    exact_losses, exact_dz = losses_and_dz(z1.double(), z2.double(), backend="tiled", precision="highest")
    losses, dz = losses_and_dz(z1, z2, backend=backend, precision=precision)
    rows = (dz - exact_dz).norm(dim=1) / exact_dz.norm(dim=1)
    return {
        "views": num_views,
        "width": width,
        "precision": precision,
        "loss": float(exact_losses.mean()),
        "losses_relative_error": float((losses - exact_losses).norm() / exact_losses.norm()),
        "dz_relative_error": float((dz - exact_dz).norm() / exact_dz.norm()),
        "dz_worst_row": float(rows.max()),
        "bound": BOUNDS[precision],
    }


def verdict(row: dict[str, Any]) -> str:
    """Return a verdict: met, MISSED (also for NaN), or recorded if there is no bound."""
    if row["bound"] is None:
        return "recorded"
    within = all(row[f"{name}_relative_error"] <= row["bound"] for name in ("losses", "dz"))
    return f"at most {row['bound']:g}: {'met' if within else 'MISSED'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_views", default="8192,32768", help="numbers of views (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="width of the features (default: %(default)s)")
    parser.add_argument("--backend", default="fused", help="backend of nt_xent (default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="file to write the results to")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {
        "what": "relative errors against float64, features with a shared mean",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "backend": options.backend,
        "rows": [],
    }
    for num_views in map(int, options.num_views.split(",")):
        for precision in BOUNDS:
            row = measure(num_views, options.width, precision, options.backend, device)
            record["rows"].append(row | {"verdict": verdict(row)})
            options.json.write_text(json.dumps(record, indent=2) + "\n")  # after each row, as time may run out
            print(
                f"{num_views} x {options.width}, {precision}: losses {row['losses_relative_error']:.2g}, "
                f"dz {row['dz_relative_error']:.2g} (worst row {row['dz_worst_row']:.2g}); {verdict(row)}",
                flush=True,
            )
    return int(any("MISSED" in row["verdict"] for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
