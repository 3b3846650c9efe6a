"""Fixtures of the fault tests."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import runs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests in this folder are slow."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[Callable[..., None]]:
    """A function that fails if processes, shared memory or incomplete files in the given folders are left.

    It waits 10 s for them to vanish. After the test, the processes that it has started are killed.
    """
    before = runs.shared_memory()

    def check(*folders: Path, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while left := runs.leftovers(before, *folders):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    yield check
    runs.kill_all()
