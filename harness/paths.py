"""Where the project's own files are, and how a path in a recipe is found."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
RECIPES = PROJECT / "recipes"


def locate(path: str) -> Path | None:
    """The file or folder a recipe's path names: as given, else relative to the project; None when there is none."""
    given = Path(path).expanduser()
    for candidate in (given, PROJECT / given):
        if candidate.exists():
            return candidate.resolve()
    return None
