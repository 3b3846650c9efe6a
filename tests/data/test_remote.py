"""Images at URLs: the same views as from disk through a server that fails, and what is not repeated, kept or shown."""

import logging
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pictures import photo_folder
from servers import FileServer, Proxy

from fastsimclr import Augmentation
from fastsimclr.data import Batch, open_source, open_views, remote, remote_requests
from fastsimclr.data.sources import EncodedSource
from fastsimclr.data.storage import UnreachableStorage
from fastsimclr.data.storage_options import StorageOptions
from fastsimclr.errors import UserError

IMAGES = 23
SMALL = Augmentation(image_size=24)
KEY, SECRET = "AKIAOFATEST", "secret-of-a-test"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/CLASS/NAME and the same in train-000.tar and train-001.tar."""
    root = tmp_path_factory.mktemp("data")
    photo_folder(root / "photos", IMAGES)
    for shard in range(2):
        with tarfile.open(root / f"train-{shard:03d}.tar", "w") as tar:
            for file in sorted((root / "photos").rglob("*.*"))[shard::2]:
                tar.add(file, file.relative_to(root / "photos"))
    return root


@pytest.fixture
def server(data: Path) -> Iterator[FileServer]:
    with FileServer(data) as server:
        yield server


@pytest.fixture(scope="module")
def s3(data: Path) -> Iterator[Proxy]:
    """A proxy to moto's S3 server with the bucket `bucket`. Credentials and address are in the environment."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch, Proxy(port) as proxy:
        for name, value in {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": proxy.url,
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="bucket")
        for file in data.rglob("*.*"):
            client.upload_file(str(file), "bucket", str(file.relative_to(data)))
        client.close()
        yield proxy
    server.stop()


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_requests, "ATTEMPTS", 3)


def views(data: object, backend: str, workers: int, epochs: int = 1, **storage: object) -> list[Batch]:
    loader = open_views(data, SMALL, 5, backend=backend, workers=workers, storage=StorageOptions(**storage))  # type: ignore[arg-type]
    try:
        return [batch for _ in range(epochs) for batch in loader]
    finally:
        loader.close()


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        for name in ("index", "label"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert all(map(torch.equal, one.views, other.views))


def read_all(source: object) -> list[bytes]:
    assert isinstance(source, EncodedSource)
    return [source.read(index).tobytes() for index in range(len(source))]


@pytest.mark.slow  # starts workers
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("backend", "workers"), [("torchvision", 2), ("dali", 2)])
@pytest.mark.parametrize(("url", "path"), [("s3://bucket/train-{000..001}.tar",) * 2, ("s3://bucket/photos",) * 2])
def test_views_from_a_failing_s3_server_are_those_from_disk(
    url: str, path: str, backend: str, workers: int, cached: bool, s3: Proxy, data: Path, tmp_path: Path
) -> None:
    expected = views(str(data / path.removeprefix("s3://bucket/")), backend, workers, epochs=2)
    s3.fault_rate, s3.fail_next = 0.1, 1  # at least one of the few requests fails
    s3.failed.clear()
    got = views(url, backend, workers, epochs=2, local_cache=str(tmp_path / "cache") if cached else None)
    s3.fault_rate = 0
    assert sum(s3.failed.values()) > 0
    assert_equal(got, expected)


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "truncate", "short"])
def test_passing_failures_are_repeated(fault: str, server: FileServer, data: Path) -> None:
    source = open_source(f"{server.url}/train-{{000..001}}.tar")
    server.faults, server.fail_next = (fault,), 2
    assert read_all(source) == read_all(open_source(str(data / "train-{000..001}.tar")))
    assert server.failed == {fault: 2}


def test_a_server_that_hangs_is_asked_again(server: FileServer, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_requests, "_READ_S", 0.2)
    remote_requests._make_file_system.cache_clear()
    server.faults, server.fail_next = ("hang",), 1
    content = (data / "train-000.tar").read_bytes()
    assert remote_requests.fetch(f"{server.url}/train-000.tar", 100, 1000).tobytes() == content[100:1100]
    remote_requests._make_file_system.cache_clear()


@pytest.mark.parametrize(("fault", "kind"), [("404", FileNotFoundError), ("403", UnreachableStorage)])
def test_other_failures_are_not_repeated(fault: str, kind: type[Exception], server: FileServer) -> None:
    server.faults, server.fail_next = (fault,), 1
    with pytest.raises(kind, match=f"got HTTP {fault}"):
        remote_requests.fetch(f"{server.url}/train-000.tar", 0, 10)
    assert server.requests.total() == 1


@pytest.mark.usefixtures("fast_retries")
def test_a_read_is_given_up(server: FileServer) -> None:
    server.faults, server.fail_next = ("503",), 1000
    with pytest.raises(UnreachableStorage, match=r"train-000.tar: got HTTP 503 in 3 attempts and \d s, expected"):
        remote_requests.fetch(f"{server.url}/train-000.tar", 0, 10)
    server.faults = ("short",)
    with pytest.raises(OSError, match=r"got 5 of 10 bytes in 3 attempts"):
        remote_requests.fetch(f"{server.url}/train-000.tar", 0, 10)


def test_what_is_not_there(server: FileServer, s3: Proxy) -> None:
    for url, message in {
        f"{server.url}/train-{{000..002}}.tar": r"train-002.tar: got HTTP 404, no such file, expected a tar shard",
        "s3://bucket/train-{000..002}.tar": r"train-002.tar: got HTTP 404, no such file, expected a tar shard",
        "s3://bucket/none-*.tar": "none-\\*.tar: got no file that matches, expected tar shards",
        "s3://bucket/none": "none: got no file in it, expected a folder of images",
        "s3://other/train-000.tar": "s3://other/train-000.tar: got HTTP 404",
        f"{server.url}/photos": "got a folder or a glob at http://, which cannot list its files; expected URLs of tar",
    }.items():
        with pytest.raises(UserError, match=message):
            open_source(url)


def test_a_server_without_ranges_is_refused(server: FileServer) -> None:
    source = open_source(f"{server.url}/train-000.tar")
    assert isinstance(source, EncodedSource)
    server.ranges = False
    with pytest.raises(UnreachableStorage, match="the server ignores the range of a request"):
        source.read(0)
    assert server.requests["GET", "/train-000.tar"] == 2  # one for the headers


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gcsfs is not installed; pip install 'fastsimclr\[remote\]'"):
        open_source("gs://bucket/train-{000..001}.tar")


def test_the_next_reads_are_under_way_before_they_are_needed(server: FileServer) -> None:
    source = open_source(f"{server.url}/train-{{000..001}}.tar")
    assert isinstance(source, EncodedSource)
    server.delay_s = 0.2
    source.plan_reads(range(IMAGES))
    start = time.monotonic()
    read_all(source)
    assert time.monotonic() - start < 8 * server.delay_s  # one after another, they take 23 times the delay
    source.plan_reads(range(3))
    source.plan_reads(range(2, 5))  # 2 is kept; 0 and 1 are dropped
    assert source.storage._ahead._started.keys() == {source.extent(i) for i in (2, 3, 4)}  # type: ignore[attr-defined]


def test_queries_and_passwords_are_not_shown(server: FileServer) -> None:
    signed = f"{server.url}/train-{{000..001}}.tar?X-Amz-Signature=5ecret"
    source = open_source(signed)
    assert isinstance(source, EncodedSource)
    source.read(0)
    assert all("5ecret" in path for _, path in server.requests)
    server.faults, server.fail_next = ("403",), 1
    with pytest.raises(UnreachableStorage, match="got HTTP 403") as caught:
        source.read(0)
    assert "5ecret" not in f"{caught.value} {source.name(0)} {source.key(0)} {source!r} {source.storage!r}"
    with pytest.raises(UserError, match="got a URL with a user name or password") as caught:
        open_source("https://me:5ecret@example.org/train-000.tar")
    assert "5ecret" not in str(caught.value)


def test_each_image_is_fetched_once_with_a_cache(server: FileServer, data: Path, tmp_path: Path) -> None:
    url, cache = f"{server.url}/train-{{000..001}}.tar", {"local_cache": str(tmp_path)}
    expected = views(str(data / "train-{000..001}.tar"), "torchvision", 0, epochs=2)
    assert_equal(views(url, "torchvision", 0, epochs=2, **cache), expected)
    requests = server.requests.total()
    assert requests == 2 * 2 + IMAGES  # HEAD and headers of two shards
    damaged = next(file for file in tmp_path.rglob("*") if file.is_file() and file.name != "usage")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_equal(views(url, "torchvision", 0, epochs=2, **cache), expected)
    assert server.requests.total() == requests + 2 + 1  # the headers are in the index


def test_without_room_images_are_fetched_again(server: FileServer, data: Path, tmp_path: Path) -> None:
    """The cache holds a few of the images."""
    source = open_source(f"{server.url}/train-{{000..001}}.tar")
    limit = 40_000
    remote.use_local_cache(source, StorageOptions(str(tmp_path), limit / 1e9))
    for _ in range(3):
        assert read_all(source) == read_all(open_source(str(data / "train-{000..001}.tar")))
        files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "usage"]
        assert 0 < sum(file.stat().st_size for file in files) <= limit


def test_a_changed_file_is_not_taken_from_the_cache(tmp_path: Path, data: Path) -> None:
    content = (data / "train-000.tar").read_bytes()
    with FileServer(tmp_path) as server:
        for version in (content, content.replace(b"\xff\xd8", b"\xff\xd9")):
            (tmp_path / "train.tar").write_bytes(version)
            source = open_source(f"{server.url}/train.tar")  # not from the index of the other version
            remote.use_local_cache(source, StorageOptions(str(tmp_path / "cache")))
            assert isinstance(source, EncodedSource)
            _, offset, size = source.extent(0)
            assert size is not None
            assert source.read(0).tobytes() == version[offset : offset + size]


@pytest.mark.slow  # trains in processes
def test_no_credential_is_in_the_files_and_output_of_a_run(server: FileServer, s3: Proxy, tmp_path: Path) -> None:
    options = ["--model.encoder=resnet18", "--model.width=0.125", "--data.image_size=32", "--batch_size=8"]
    options += ["--device=cpu", "--epochs=1", "--knn_every=0", f"--data.local_cache={tmp_path / 'cache'}"]
    for name, url in ("s3", "s3://bucket/train-*.tar"), ("https", f"{server.url}/train-{{000..001}}.tar?sig=5ecret"):
        command = [sys.executable, "-m", "fastsimclr.train", f"--data.train={url}", f"--output={tmp_path / name}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        written = "".join(file.name + file.read_bytes().decode("latin1") for file in files)
        for secret in ("5ecret", KEY, SECRET):
            assert secret not in written + done.stdout + done.stderr
    assert any("sig=5ecret" in path for _, path in server.requests)
