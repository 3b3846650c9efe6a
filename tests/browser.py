"""Chromium without a window, over its DevTools protocol: by two pipes, for which Python needs no package.

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
# It reads commands from descriptor 3 and answers on 4.
STARTER = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
PATIENCE_SECONDS = 60.0


class Browser:
    """One Chromium, with a new profile in `profile`."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        commands, answers = os.pipe(), os.pipe()
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1])]  # not 3 or 4 themselves
        self._write, self._read = commands[1], answers[0]
        arguments = [sys.executable, "-c", STARTER, *map(str, given), PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            arguments, pass_fds=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (*given, commands[0], answers[1]):
            os.close(end)
        self._buffer, self._asked = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.ask("Browser.close")
            self._process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def ask(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        """Send a command; returns its result."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._asked:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def wait_for(self, method: str, session: str) -> None:
        """Until an event has happened."""
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self._next()

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> "Page":
        """A new tab of that size with `file` loaded; below 600 pixels it is a phone's."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", session, features=[scheme])
        self.ask("Page.navigate", session, url=file.resolve().as_uri())
        self.wait_for("Page.loadEventFired", session)
        return Page(self, session)

    def _next(self) -> dict[str, Any]:
        """The next message; an event is kept."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{PROGRAM} said nothing for {PATIENCE_SECONDS:.0f} s")
            read = os.read(self._read, 1 << 20)
            if not read:
                raise OSError(f"{PROGRAM} ended with {self._process.wait()}")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self._browser.ask("Runtime.evaluate", self._session, expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """The mouse, to a place in the window."""
        self._browser.ask("Input.dispatchMouseEvent", self._session, type="mouseMoved", x=x, y=y)

    def screenshot(self, whole: bool = True) -> bytes:
        """A PNG of the page, or of what the window shows of it."""
        size = self._browser.ask("Page.getLayoutMetrics", self._session)["cssContentSize"]
        clip = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True} if whole else {}
        return base64.b64decode(self._browser.ask("Page.captureScreenshot", self._session, **clip)["data"])

    def complaints(self) -> list[str]:
        """What was said on the console, thrown or logged by the browser."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events() if event["method"] in kinds]

    def requests(self) -> list[str]:
        """What was asked for, data: URIs apart."""
        asked = [event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [url for url in asked if not url.startswith("data:")]

    def _events(self, method: str | None = None) -> list[dict[str, Any]]:
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event for event in mine if method in (None, event["method"])]
