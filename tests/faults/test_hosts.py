"""Runs on two emulated hosts, network namespaces joined by a veth pair, with two ranks each over gloo.

As on Debian, /etc/hosts maps the host's own name to 127.0.1.1, which the other host cannot connect to.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.runs import TINY, Process, fork, kill_all, start, wait_for, wait_for_step

RANKS_PER_HOST = 2
OPTIONS = [*TINY, "--data.workers=0", "--max_steps=60", "--checkpoint_every=0.1", "--stall_timeout=5"]
LIMIT_SECONDS = 300


class Host:
    """A network namespace with one network device."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        self.device = f"{name}-0"
        self._hosts_file = folder / f"{name}.hosts"

    def connect(self, other: "Host") -> None:
        """Write /etc/hosts, set the address, and bring the devices up. Both namespaces and the veth pair must exist."""
        names = {"127.0.0.1": "localhost", "127.0.1.1": self.name, other.address: other.name}
        self._hosts_file.write_text("".join(f"{address} {name}\n" for address, name in names.items()))
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", self.device)
        ip("-n", self.name, "link", "set", "lo", "up")
        self.set_link("up")

    def set_link(self, state: str) -> None:
        """state: "up" or "down", which cuts the host off."""
        ip("-n", self.name, "link", "set", self.device, state)

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command that runs the rest of its command line on this host."""
        enter = f'hostname {self.name} && mount --bind {self._hosts_file} /etc/hosts && exec "$@"'
        return ("ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", "sh", "-c", enter, "sh")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: iproute2 is not installed")
    first, second = (Host(f"fs{os.getpid()}{end}", f"10.213.7.{n}", tmp_path) for n, end in ((1, "a"), (2, "b")))
    try:
        for host in (first, second):
            ip("netns", "add", host.name)
        peer = ("peer", second.device, "netns", second.name)
        ip("link", "add", first.device, "netns", first.name, "type", "veth", *peer)
        first.connect(second)
        second.connect(first)
        subprocess.run([*first.prefix, "true"], check=True, capture_output=True, text=True)
        yield first, second
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    finally:
        kill_all()
        for host in (first, second):
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def losses(run: Path) -> list[float]:
    """The losses of all steps, without those that a restart has repeated."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert list(found) == list(range(1, 61))
    return list(found.values())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of four ranks on one host."""
    run = tmp_path_factory.mktemp("one_host") / "run"
    for rank in fork(*OPTIONS, f"--output={run}", ranks=2 * RANKS_PER_HOST):
        rank.end(LIMIT_SECONDS)
    return losses(run)


def test_tasks_of_srun_on_two_hosts(hosts: tuple[Host, Host], tmp_path: Path, expected: list[float]) -> None:
    """With the variables that srun sets for two nodes with two tasks each."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": ",".join(host.name for host in hosts),
    }
    tasks = []
    for rank in range(4):
        node, local = divmod(rank, RANKS_PER_HOST)
        task = {"SLURM_NODEID": str(node), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local)}
        tasks.append(start(*OPTIONS, f"--output={tmp_path / 'run'}", prefix=hosts[node].prefix, **job, **task))
    for each in tasks:
        each.end(LIMIT_SECONDS)
    assert losses(tmp_path / "run") == expected


def torchrun(hosts: tuple[Host, Host], number: int, run: Path) -> Process:
    """Start torchrun on a host, with the settings of docs/cluster.md. The rendezvous is on the first one."""
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].name}:29400", "--rdzv-id=run")
    silent_after = "--rdzv-conf=keep_alive_interval=2,keep_alive_max_attempt=3"  # 6 s instead of 15
    return start(
        *OPTIONS,
        f"--output={run}",
        ranks=RANKS_PER_HOST,
        torchrun=("--nnodes=2", "--max-restarts=3", *rendezvous, silent_after),
        prefix=hosts[number].prefix,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )


def test_a_host_that_is_cut_off_and_comes_back(hosts: tuple[Host, Host], tmp_path: Path, expected: list[float]) -> None:
    run = tmp_path / "run"
    jobs = [torchrun(hosts, number, run) for number in range(2)]
    wait_for_step(jobs[0], run, 20)
    hosts[1].set_link("down")
    for job in jobs:
        wait_for(lambda job=job: "fastsimclr.train: error: " in job.errors, job, LIMIT_SECONDS)
    hosts[1].set_link("up")
    for job in jobs:
        job.end(LIMIT_SECONDS)
    assert "resumed from" in jobs[0].output
    assert losses(run) == pytest.approx(expected, rel=1e-6)


def test_a_host_that_is_preempted_and_comes_back(
    hosts: tuple[Host, Host], tmp_path: Path, expected: list[float]
) -> None:
    run = tmp_path / "run"
    first, second = (torchrun(hosts, number, run) for number in range(2))
    wait_for_step(first, run, 20)
    second.send_signal(signal.SIGTERM)
    assert second.wait(LIMIT_SECONDS) == 1
    assert "stopped by SIGTERM at step" in first.output
    second = torchrun(hosts, 1, run)
    for job in (first, second):
        job.end(LIMIT_SECONDS)
    assert "resumed from" in first.output
    assert losses(run) == pytest.approx(expected, rel=1e-6)
