"""Fixtures that several test files share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastsimclr.data import native

LEFT_OUT = pytest.StashKey[int]()

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the runs that the tests start


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave GPU tests out where there is no GPU. `--collect-only` lists them everywhere."""
    if torch.cuda.is_available() or config.option.collectonly:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    config.stash[LEFT_OUT] = len(gpu)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} GPU tests left out: there is no GPU")


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
    try:
        native.choose(name, torch.device(device))
    except RuntimeError as error:
        pytest.skip(str(error))
    return name, device


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Each test has its own cache folder, which does not exist at first: none sees the user's, or another test's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "caches" / str(abs(hash(request.node.nodeid)))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "fastsimclr"


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is the current one during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
