"""The choice of gloo's network interface. tests/faults/test_hosts.py connects hosts with it."""

import os
import socket

import pytest
import torch.distributed as dist

from fastsimclr.gloo import choose_interface

VARIABLE = "GLOO_SOCKET_IFNAME"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is restored
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def choose(*others: str) -> str | None:
    """The interface that rank 0 chooses, if the other ranks have published these addresses."""
    store = dist.HashStore()
    for rank, address in enumerate(others, start=1):
        store.set(f"address of rank {rank}", address)
    choose_interface(store, rank=0, world_size=1 + len(others))
    assert store.get("address of rank 0") == b"127.0.0.1"
    return os.environ.get(VARIABLE)


@pytest.mark.parametrize("name", ["localhost", "no-such-host.invalid"])
def test_without_another_host_nothing_is_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    assert choose("127.0.0.1", "") is None


def test_the_way_to_a_rank_on_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr("fastsimclr.gloo._is_loopback", lambda address: address != "127.0.0.2")  # the other host
    assert choose("127.0.0.1", "127.0.0.2") == "lo"


def test_a_variable_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "eth7")
    assert choose("127.0.0.2") == "eth7"
