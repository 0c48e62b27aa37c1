"""Test the report in a real browser.

It loads nothing, runs nothing hostile, fits the screen, sorts, filters, and is accessible.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from analysis.report.write import read, write
from harness.records.run_dir import Status
from tests.integration.browser import CHROMIUM, Browser, Page, Proxy, proxied_browser, violations
from tests.unit.analysis.synthetic import Sweep, Trial, example, params, write_report, write_sweep

HOSTILE = (
    "<script>document.title = 'ran'</script>"
    "<script src='http://report.test/a.js'></script>"
    "<img src='http://report.test/b.png' onerror=\"document.title = 'ran'\">"
    "<style>@import 'http://report.test/c.css';</style> 3 + 4 = 7"
)
TRIALS = "document.getElementById('trial-table')"
SIZES = [(1280, False), (1280, True), (390, False), (390, True)]
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not on PATH: apt-get install chromium"
)


_OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
KINDS = [
    "sweep",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("live", "comparison", "empty")),
]


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Proxy]]:
    """Start a browser whose requests all go to a proxy."""
    with proxied_browser(tmp_path_factory.mktemp("profile")) as both:
        yield both


@pytest.fixture(scope="module")
def browser(watching: tuple[Browser, Proxy]) -> Browser:
    """Return the browser."""
    return watching[0]


@pytest.fixture(scope="module")
def proxy(watching: tuple[Browser, Proxy]) -> Proxy:
    """Return the proxy, which records what the browser requests."""
    return watching[1]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a sweep with hostile text in the winner's completions and a failed trial's reason."""
    trials = [
        *example().trials[:10],
        Trial(5, 0, params(8, 1e-2), 0.3, Status.FAILED, HOSTILE, last_step=20),
        Trial(6, 0, params(8, 1e-3), 0.97, completion=HOSTILE),
        Trial(6, 1, params(8, 1e-3), 0.96, completion=HOSTILE),
    ]
    return write_sweep(tmp_path_factory.mktemp("browser"), Sweep(trials))


@pytest.fixture(scope="module")
def report(sweep: Path) -> Path:
    """Return the hostile sweep's page."""
    return write_report(sweep).path


@pytest.fixture(scope="module")
def pages(report: Path, sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one page of each kind.

    These are a sweep, a running sweep, two sweeps, and a sweep without trials.
    """
    folder = tmp_path_factory.mktemp("pages")
    other = write_sweep(folder, Sweep(example().trials[2:6]), name="other")
    empty = write_sweep(folder, Sweep([], status=Status.RUNNING), name="empty")
    return {
        "sweep": report,
        "live": write_report(sweep, folder / "live", refresh=60).path,
        "comparison": write(read([sweep, other]), folder / "comparison").path,
        "empty": write_report(empty, folder / "none").path,
    }


def test_nothing_is_loaded_and_only_our_script_runs(
    report: Path, browser: Browser, proxy: Proxy
) -> None:
    before = len(proxy.from_pages)
    with browser.page(report.as_uri()) as page:
        assert page.run("document.title") == "lora_sweep: LoRA sweep report"
        assert page.run(f"document.body.innerText.includes({json.dumps(HOSTILE)})"), "shown as text"
        assert page.run("document.documentElement.classList.contains('scripted')"), "ours ran"
        assert page.run("document.scripts.length") == 1
    assert len(proxy.from_pages) == before


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.claim("A report shows text as text")
def test_the_content_policy_blocks_unescaped_scripts(
    report: Path, browser: Browser, proxy: Proxy, tmp_path: Path, guarded: bool
) -> None:
    broken = report.read_text().replace("</main>", f"{HOSTILE}</main>")
    if not guarded:  # the control: without the policy the script runs, and the test sees it
        broken = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", broken)
    path = tmp_path / "broken.html"
    path.write_text(broken)
    before = len(proxy.from_pages)
    with browser.page(path.as_uri()) as page:
        assert (page.run("document.title") == "ran") is not guarded
    asked = proxy.from_pages[before:]
    assert (
        asked == []
        if guarded
        else {"http://report.test/a.js", "http://report.test/b.png"} <= set(asked)
    )


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_as_wide_as_the_screen(
    pages: dict[str, Path], browser: Browser, kind: str, width: int
) -> None:
    with browser.page(pages[kind].as_uri(), width=width) as page:
        page.run(_OPEN_ALL)
        assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]


@pytest.mark.parametrize(
    ("dark", "paper"), [(False, [0xFF, 0xFF, 0xFF]), (True, [0x1C, 0x21, 0x26])]
)
def test_light_and_dark_pages_are_drawn(
    report: Path, browser: Browser, tmp_path: Path, dark: bool, paper: list[int]
) -> None:
    with browser.page(report.as_uri(), dark=dark) as page:
        page.run("document.querySelector('#figures img').scrollIntoView()")
        page.wait("document.querySelector('#figures img').complete")
        page.screenshot(tmp_path / "page.png", whole=False)
    pixels = (imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int)
    assert pixels[5, 5].tolist() == paper
    assert len(np.unique(pixels @ [1, 2**8, 2**16])) > 200, "a figure and text are there"


def test_every_picture_has_a_size_before_it_is_loaded(report: Path, browser: Browser) -> None:
    for width in (390, 1280):
        with browser.page(report.as_uri(), width=width) as page:
            page.run(_OPEN_ALL)
            heights = "[...document.images].map((one) => one.getBoundingClientRect().height)"
            before = page.run(heights)
            page.run(
                "document.querySelectorAll('img').forEach((one) => { one.loading = 'eager'; })"
            )
            page.wait("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
            assert page.run(heights) == pytest.approx(before, abs=2)
            assert min(before) > 100


def test_a_heading_sorts_by_keyboard_and_announces_it(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri()) as page:
        index = _column(page, "learning rate")
        numbers = _cells(page, 0)
        head = f"{TRIALS}.tHead.rows[0].cells[{index}]"
        page.run(f"{head}.querySelector('button').focus()")
        page.press("Enter")
        rates = [float(text) for text in _cells(page, index)]
        assert rates == sorted(rates)
        assert page.run(f"{head}.getAttribute('aria-sort')") == "ascending"
        assert (
            page.run("document.getElementById('said').textContent")
            == "Sorted by learning rate, ascending"
        )
        page.press(" ")
        assert [float(text) for text in _cells(page, index)] == sorted(rates, reverse=True)
        page.press("Enter")
        assert page.run(f"{head}.getAttribute('aria-sort')") == "none"
        assert _cells(page, 0) == numbers, "the original order"


def test_uncounted_scores_are_last_in_both_sort_orders(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri()) as page:
        index = _column(page, "held-out accuracy")
        button = f"{TRIALS}.tHead.rows[0].cells[{index}].querySelector('button')"
        for reverse in (False, True):
            page.run(f"{button}.click()")
            scores = _cells(page, index)
            counted = [float(text) for text in scores if text[0].isdigit()]
            assert counted == sorted(counted, reverse=reverse)
            assert all(not text[0].isdigit() for text in scores[len(counted) :])
            assert len(counted) == 11


def test_filter_by_text_column_and_status(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri()) as page:
        assert _filtered(page, "") == "13 of 13 trials"
        assert _filtered(page, "q_proj") == "2 of 13 trials"
        assert _filtered(page, "rank=1") == "4 of 13 trials"
        assert _filtered(page, "rank=1 learningrate=0.003") == "2 of 13 trials"
        assert _filtered(page, "winner") == "1 of 13 trials"
        assert _filtered(page, "", "FAILED") == "1 of 13 trials"
        assert _cells(page, 0, shown=True) == ["10"]
        assert _filtered(page, "<script>") == "1 of 13 trials"
        assert _filtered(page, "<script> q_proj") == "0 of 13 trials"
        assert page.run(f"{TRIALS}.tFoot.innerText") == "None of the trials matches."


def test_a_command_is_copied(report: Path, browser: Browser) -> None:
    browser.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    with browser.page(report.as_uri()) as page:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.run("document.querySelector('#answer .copy').focus()")
        page.press("Enter")
        page.wait("document.getElementById('said').textContent === 'Command copied'")
        shown = page.run("document.querySelector('#answer .command code').textContent")
        assert shown.startswith("python -m harness.")
        assert page.run("navigator.clipboard.readText()") == shown


def test_without_scripts_everything_is_shown_but_controls(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri(), script=False) as page:
        document = page.call("DOM.getDocument")["root"]["nodeId"]

        def count(selector: str) -> int:
            return len(
                page.call("DOM.querySelectorAll", nodeId=document, selector=selector)["nodeIds"]
            )

        def drawn(selector: str) -> bool:
            node = page.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
            try:
                page.call("DOM.getBoxModel", nodeId=node)
            except RuntimeError:  # the element has no box
                return False
            return True

        assert count("#trial-table tbody tr") == 13
        assert drawn("#trial-table tbody tr:last-child")
        assert drawn("#answer .command")
        assert not drawn(".tools")
        assert not drawn(".copy")
        assert count("thead button") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_trials_needs_no_horizontal_scrolling(
    pages: dict[str, Path], browser: Browser, kind: str
) -> None:
    with browser.page(pages[kind].as_uri()) as page:
        page.run(
            "document.querySelectorAll('#trial-table details').forEach((one) => "
            "{ one.open = true; })"
        )
        box = "document.getElementById('trial-table-scroll')"
        assert page.run(f"{box}.scrollWidth <= {box}.clientWidth")


def test_a_link_unfolds_its_target(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri()) as page:
        folds = page.run("[...document.querySelectorAll('.fold')].map((one) => one.open)")
        assert folds == [False] * 6
        for target in ("configurations", "figure-cost"):
            page.run(f"document.querySelector('.contents a[href=\"#{target}\"]').click()")
            assert page.run(f"document.getElementById('{target}').checkVisibility()")
            page.wait(
                f"Math.abs(document.getElementById('{target}').getBoundingClientRect().top) < innerHeight / 2"  # noqa: E501
            )
        opened = page.run("[...document.querySelectorAll('.fold[open]')].map((one) => one.id)")
        assert opened == ["configurations-fold", "more-figures-fold"]
        page.goto(report.as_uri() + "#provenance")
        page.wait("document.getElementById('provenance-fold').open")


def test_figures_show_tooltips(report: Path, browser: Browser) -> None:
    for width in (1280, 390):
        with browser.page(report.as_uri(), width=width) as page:
            for name in ("lr_basin", "learning_curves"):
                image = f"document.querySelector('figure[aria-labelledby=figure-{name}] img')"
                page.run(f"{image}.scrollIntoView({{block: 'center'}})")
                tooltips = json.loads(page.run(f"{image}.closest('figure').dataset.tooltips"))
                trace = next(
                    one
                    for one in tooltips["traces"]
                    if tooltips["texts"][one[0]].startswith("trial 4: rank 8,")
                )
                x, y = trace[-4:-2] if width == 1280 else trace[-2:]
                page.point_at(image, x, y)
                assert page.run(_TOOLTIP) == [
                    tooltips["texts"][trace[0]],
                    tooltips["texts"][trace[-5]],
                ]
                box = page.run("document.querySelector('.tip').getBoundingClientRect().toJSON()")
                assert 0 <= box["left"] < box["right"] <= width
                assert box["top"] >= 0
                page.point_at(image, 2, 998)
                assert page.run(_TOOLTIP) is None, "no mark is near the corner"


def test_arrow_keys_move_between_marks_of_a_figure(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri()) as page:
        page.run(
            "document.querySelector('figure[aria-labelledby=figure-learning_curves] img').focus()"
        )
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        first = page.run(_TOOLTIP)
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        assert (first[0], first[1][:7], page.run(_TOOLTIP)[1][:8]) == (
            page.run(_TOOLTIP)[0],
            "step 0:",
            "step 10:",
        )
        assert page.run("document.getElementById('said').textContent") == ", ".join(
            page.run(_TOOLTIP)
        )
        page.press("Escape")
        assert page.run(_TOOLTIP) is None


def test_a_hostile_setting_is_text_in_a_tooltip(
    browser: Browser, proxy: Proxy, tmp_path: Path
) -> None:
    trials = [
        Trial(i, 0, params(8, 1e-3, targets=[name]), 0.5 + i / 10)
        for i, name in enumerate(("mlp", HOSTILE))
    ]
    path = write_report(write_sweep(tmp_path, Sweep(trials, seeds=[0]))).path
    before = len(proxy.from_pages)
    with browser.page(path.as_uri()) as page:
        image = "document.querySelector('figure[data-tooltips] img')"
        page.run(f"{image}.scrollIntoView({{block: 'center'}})")
        tooltips = json.loads(page.run(f"{image}.closest('figure').dataset.tooltips"))
        trace = next(one for one in tooltips["traces"] if HOSTILE in tooltips["texts"][one[0]])
        page.point_at(image, *trace[-4:-2])
        assert HOSTILE in page.run(_TOOLTIP)[0]
        assert page.run("document.title") != "ran"
    assert len(proxy.from_pages) == before


def test_the_first_tab_stop_skips_the_contents(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri()) as page:
        page.press("Tab")
        assert page.run("document.activeElement.textContent") == "Skip to the answer"
        assert page.run("document.activeElement.getBoundingClientRect().top") >= 0, (
            "it comes into view"
        )
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.press("Enter", "Tab")
        assert page.run("document.activeElement.closest('main') !== null")


def test_print_shows_every_row_and_no_control(report: Path, browser: Browser) -> None:
    with browser.page(report.as_uri(), dark=True) as page:
        page.call("Emulation.setEmulatedMedia", media="print")
        hidden = "getComputedStyle(document.querySelector('{}')).display === 'none'"
        assert all(
            page.run(hidden.format(one)) for one in (".contents", ".tools", ".copy", ".skip")
        )
        assert (
            page.run("getComputedStyle(document.getElementById('trial-table-scroll')).maxHeight")
            == "none"
        )
        assert page.run("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        page.run("dispatchEvent(new Event('beforeprint'))")
        assert page.run("document.querySelectorAll('details:not([open])').length") == 0
        page.run("dispatchEvent(new Event('afterprint'))")
        assert page.run("document.querySelectorAll('details[open]').length") == 0
        pdf = base64.b64decode(page.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")


def test_a_live_page_keeps_its_scroll_position(
    pages: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    text = pages["live"].read_text()
    assert '<noscript><meta http-equiv="refresh" content="60"></noscript>' in text
    path = tmp_path / "live.html"
    path.write_text(text.replace('data-seconds="60"', 'data-seconds="2"'))
    with browser.page(path.as_uri()) as page:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.run("document.getElementById('pause').click()")
        assert page.run("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
        _filtered(page, "", "COMPLETE")
        page.run(
            f"{TRIALS}.tHead.rows[0].cells[{_column(page, 'learning rate')}].querySelector('button').click()"  # noqa: E501
        )
        page.run("document.getElementById('trials').scrollIntoView()")
        page.run(
            "document.querySelectorAll('#more-problems, #problems-fold').forEach((one) => "
            "{ one.open = true; })"
        )
        page.run(
            f"{TRIALS}.tHead.rows[0].cells[0].querySelector('button').focus({{preventScroll: true}})"  # noqa: E501
        )
        position = (
            f"[{_PLACE}, document.activeElement.textContent, "
            "document.getElementById('more-problems').open]"
        )
        was = [_cells(page, 0, shown=True), page.run(position)]
        path.write_text(text.replace("</title>", ", again</title>"))
        page.run("document.getElementById('pause').click()")
        page.wait("document.title.endsWith(', again') && document.readyState === 'complete'")
        assert [_cells(page, 0, shown=True), page.run(position)] == was
        assert was[1] == [pytest.approx(16, abs=1), "trial", True], "just below the screen's edge"
        assert page.run("document.getElementById('trial-table-status').value") == "COMPLETE"


_PLACE = "Math.round(document.getElementById('trials').getBoundingClientRect().top)"


def test_a_finished_page_does_not_reload(report: Path) -> None:
    text = report.read_text()
    assert 'id="live"' not in text
    assert 'http-equiv="refresh"' not in text


@pytest.mark.parametrize(("width", "dark"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_no_violation(
    pages: dict[str, Path], browser: Browser, kind: str, width: int, dark: bool
) -> None:
    with browser.page(pages[kind].as_uri(), width=width, dark=dark) as page:
        page.run(_OPEN_ALL)
        assert violations(page) == []


def test_axe_finds_a_planted_violation(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><title>bad</title><img src='data:,'><p style='color: #ccc'>faint</p>"
    )
    with browser.page(path.as_uri()) as page:
        assert {found.split(":")[0] for found in violations(page)} >= {
            "image-alt",
            "color-contrast",
            "html-has-lang",
        }


# Subject and text of a figure's tooltip; null without one.
_TOOLTIP = """(tip => tip && !tip.hidden ? [tip.children[0].textContent, tip.children[1].textContent] : null)(
    document.querySelector('.tip'))"""  # noqa: E501


def _column(page: Page, title: str) -> int:
    number = page.run(
        f"[...{TRIALS}.tHead.rows[0].cells].findIndex((one) => one.textContent === "
        f"{json.dumps(title)})"
    )
    assert number >= 0
    return int(number)


def _cells(page: Page, column: int, *, shown: bool = False) -> list[str]:
    """Return a column's texts without those only for screen readers.

    `shown`: only of rows that are not filtered out.
    """
    rows = f"[...{TRIALS}.tBodies[0].rows].filter((row) => !{json.dumps(shown)} || !row.hidden)"
    count: list[str] = page.run(
        f"{rows}.map((row) => row.cells[{column}].firstChild.textContent.trim())"
    )
    return count


def _filtered(page: Page, text: str, status: str = "") -> str:
    """Return the count's text after a filter was typed and a status chosen."""
    for name, value, event in (("text", text, "input"), ("status", status, "change")):
        field = f"document.getElementById('trial-table-{name}')"
        page.run(
            f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new "
            f"Event('{event}', {{bubbles: true}}))"
        )
    return str(page.run("document.querySelector('.tools output').textContent"))
