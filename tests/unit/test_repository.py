"""Check what git tracks: its size, no generated page, the width of Markdown."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.core.paths import PROJECT

LIMIT = 10_000_000
COLUMNS = 100
WRITTEN_BY_REPORT = PROJECT / "docs" / "study" / "report.md"


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files that git tracks, those deleted but not yet committed aside; skips without git."""
    if not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout: what a clone holds cannot be listed")
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not on PATH: what a clone holds cannot be listed")
    paths = [PROJECT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_a_clone_is_small(tracked: list[Path]) -> None:
    sizes = {str(path.relative_to(PROJECT)): path.stat().st_size for path in tracked}
    assert sizes["README.md"] > 0
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    said = ", ".join(f"{name} {sizes[name]:,}" for name in largest)
    assert sum(sizes.values()) <= LIMIT, f"{sum(sizes.values()):,} bytes; the largest: {said}"


def test_pages_are_made_not_tracked(tracked: list[Path]) -> None:
    pages = [path.relative_to(PROJECT) for path in tracked if path.suffix in (".html", ".htm")]
    assert pages == [], "only templates (*.html.j2) are tracked; the command that makes a page is"


def test_markdown_is_wrapped(tracked: list[Path]) -> None:
    """Tables and addresses may be longer, and so may the page that harness.report writes."""
    pages = [path for path in tracked if path.suffix == ".md" and path != WRITTEN_BY_REPORT]
    assert len(pages) > 10
    too_long = {
        f"{page.relative_to(PROJECT)}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), start=1)
        if len(line) > COLUMNS and not line.lstrip().startswith("|") and "://" not in line
    }
    assert too_long == set()
