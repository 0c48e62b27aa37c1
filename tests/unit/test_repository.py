"""What git tracks is small enough to clone in seconds, and holds no generated page."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.core.paths import PROJECT

LIMIT = 10_000_000


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
