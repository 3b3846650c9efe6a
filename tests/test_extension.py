"""The compiled extension: whether its kernels can run on a device, and the fallback if they cannot."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fastsimclr import _extension
from fastsimclr.data import native
from fastsimclr.environment import advice, crops_and_colors
from fastsimclr.loss import BackendError, choose_backend
from fastsimclr.loss.options import _choose_and_warn

GPU = torch.device("cuda", 0)
OLD_DRIVER = (
    "cudaSetDevice failed: cudaErrorInsufficientDriver, CUDA driver version is insufficient for CUDA runtime version"
)
NO_IMAGE = (
    "loading the kernels of the loss failed: cudaErrorNoKernelImageForDevice, no kernel image is available for "
    "execution on the device"
)


@pytest.fixture
def mock_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Make PyTorch report a GPU, and the extension a CUDA build whose probe() returns `.reason` and counts `.calls`."""
    gpu = SimpleNamespace(reason="", calls=0, capability=(9, 0))

    def probe(device: int) -> str:
        gpu.calls += 1
        return gpu.reason

    build = {"version": "0.1.0", "compiler": "g++ 12.2", "cuda": "13.0", "cuda_runtime": "13.0"}
    build |= {"architectures": ["sm_80", "sm_90"]}
    monkeypatch.setattr(_extension, "compiled", SimpleNamespace(probe=probe, build_info=lambda: build))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())  # any context manager
    for cached in (_extension.why_unavailable, native.warn_once):
        cached.cache_clear()
    yield gpu
    for cached in (_extension.why_unavailable, native.warn_once):
        cached.cache_clear()


def test_kernels_that_load_are_chosen_and_probed_once(mock_gpu: SimpleNamespace) -> None:
    assert choose_backend("auto", GPU) == ("fused", "auto: the fastest available")
    assert native.choose("auto", GPU) == "compiled"
    assert crops_and_colors(GPU)[0] == "compiled"
    assert mock_gpu.calls == 1


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        pytest.param(OLD_DRIVER, r"InsufficientDriver.*update the NVIDIA driver.*CUDA 13\.0", id="old driver"),
        pytest.param(NO_IMAGE, r"no kernel image.*sm_80, sm_90", id="no kernel image"),
    ],
)
def test_auto_falls_back_with_a_reason_if_kernels_do_not_load(
    mock_gpu: SimpleNamespace, reason: str, expected: str
) -> None:
    mock_gpu.reason = reason
    backend, why = choose_backend("auto", GPU)
    assert backend == "tiled"
    assert why.startswith("auto: the kernels do not load on NVIDIA H100: ")
    with pytest.warns(UserWarning, match=f"loss: using the slower backend 'tiled'.*{expected}"):
        assert _choose_and_warn("auto", GPU, torch.float32, 128) == "tiled"
    with pytest.raises(BackendError, match=expected):
        choose_backend("fused", GPU)

    with pytest.warns(UserWarning, match=f"slower PyTorch operations.*{expected}"):
        assert native.choose("auto", GPU) == "pytorch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.choose("auto", GPU) == "pytorch", "the second batch does not warn again"
    with pytest.raises(RuntimeError, match="compiled"):
        native.choose("compiled", GPU)

    # The same as doctor reports.
    assert crops_and_colors(GPU) == ("pytorch", why.removeprefix("auto: "))
    found = {"gpus": [{"capability": "9.0"}], "driver": "550.1", "dali": "2.0", "extension": {"extension": "cuda"}}
    assert advice(found, "") == [f"for the fused loss: {why.removeprefix('auto: ')}"]


def test_unsupported_compute_capability_is_not_probed(mock_gpu: SimpleNamespace) -> None:
    mock_gpu.capability = (7, 5)
    backend, why = choose_backend("auto", GPU)
    assert backend == "tiled"
    assert "NVIDIA H100 has compute capability 7.5; expected 8.0 or later" in why
    assert mock_gpu.calls == 0


def test_description_names_what_this_machine_can_use(
    mock_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _extension.describe_build() == "extension: CUDA 13.0 for sm_80, sm_90 (g++ 12.2)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "extension: C++ for the CPU (its CUDA kernels for sm_80, sm_90 need a GPU)"
    assert _extension.describe_build() == expected


@pytest.mark.skipif(_extension.emulated is None, reason="needs the emulation of an editable build")
def test_probe_of_emulated_kernels() -> None:
    assert _extension.emulated.probe(device=0) == ""
    assert _extension.emulated.probe(device=7) == "cudaSetDevice failed: cudaErrorInvalidDevice, invalid device ordinal"


@pytest.mark.skipif(not hasattr(_extension.compiled, "probe"), reason="needs a CUDA build")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_probe_reports_a_missing_driver_and_clears_the_error() -> None:
    """Without a driver, CUDA reports the same error as with an outdated one."""
    reasons = [_extension.compiled.probe(device=0) for _ in range(2)]
    assert reasons[0].startswith("cudaSetDevice failed: cudaError")
    assert reasons[0] == reasons[1]
