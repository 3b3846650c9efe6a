"""Requests to remote file systems through fsspec: ranges of bytes, listings, and retries of what fails.

A request that fails for a passing reason is repeated. File systems, threads and connections are made in the process
that uses them, whose libraries find the credentials.
"""

import errno
import functools
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.storage import UnreachableStorage
from fastsimclr.data.urls import redacted
from fastsimclr.errors import UserError

Result = TypeVar("Result")

ATTEMPTS = 10
TOTAL_S = 180.0
"""A read is given up after this many attempts or seconds. Between them it waits 0.1 s, doubled each time up to 20 s,
less a random part of up to half of that."""
THREADS = 32
"""Requests at the same time per process: 640 images/s at 50 ms."""
_MAX_PAUSE_S = 20.0
_CONNECT_S, _READ_S = 10.0, 30.0  # time-outs of https
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp", "http": "aiohttp"}


def fetch(url: str, offset: int, size: int, query: str = "") -> NDArray[np.uint8]:
    """Read `size` bytes of a remote file. Raises OSError and UnreachableStorage like `RemoteFiles.read`."""

    def attempt() -> NDArray[np.uint8]:
        data = _file_system(_scheme(url), os.getpid()).cat_file(url + query, start=offset, end=offset + size)
        if len(data) > size:
            raise _Refused(f"{len(data)} bytes instead of {size}: the server ignores the range of a request")
        if len(data) < size:
            raise _Truncated(f"{len(data)} of {size} bytes")
        return np.frombuffer(bytearray(data), np.uint8)  # a copy that can be written to, as torch expects

    return with_retries(attempt, url)


def with_retries(attempt: Callable[[], Result], url: str) -> Result:
    """Return what `attempt` returns, calling it again if it fails for a reason that may pass.

    Raises FileNotFoundError if there is no such file, OSError if all answers are truncated, both with the reason as
    strerror, and UnreachableStorage for any other failure. url: for the error.
    """
    start = time.monotonic()
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # each library raises its own
            status, root = _status(error), _root(error)
            passing = _may_pass(status, root)
            reason = f"got HTTP {status}" if status else f"got {redacted(str(root)) or type(root).__name__}"
            reason = " ".join(reason.split())[:200]
            missing = status == 404 or (status is None and isinstance(root, FileNotFoundError))
            truncated = status == 416 or isinstance(root, _Truncated)  # 416: the range is past the end
        pause = min(_MAX_PAUSE_S, 0.1 * 2 ** (number - 1)) * random.SystemRandom().uniform(0.5, 1)
        if not passing or number == ATTEMPTS or time.monotonic() + pause - start > TOTAL_S:
            break
        time.sleep(pause)
    # Raised here, not in the handler: the library's error may hold the URL with its query.
    tried = f" in {number} attempts and {time.monotonic() - start:.0f} s" if passing else ""
    if missing:
        raise FileNotFoundError(errno.ENOENT, "got HTTP 404, no such file", url)
    if truncated:
        raise OSError(errno.EIO, reason + tried, url)
    advice = "check the network and the server" if passing else "check the credentials and the access to it"
    raise UnreachableStorage(f"{url}: {reason}{tried}, expected its bytes: {advice}")


def list_files(url: str) -> dict[str, dict[str, Any]]:
    """Return what fsspec reports of each file below a folder, or that matches a glob, by its URL in sorted order.

    Raises UserError if there are none or the file system cannot list them.
    """
    scheme = _scheme(url)
    if scheme.startswith("http"):
        raise UserError(
            f"{url}: got a folder or a glob at {scheme}://, which cannot list its files; expected URLs of tar shards, "
            f"such as '{scheme}://…/train-{{000..127}}.tar'"
        )
    is_glob = any(c in url for c in "*?[")
    files = _file_system(scheme, os.getpid(), True)
    listing = functools.partial(files.glob if is_glob else files.find, url.rstrip("/"), detail=True)
    try:
        found = with_retries(listing, url)
    except FileNotFoundError:
        found = {}
    listed = {f"{scheme}://{name}": info for name, info in sorted(found.items()) if info["type"] == "file"}
    if not listed:
        got = "no file that matches, expected tar shards" if is_glob else "no file in it, expected a folder of images"
        raise UserError(f"{url}: got {got}")
    return listed


def examine_files(urls: Sequence[str], query: str = "") -> dict[str, dict[str, Any]]:
    """Return what fsspec reports of each URL. Raises UserError for one that does not exist or has no known size."""

    def info(url: str) -> dict[str, Any]:
        return with_retries(lambda: _file_system(_scheme(url), os.getpid()).info(url + query), url)

    try:
        return dict(zip(urls, map_in_threads(info, urls), strict=True))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}, expected a tar shard") from None


def map_in_threads(function: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
    """Return the function's results for the items, in their order. The first error ends it."""
    futures = [submit(functools.partial(function, item)) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def submit(task: Callable[[], Result]) -> "Future[Result]":
    """Run a task on one of this process's threads."""
    return _threads(os.getpid()).submit(task)


class _Threads:
    """Threads that run reads. Unlike those of an executor, they do not delay the end of the process."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        for number in range(THREADS):
            threading.Thread(target=self._run, name=f"fastsimclr-fetch-{number}", daemon=True).start()

    def submit(self, task: Callable[[], Result]) -> "Future[Result]":
        future: Future[Result] = Future()
        self._tasks.put((future, task))
        return future

    def _run(self) -> None:
        while True:
            future, task = self._tasks.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
            del future, task  # not until the next one


@functools.cache
def _threads(process: int) -> _Threads:
    """Return the threads of this process, which a fork does not inherit."""
    return _Threads()


_making = threading.Lock()


def _file_system(scheme: str, process: int, lists: bool = False) -> Any:
    """Return fsspec's file system of this process.

    lists: for listings, of which each page is retried by the library; `with_retries` would begin with the first again.
    Raises UserError if its package is not installed.
    """
    with _making:
        return _make_file_system(scheme, process, lists)


@functools.cache
def _make_file_system(scheme: str, process: int, lists: bool) -> Any:
    options: dict[str, Any] = {}
    try:
        import fsspec

        if scheme == "s3":
            retries = {"mode": "standard", "total_max_attempts": ATTEMPTS if lists else 1}
            options["config_kwargs"] = {"retries": retries, "max_pool_connections": THREADS}
        elif scheme.startswith("http"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # proxies, ~/.netrc
            options["headers"] = {"Accept-Encoding": "identity"}
        files = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        raise UserError(
            f"{scheme}://: got a URL, for which {_PACKAGES[scheme]} is not installed; pip install 'fastsimclr[remote]'"
        ) from error
    if scheme == "s3" and not lists:
        files.retries = 1
    return files


class _Truncated(OSError):
    """An answer that is shorter than what was requested."""


class _Refused(Exception):
    """An answer that another attempt would not change."""


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error of aiohttp, botocore, gcsfs or httpx, or of an error that it caused."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            name = "code" if type(error).__module__.startswith("gcsfs.") else "status"
            status = getattr(response, "status_code", None) or getattr(error, name, None)
        if isinstance(status, int | str) and str(status).isdigit():
            return int(status)
        error = error.__cause__
    return None


def _may_pass(status: int | None, root: BaseException) -> bool:
    """Return whether another attempt may succeed: after a time-out, a lost connection or a server's error."""
    if status is not None:
        return status in (408, 429) or status >= 500 or status < 400  # < 400: the body was cut off
    if isinstance(root, _Refused | FileNotFoundError | PermissionError | ValueError | TypeError):
        return False
    return "Credential" not in type(root).__name__  # botocore's, of several kinds


def _scheme(url: str) -> str:
    return url.partition("://")[0]
