"""Check the documentation: commands against their parsers, links, the width of lines."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from harness.core.paths import PROJECT
from harness.main import COMMANDS

DOCS = PROJECT / "docs"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
TASKS = ("gsm8k", "model", "tiny_gsm")
"""Tasks of `prepare` that together have all of its options."""


def section(command: str) -> str:
    """Return the part of the page of commands about one command."""
    page = (DOCS / "reference" / "cli.md").read_text()
    return page.partition(f"\n## `{command}`\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_commands_has_every_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"harness.{command}")
    calls = [[task, "--help"] for task in TASKS] if command == "prepare" else [["--help"]]
    for arguments in calls:
        with pytest.raises(SystemExit):
            module.main(arguments)
    rows = re.findall(r"(?m)^\| `(--[a-z-]+)", section(command))
    assert sorted(rows) == sorted({*OPTION.findall(capsys.readouterr().out)} - {"--help"})


def links(page: Path) -> list[str]:
    """Return the targets of the links and images of a page that name no host; code is left out."""
    text = re.sub(r"(?ms)^ *```.*?^ *```|`[^`\n]+`", "", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize(
    "page",
    [*sorted(PROJECT.glob("*.md")), *sorted(DOCS.rglob("*.md"))],
    ids=lambda page: str(page.relative_to(PROJECT)),
)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_documentation_is_in_its_navigation() -> None:
    named = set(
        re.findall(r"(?m)^ +- (?:[^:\n]+: )?(\S+\.md)$", (PROJECT / "mkdocs.yml").read_text())
    )
    assert named == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_files_to_read_exist_and_are_few() -> None:
    text = (DOCS / "concepts.md").read_text().partition("\n## Which files to read\n")[2]
    solo, _, packed = text.partition("packed sweep")
    files = [re.findall(r"(?m)^\| `([\w./]+)` \|", part) for part in (solo, packed)]
    assert 0 < len(files[0]) <= 12
    assert len(files[0]) + len(files[1]) <= 25
    assert not [name for part in files for name in part if not (PROJECT / name).is_file()]
