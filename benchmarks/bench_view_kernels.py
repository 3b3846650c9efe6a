"""View kernels on a GPU: crops from memory, and color operations against a copy of the same number of bytes.

python -m pytest benchmarks/bench_view_kernels.py --benchmark-json=benchmarks/results/view-kernels-DEVICE.json
"""

import numpy as np
import pytest
import torch

from benchmarks.suite import DEVICE, SMALL, Suite
from fastsimclr import Augmentation
from fastsimclr.data.crop import crop
from fastsimclr.data.params import sample_params
from fastsimclr.data.photometric import photometric

OURS, COPY, CIFAR10 = "photometric", "copy of the same size", "both views of CIFAR-10"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.benchmark(group="view kernels on a GPU")
def test_kernels(suite: Suite, dtype: torch.dtype) -> None:
    """The photometric kernels against a copy that reads and writes the same number of bytes."""
    images = 8 if SMALL else 512
    augmentation, small_views = Augmentation(), Augmentation.preset("cifar10")
    crops = torch.randint(0, 256, (images, 224, 224, 3), dtype=torch.uint8, device=DEVICE)
    params = sample_params(augmentation, 0, 0, np.arange(images), 0, np.full((images, 2), 400))
    copied = crops.numel() * (1 + dtype.itemsize)
    source = torch.empty(copied // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    small = torch.randint(0, 256, (1024 if SMALL else 50_000, 32, 32, 3), dtype=torch.uint8, device=DEVICE)

    def cifar10() -> None:
        for first in range(0, len(small), 512):
            index = np.arange(first, min(first + 512, len(small)))
            for view, recipe in enumerate(small_views.recipes):
                view_params = sample_params(small_views, 0, 0, index, view, np.full((len(index), 2), 32))
                photometric(crop(small, index, view_params, recipe), view_params, recipe, dtype)

    timing = suite.interleave(
        {
            OURS: lambda: photometric(crops, params, augmentation.recipes[0], dtype),
            COPY: lambda: target.copy_(source),
            CIFAR10: cifar10,
        },
        sizes={"images": images, "image_size": 224, "dtype": str(dtype).removeprefix("torch.")},
        rounds=2 if SMALL else 10,
    )
    share = timing.milliseconds[COPY].median / timing.milliseconds[OURS].median
    suite.write_line(f"{dtype}: {share:.0%} of the copy bandwidth")
    suite.record(references=[COPY, CIFAR10])
