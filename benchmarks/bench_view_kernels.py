"""The kernels of views on a GPU: crops out of memory, and colours against a copy of as many bytes.

python -m pytest benchmarks/bench_view_kernels.py --benchmark-json=benchmarks/results/view-kernels-DEVICE.json
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.interleaved import describe, interleave
from benchmarks.sizes import SMALL
from fastsimclr import Views
from fastsimclr.data.crop import crop
from fastsimclr.data.params import draw
from fastsimclr.data.photometric import photometric


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.benchmark(group="kernels on a GPU")
def test_kernels(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
    """The photometric kernels at the bytes that go in and out, each once, over what a copy of as many bytes reaches."""
    images = 8 if SMALL else 512
    views = Views()
    crops = torch.randint(0, 256, (images, 224, 224, 3), dtype=torch.uint8, device="cuda")
    draws = draw(views, 0, 0, np.arange(images), 0, np.full((images, 2), 400))
    of_bytes = crops.numel() * (1 + torch.empty((), dtype=dtype).element_size())
    source = torch.empty(of_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    small = torch.randint(0, 256, (1024 if SMALL else 50_000, 32, 32, 3), dtype=torch.uint8, device="cuda")
    recipe = Views.preset("cifar10")

    def cifar10() -> None:
        for first in range(0, len(small), 512):
            index = np.arange(first, min(first + 512, len(small)))
            for view in range(2):
                drawn = draw(recipe, 0, 0, index, view, np.full((len(index), 2), 32))
                photometric(crop(small, index, drawn, recipe.recipes[view]), drawn, recipe.recipes[view], dtype)

    contenders: dict[str, Callable[[], object]] = {
        "photometric": lambda: photometric(crops, draws, views.recipes[0], dtype),
        "copy of as many bytes": lambda: target.copy_(source),
        "CIFAR-10, both views of all": cifar10,
    }
    timing = interleave(
        benchmark, contenders, rounds=2 if SMALL else 10, warmup_rounds=2, synchronize=torch.cuda.synchronize
    )
    share = timing.milliseconds["copy of as many bytes"].median / timing.milliseconds["photometric"].median
    describe(
        benchmark,
        device=torch.cuda.get_device_name(),
        sizes={"images": images, "image_size": 224, "dtype": str(dtype).removeprefix("torch.")},
        yardsticks=[name for name in contenders if name != "photometric"],
        headline=False,
    )
    benchmark.extra_info.update(bytes=of_bytes, share_of_copy_bandwidth=share)
    with capsys.disabled():
        print(f"\n{dtype}: {share:.0%} of the copy bandwidth\n{timing}")
