"""What several test files share."""

from collections.abc import Iterator

import pytest
import torch

from fastsimclr.data import native


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Batches this small cost less than waking a second thread does, a hundredfold where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["compiled", "pytorch", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> tuple[native.Implementation, str]:
    """A backend of crops and colours, and the device of their tensors: C++, PyTorch, and the GPU's kernels, emulated
    and on a GPU."""
    backend, device = ("compiled", "cuda") if request.param == "gpu" else (request.param, "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        native.choose(backend, torch.device(device))
    except RuntimeError as error:
        pytest.skip(str(error))
    return backend, device
