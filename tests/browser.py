"""Headless Chromium controlled over the DevTools protocol through two pipes, which needs no Python package.

with Browser(tmp_path / "profile") as browser:
    page = browser.open(file, width=390, dark=True)
    assert page.evaluate("document.title") == "..."
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
FLAGS += ["--hide-scrollbars", "--remote-debugging-pipe"]
# Chromium reads commands from file descriptor 3 and writes responses to 4.
STARTER = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
TIMEOUT_SECONDS = 60.0


class Browser:
    """A Chromium process with a new profile in `profile`."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        commands, responses = os.pipe(), os.pipe()
        # Move them to 10 and above, so that they cannot be 3 or 4.
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], responses[1])]
        self._write, self._read = commands[1], responses[0]
        arguments = [sys.executable, "-c", STARTER, *map(str, inherited), PROGRAM, *FLAGS]
        arguments.append(f"--user-data-dir={profile}")
        self._process = subprocess.Popen(
            arguments, pass_fds=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (*inherited, commands[0], responses[1]):
            os.close(end)
        self._buffer, self._last_id = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        """Send a command and return its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            response = self._next()
            if response.get("id") == self._last_id:
                assert "error" not in response, (method, response)
                return response["result"]

    def wait_for(self, method: str, session: str) -> None:
        """Wait until an event has happened."""
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self._next()

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> "Page":
        """Open `file` in a new tab of this size and wait until it is loaded. A width below 600 emulates a phone."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", session, features=[scheme])
        self.send("Page.navigate", session, url=file.resolve().as_uri())
        self.wait_for("Page.loadEventFired", session)
        return Page(self, session)

    def _next(self) -> dict[str, Any]:
        """Return the next message; events are also appended to `events`."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{PROGRAM} sent nothing for {TIMEOUT_SECONDS:.0f} s")
            received = os.read(self._read, 1 << 20)
            if not received:
                raise OSError(f"{PROGRAM} exited with code {self._process.wait()}")
            self._buffer += received
        data, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(data)
        if "method" in message:
            self.events.append(message)
        return message


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self._browser.send("Runtime.evaluate", self._session, expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the mouse to (x, y) in the window."""
        self._browser.send("Input.dispatchMouseEvent", self._session, type="mouseMoved", x=x, y=y)

    def screenshot(self, whole: bool = True) -> bytes:
        """Return a PNG of the whole page, or of its visible part."""
        size = self._browser.send("Page.getLayoutMetrics", self._session)["cssContentSize"]
        clip = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True} if whole else {}
        return base64.b64decode(self._browser.send("Page.captureScreenshot", self._session, **clip)["data"])

    def complaints(self) -> list[str]:
        """Return console messages, uncaught exceptions and log entries."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events() if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Return the requested URLs, except data: URIs."""
        urls = [event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def _events(self, method: str | None = None) -> list[dict[str, Any]]:
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event for event in mine if method in (None, event["method"])]
