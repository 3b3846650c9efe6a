"""Fixtures that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastsimclr.data import native


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread: small batches cost less than waking a second thread, up to 100 times less on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["compiled", "pytorch", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> tuple[native.Implementation, str]:
    """Implementation of crops and colors, and the device of its tensors: C++, PyTorch, and the CUDA kernels, both
    emulated and on a GPU."""
    name, device = ("compiled", "cuda") if request.param == "gpu" else (request.param, "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        native.choose(name, torch.device(device))
    except RuntimeError as error:
        pytest.skip(str(error))
    return name, device


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is the current one during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
