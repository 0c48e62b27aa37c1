"""Drive the system's Chromium, headless, through its DevTools pipe.

Tests see real widths, colour schemes, keys and clicks.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


class Browser:
    """A Chromium process that takes commands of the Chrome DevTools Protocol.

    Close it, or use it in a `with` statement.
    """

    def __init__(self, profile: Path, *flags: str) -> None:
        assert CHROMIUM is not None
        ours, theirs = _pipe(), _pipe()

        def connect() -> None:  # Chromium reads commands from 3 and answers on 4
            os.dup2(ours[0], 3)
            os.dup2(theirs[1], 4)

        command = [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={profile}",
            *flags,
            "about:blank",  # no start page
        ]
        self.process = subprocess.Popen(
            command,
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in = os.fdopen(ours[1], "wb"), os.fdopen(theirs[0], "rb")
        self._buffer, self._last = b"", 0

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and its children."""
        with contextlib.suppress(OSError, RuntimeError):
            self.call("Browser.close")
        self._out.close()
        self.process.wait(timeout=30)
        self._in.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its answer.

        Raises RuntimeError with the browser's message when the command fails.
        """
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._read()).get("id") != self._last:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    @contextlib.contextmanager
    def page(
        self,
        url: str = "about:blank",
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        script: bool = True,
    ) -> Iterator[Page]:
        """Open a tab of this size and colour scheme and load an address in it.

        `script=False` disables scripts.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(
            self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        )
        page.size(width, height)
        page.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        page.call("Emulation.setScriptExecutionDisabled", value=not script)
        page.goto(url)
        yield page
        self.call("Target.closeTarget", targetId=target)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            got = os.read(self._in.fileno(), 1 << 20)
            if not got:
                raise RuntimeError(f"the browser ended (exit status {self.process.poll()})")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


@dataclass(frozen=True, slots=True)
class Page:
    """A tab of a browser."""

    browser: Browser
    session: str

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this tab."""
        return self.browser.call(method, self.session, **params)

    def goto(self, url: str) -> None:
        """Load an address and wait until the page and its pictures are complete."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until a JavaScript condition holds.

        Raises TimeoutError after `seconds`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):  # a page that is unloading has no context
                if self.run(condition):
                    return
            time.sleep(0.02)
        raise TimeoutError(condition)

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or of the promise that it gives.

        Raises RuntimeError when the expression throws.
        """
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(
                answer["exceptionDetails"].get("exception", {}).get("description") or "it threw"
            )
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys by name (`Tab`, `Enter`), or type single characters."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = KEYS.get(key, ord(key[0].upper()))
            name = {" ": "Space"}.get(key, key)
            for kind in ("keyDown", "keyUp"):
                extra = {"text": text} if text and kind == "keyDown" else {}
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=name,
                    windowsVirtualKeyCode=code,
                    **extra,
                )

    def point_at(self, element: str, x: float, y: float) -> None:
        """Move the mouse over an element, given in JavaScript.

        `x` and `y` are thousandths of the element's width and height.
        """
        left, top, width, height = self.run(
            "(({left, top, width, height}) => [left, top, width, "
            f"height])({element}.getBoundingClientRect())"
        )
        self.call(
            "Input.dispatchMouseEvent",
            type="mouseMoved",
            x=left + x * width / 1000,
            y=top + y * height / 1000,
        )

    def size(self, width: int, height: int) -> None:
        """Resize the tab to this size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save the visible part of the tab, or the whole page, as PNG."""
        clip = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip["clip"] = {
                "x": 0,
                "y": 0,
                "width": size["width"],
                "height": size["height"],
                "scale": 1,
            }
        answer = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip
        )
        path.write_bytes(base64.b64decode(answer["data"]))


class Listener(BaseHTTPRequestHandler):
    """Proxy handler that records requested addresses and answers nothing."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Proxy)
        self.server.asked.append(self.path)
        self.send_error(404)

    def do_CONNECT(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    """Proxy that receives all network requests of a browser."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Listener)
        self.asked: list[str] = []

    @property
    def from_pages(self) -> list[str]:
        """Return the requests of pages, without those that the browser sends by itself."""
        google = r"(google|googleapis|gvt1|gstatic)\.com"
        return [path for path in self.asked if not re.search(google, path)]


@contextlib.contextmanager
def proxied_browser(profile: Path) -> Iterator[tuple[Browser, Proxy]]:
    """Start a browser and the proxy that receives all its requests."""
    with Proxy() as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            with Browser(
                profile, f"--proxy-server=http://127.0.0.1:{proxy.server_port}"
            ) as browser:
                yield browser, proxy
        finally:
            proxy.shutdown()
            thread.join()


def violations(page: Page) -> list[str]:
    """Return the rule and element of each axe-core violation, best practices included."""
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None or package.origin is None:
        pytest.skip("axe-core is not installed: pip install --no-deps axe-playwright-python")
    page.run((Path(package.origin).parent / "axe.min.js").read_text() + "; true")
    report: dict[str, Any] = page.run("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['html'][:200]}"
        for one in report["violations"]
        for node in one["nodes"]
    ]


def _pipe() -> tuple[int, int]:
    """Return a pipe whose ends are not 3 or 4, the numbers that the child uses."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
