"""Where the project's own files are, and how a path in a recipe is found."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = PROJECT / "recipes"
# A wheel's metadata lies beside its packages, so PROJECT is site-packages there.
INSTALLED = any(PROJECT.glob("noregret-*.dist-info"))


def shown(path: Path) -> str:
    """A path as a person in the working directory would type it."""
    text = os.path.relpath(path)
    return str(path) if text.startswith("..") else text


def locate(path: str) -> Path | None:
    """The file or folder a recipe's path names: as given, else relative to the project; None when
    there is none.
    """
    # os.path's functions, unlike Path's, say no to a name that no file or user can have.
    given = os.path.expanduser(path)
    for candidate in (Path(given), PROJECT / given):
        if os.path.exists(candidate):
            return candidate.resolve()
    return None
