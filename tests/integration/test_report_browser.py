"""The report in a real browser: it loads nothing, runs nothing, and fits the screen, light and dark."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from analysis.report import write_report
from harness.rundir import Status
from tests.unit.analysis.synthetic import Sweep, Trial, example, params, write_sweep

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
HOSTILE = (
    "<script>document.title = 'ran'</script>"
    "<script src='http://report.test/a.js'></script>"
    "<img src='http://report.test/b.png' onerror=\"document.title = 'ran'\">"
    "<style>@import 'http://report.test/c.css';</style> 3 + 4 = 7"
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH: apt-get install chromium")


class Listener(BaseHTTPRequestHandler):
    """A proxy that notes what was asked for and answers nothing."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Proxy)
        self.server.asked.append(self.path)
        self.send_error(404)

    def do_CONNECT(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    """Everything a browser asks the network for goes through here."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Listener)
        self.asked: list[str] = []

    @property
    def from_pages(self) -> list[str]:
        """What was asked for, the browser's own calls home aside."""
        own = r"(google|googleapis|gvt1|gstatic)\.com"
        return [path for path in self.asked if not re.search(own, path)]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A listening proxy."""
    server = Proxy()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep whose winner's completions, and a failed trial's reason, are hostile."""
    trials = [
        *example().trials[:10],
        Trial(5, 0, params(8, 1e-2), 0.3, Status.FAILED, HOSTILE, last_step=20),
        Trial(6, 0, params(8, 1e-3), 0.97, completion=HOSTILE),
        Trial(6, 1, params(8, 1e-3), 0.96, completion=HOSTILE),
    ]
    return write_report(write_sweep(tmp_path_factory.mktemp("browser"), Sweep(trials))).path


def browse(page: Path, *flags: str, profile: Path) -> str:
    """Open a page in the browser and return what it prints."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def through(proxy: Proxy) -> list[str]:
    return [f"--proxy-server=http://127.0.0.1:{proxy.server_port}", "--virtual-time-budget=3000", "--dump-dom"]


def title(dom: str) -> str:
    found = re.search(r"<title>(.*?)</title>", dom, flags=re.DOTALL)
    assert found is not None
    return html.unescape(found[1])


def test_nothing_is_loaded_and_no_script_runs(report: Path, proxy: Proxy, tmp_path: Path) -> None:
    dom = browse(report, *through(proxy), profile=tmp_path / "profile")
    assert title(dom) == "lora_sweep: LoRA sweep report"
    assert html.escape("<script>document.title = 'ran'</script>", quote=False) in dom
    assert proxy.from_pages == []


def test_the_proxy_would_have_seen_it(proxy: Proxy, tmp_path: Path) -> None:
    page = tmp_path / "control.html"
    page.write_text(f"<!doctype html><title>quiet</title>{HOSTILE}")
    dom = browse(page, *through(proxy), profile=tmp_path / "profile")
    assert title(dom) == "ran"
    assert {"http://report.test/a.js", "http://report.test/b.png"} <= set(proxy.from_pages)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_the_screen(report: Path, tmp_path: Path, width: int) -> None:
    # In a frame of that width: a window would not be made narrower than 500.
    script = "<script>parent.document.title = `${innerWidth} ${document.documentElement.scrollWidth}`</script>"
    page = re.sub(r"<meta http-equiv=.*?>", "", report.read_text()).replace("</body>", f"{script}</body>")
    probe = tmp_path / "probe.html"
    style = f"width: {width}px; height: 900px; border: 0"
    probe.write_text(
        f"<!doctype html><title>probe</title><iframe style='{style}' srcdoc='{html.escape(page)}'></iframe>"
    )
    dom = browse(probe, "--virtual-time-budget=3000", "--dump-dom", profile=tmp_path / "profile")
    assert title(dom) == f"{width} {width}"


def test_light_and_dark_pages_are_drawn(report: Path, tmp_path: Path) -> None:
    for name, flags, paper in (
        ("light", [], [0xF4, 0xF5, 0xF6]),
        ("dark", ["--blink-settings=preferredColorScheme=0"], [0x14, 0x18, 0x1C]),
    ):
        shot = tmp_path / f"{name}.png"
        flags = [*flags, "--window-size=1280,4000", f"--screenshot={shot}"]
        browse(report, *flags, profile=tmp_path / f"profile-{name}")
        pixels = (imread(shot)[..., :3] * 255).round().astype(int)
        assert pixels.shape == (4000, 1280, 3)
        assert pixels[5, 5].tolist() == paper
        colours = np.unique(pixels @ [1, 2**8, 2**16])
        assert len(colours) > 200, "figures, text and tables are there"
