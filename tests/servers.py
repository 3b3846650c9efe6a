"""HTTP servers on loopback that fail on demand: one of files, and one that forwards to moto's S3 server."""

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


class Server:
    """A server in a thread, with a log of the requests. faults: kinds of `_Handler.fail`, picked at random by seed.

    fault_rate: fraction of the requests that fail. fail_next: fails that many. delay_s: before each answer.
    """

    def __init__(self) -> None:
        self.faults: tuple[str, ...] = ("503", "drop", "truncate")
        self.fault_rate, self.fail_next, self.delay_s = 0.0, 0, 0.0
        self.requests: Counter[tuple[str, str]] = Counter()  # by method and path
        self.failed: Counter[str] = Counter()
        self.bytes_sent = 0
        self._random, self._lock = random.Random(0), threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        raise NotImplementedError

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests[method, path] += 1
            fails = self.fail_next > 0 or self._random.random() < self.fault_rate
            self.fail_next = max(0, self.fail_next - 1)
            if not fails:
                return None
            fault = self._random.choice(self.faults)
            self.failed[fault] += 1
            return fault

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "Any":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileServer(Server):
    """Serves the files of a folder. ranges: answer requests for a range of bytes with that range."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self.ranges = True

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        file = self._folder / path.partition("?")[0].lstrip("/")
        if not file.is_file():
            return 404, {}, b""
        content, etag = file.read_bytes(), {"ETag": f'"{file.stat().st_mtime_ns}"'}
        wanted = headers.get("range")
        if wanted is None or not self.ranges:
            return 200, etag, content
        start, end = map(int, wanted.removeprefix("bytes=").split("-"))
        if start >= len(content):
            return 416, {}, b""
        part = content[start : end + 1]
        return 206, etag | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}, part


class Proxy(Server):
    """Forwards to a server on loopback."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            dropped = ("connection", "transfer-encoding", "server", "date")
            kept = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
            return response.status, kept, response.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.owner.next_fault(self.command, self.path)
        time.sleep(self.owner.delay_s)
        if fault is not None and self.fail(fault):
            return
        status, answered, content = self.owner.answer(self.command, self.path, headers, body)
        cut = len(content) // 2 if fault == "truncate" else len(content)
        self.send_response(status)
        for name, value in answered.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        known = next((value for name, value in answered.items() if name.lower() == "content-length"), len(content))
        shorter = fault == "short"  # an answer that is complete by its header
        self.send_header("Content-Length", str(len(content) // 2 if shorter else known))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2 if shorter else cut])
            self.owner.bytes_sent += len(content)
        if fault == "truncate":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = handle_one

    def fail(self, fault: str) -> bool:
        """Answer with a fault. Returns False for those that change the regular answer: truncate, short."""
        if fault == "drop":
            self.close_connection = True
        elif fault == "hang":
            time.sleep(1)
            self.close_connection = True
        elif fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            return False
        return True

    def log_message(self, *_: object) -> None:
        pass


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away
