"""Write reports of hostile directories.

A report reads nothing outside its directory, and shows text only as text.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.report.write import DOWNLOADS
from harness import report
from harness.core.errors import UserError
from tests.integration.browser import CHROMIUM, Browser, Proxy, proxied_browser
from tests.unit.analysis.synthetic import Sweep, Trial, params, write_run, write_sweep

pytestmark = pytest.mark.timeout(120)

MARK = "OutsideSecret"


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Proxy]]:
    """Start a browser whose requests all go to a proxy."""
    with proxied_browser(tmp_path_factory.mktemp("profile")) as both:
        yield both


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small sweep of two configurations on two seeds."""
    trials = [
        Trial(c, s, params(8, lr), 0.5 + c / 5 + s / 100)
        for c, lr in enumerate((1e-4, 1e-3))
        for s in (0, 1)
    ]
    return write_sweep(tmp_path_factory.mktemp("template"), Sweep(trials))


@pytest.fixture
def sweep(template: Path, tmp_path: Path) -> Path:
    """Return a copy to damage, away from its recipe and data."""
    return Path(shutil.copytree(template, tmp_path / "given" / "sweep"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write private files outside the directory, with a marker in all their text."""
    folder = tmp_path_factory.mktemp("home")
    run = write_run(
        folder, Trial(0, 0, params(8, 1e-3, targets=MARK), 0.99, completion=MARK), name="own"
    )
    (run / "secret.jsonl").write_text(json.dumps({"step": 0, "token": MARK}) + "\n")
    (run / "token").write_text(MARK)
    return run


_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | os.PathLike):
        _opened.append(os.path.realpath(os.fspath(arguments[0])))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Yield a list of the files that Python opens during the test."""
    global _opened
    if _opened is None:
        sys.addaudithook(_note)
    _opened = []
    yield _opened
    _opened = []


def assert_nothing_leaked(hostile: Path, outside: Path, opened: list[str], output: str) -> None:
    """Assert that no file outside was opened or shown, and nothing was written there."""
    assert not [path for path in opened if Path(path).is_relative_to(outside.resolve())]
    assert MARK not in output
    for file in hostile.rglob("*"):
        if (
            file.is_file()
            and not file.is_symlink()
            and file.resolve().is_relative_to(hostile.resolve())
        ):
            assert MARK.encode() not in file.read_bytes(), file


def report_output(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the report command's output, refused or not."""
    try:
        report.main([str(directory)])
    except UserError as error:
        return capsys.readouterr().out + str(error)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "trials",
        "report",
        "trials/0003/metrics.jsonl",
        "trials/0003/samples",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "recipe.yaml",
                "report/figures",
                "trials/0000",
                "trials/0003",
                "trials/0003/manifest.json",
                "trials/0003/recipe.yaml",
                "trials/0003/samples/step_000050.parquet",
            )
        ),
    ],
)
@pytest.mark.claim("Looking at a stranger's run directory is safe")
def test_a_link_that_leads_outside_is_not_followed(
    sweep: Path, outside: Path, name: str, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    target = {"trials": outside.parent, "trials/0000": outside, "trials/0003": outside}.get(name)
    target = target or (outside / name.removeprefix("trials/0003/"))
    if name.startswith("report"):
        target = outside.parent / "elsewhere"
        target.mkdir(exist_ok=True)
    link = sweep / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    assert target.exists()
    before = sorted(outside.parent.rglob("*"))
    opened.clear()
    output = report_output(sweep, capsys)
    assert_nothing_leaked(sweep, outside, opened, output)
    assert sorted(outside.parent.rglob("*")) == before
    # A file that only adds to the page is left out; any other is refused by name.
    refused = "leads out of the run directory"
    left_out = "samples" in name or name == "trials/0003/recipe.yaml"
    assert left_out or refused in output or refused in (sweep / "report" / "index.html").read_text()


def test_links_within_the_directory_are_followed(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "elsewhere").mkdir()
    shutil.move(sweep / "trials" / "0003", sweep / "elsewhere" / "0003")
    (sweep / "trials" / "0003").symlink_to("../elsewhere/0003")
    assert "Of 2 configurations" in report_output(sweep, capsys)


def edit(file: Path, **values: Any) -> None:
    """Set fields of a JSON or YAML file; a dotted name is a path."""
    load, dump = (
        (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    )
    content = load(file.read_text())
    for name, value in values.items():
        *parts, last = name.split("__")
        node = content
        for part in parts:
            node = node[part]
        node[last] = value
    file.write_text(dump(content))


@pytest.mark.claim("Looking at a stranger's run directory is safe")
def test_paths_in_the_files_are_not_followed(
    sweep: Path, outside: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    secret, away = str(outside / "secret.jsonl"), os.path.relpath(outside, sweep)
    for folder in (sweep, sweep / "trials" / "0003"):
        source = {"source": str(outside / "token"), "overrides": [], "digest": "x"}
        edit(
            folder / "manifest.json",
            name=f"../../{outside.name}",
            run_dir=away,
            recipe=source,
            directory=secret,
            data={secret: None, away: None},
        )
        edit(folder / "recipe.yaml", data__val_data=[secret, f"{away}/secret.jsonl", "/etc/passwd"])
    edit(sweep / "trials" / "0003" / "manifest.json", trial__run_dir=away, trial__number=3)
    opened.clear()
    output = report_output(sweep, capsys)
    assert "Of 2 configurations" in output
    assert_nothing_leaked(sweep, outside, opened, output)


@pytest.mark.parametrize(
    "name",
    [
        "/dev/zero",
        "pipe.parquet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("/dev/stdin", "pipe.jsonl", "/proc/kcore", "/")
        ),
    ],
)
@pytest.mark.claim("Looking at a stranger's run directory is safe")
def test_no_device_or_pipe_is_read(
    sweep: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.startswith("pipe"):
        os.mkfifo(sweep.parent / name)
        name = str(sweep.parent / name)
    edit(sweep / "recipe.yaml", data__val_data=[name])
    edit(
        sweep / "manifest.json",
        data={name: "sha256:0"},
        recipe={"source": name, "overrides": [], "digest": "x"},
    )
    assert "Of 2 configurations" in report_output(sweep, capsys)


@pytest.mark.claim("Looking at a stranger's run directory is safe")
def test_a_recipe_in_the_directory_is_not_composed(
    sweep: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = sweep / "mine.yaml"
    theirs.write_text("defaults: [base, _self_]\n")
    for folder in (sweep, *(sweep / "trials").iterdir()):
        edit(
            folder / "manifest.json", recipe={"source": str(theirs), "overrides": [], "digest": "x"}
        )
    opened.clear()
    assert "Of 2 configurations" in report_output(sweep, capsys)
    assert str(theirs) not in opened


@pytest.mark.parametrize(
    "key", ["../../../x.y", "a/b.c", "x", "", "a.b\n", "trainer.\x1b[2J", "a." + "b" * 300]
)
@pytest.mark.claim("Looking at a stranger's run directory is safe")
def test_a_swept_key_names_no_file(
    sweep: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate(sorted((sweep / "trials").iterdir())):
        edit(folder / "manifest.json", trial__params={key: number})
    before = {path for path in sweep.parent.parent.rglob("*") if not path.is_relative_to(sweep)}
    report_output(sweep, capsys)
    assert {
        path for path in sweep.parent.parent.rglob("*") if not path.is_relative_to(sweep)
    } == before
    assert "which is no recipe key" in (sweep / "report" / "index.html").read_text()


@pytest.mark.claim("A terminal shows control characters as escapes")
def test_terminal_control_characters_are_not_printed(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate(sorted((sweep / "trials").iterdir())):
        named = {"trainer.target_modules": f"\x1b]0;owned\x07\x1b[2J{number // 2}\u202e"}
        edit(folder / "manifest.json", trial__params=named)
    output = report_output(sweep, capsys)
    assert "\\x1b]0;owned" in output
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", output)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", str(UserError("bad", got="\x1b[2J\r")))


HOSTILE = (
    "<script>document.title='ran'</script><img src=x onerror=document.title='ran'>\" "
    "onmouseover=\"document.title='ran'"
    "' autofocus onfocus='document.title=1' javascript:document.title='ran' "
    "<a href=\"javascript:document.title='ran'\"></title></style></pre></td><svg/onload=document.title='ran'>"  # noqa: E501
    "<meta http-equiv=refresh content='0;url=http://report.test/r'>"
    " {{ 7 * 7 }} {% raise %} <!-- ]]> &lt;b&gt; `code` ```\n# "
    "heading\n[x](javascript:document.title='ran')"
)
TEMPLATE_PARTS = ("status", "time", "kind", "metric")


def poison(value: Any, name: str = "") -> Any:
    """Append hostile text to every text of a manifest, except those that the report parses."""
    if isinstance(value, dict):
        return {key: poison(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner, name) for inner in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) and name not in TEMPLATE_PARTS else value


@pytest.fixture(scope="module")
def poisoned(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report of a sweep with hostile text in all its fields.

    These are names, settings, reasons, questions and completions.
    """
    hostile = Path(shutil.copytree(template, tmp_path_factory.mktemp("poisoned") / "sweep"))
    for file in hostile.rglob("manifest.json"):
        record = poison(json.loads(file.read_text()))
        record["data"] = {f"javascript:{HOSTILE}": HOSTILE}
        file.write_text(json.dumps(record))
    for file in hostile.rglob("*.parquet"):
        rows = pd.read_parquet(file)
        for column in ("question", "ground_truth", "completion", "finish_reason"):
            rows[column] = rows[column] + HOSTILE
        rows.to_parquet(file)
    failed = hostile / "trials" / "0000"
    edit(failed / "manifest.json", status="FAILED", reason=HOSTILE)
    report.main([str(hostile)])
    return hostile / "report"


@pytest.mark.claim("A report shows text as text")
def test_hostile_text_on_the_page_stays_text(poisoned: Path) -> None:
    page = (poisoned / "index.html").read_text()
    body = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", page)
    tags = set(re.findall(r"<\s*/?\s*([a-zA-Z!?][a-zA-Z0-9]*)", body))
    assert not tags & {"svg", "iframe", "object", "embed", "form", "base"}
    assert len(re.findall(r"<script", body)) == 1, (
        "the page's own, which its policy names by its hash"
    )
    for tag in re.findall(r"<[a-zA-Z][^>]*>", body):
        assert not re.search(r"\son\w+\s*=|javascript:|=[\"']?http", tag), tag
    addresses = set(re.findall(r"<a [^>]*href=\"([^\"]*)\"", body))
    assert all(address.startswith("#") for address in addresses - {path for path, _ in DOWNLOADS})
    assert len(re.findall(r"<meta http-equiv", body)) == 1
    assert "<script>document.title='ran'</script>" in html.unescape(body)
    markdown = (poisoned / "report.md").read_text()
    outside_fences = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", markdown)
    assert not re.search(r"(?m)^# heading", outside_fences)
    assert not re.search(r"(?<!\\)\[x\]\(javascript", re.sub(r"`[^`\n]*`", "", outside_fences))
    assert not re.search(r"(?<!\\)<(script|img|svg)", re.sub(r"`[^`\n]*`", "", outside_fences))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH: apt-get install chromium")
@pytest.mark.claim("A report shows text as text")
def test_a_browser_shows_hostile_text_and_runs_no_script(
    poisoned: Path, watching: tuple[Browser, Proxy]
) -> None:
    browser, proxy = watching
    before = len(proxy.from_pages)
    with browser.page((poisoned / "index.html").as_uri()) as page:
        assert page.run("document.title").startswith(
            "lora_sweep<script>document.title='ran'</script>"
        )
        assert "<script>document.title='ran'</script>" in page.run(
            "document.querySelector('main').innerText"
        )
    assert proxy.from_pages[before:] == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH: apt-get install chromium")
def test_the_browser_runs_an_unescaped_script(
    watching: tuple[Browser, Proxy], tmp_path: Path
) -> None:
    browser, proxy = watching
    path = tmp_path / "control.html"
    path.write_text(f"<!doctype html><title>quiet</title><p>{HOSTILE}</p>")
    with browser.page(path.as_uri()) as page:
        assert page.run("document.title") != "quiet" or proxy.from_pages
