"""Paths of the project's files, and how a path in a recipe is found."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = PROJECT / "recipes"
# A wheel's metadata lies beside its packages, so PROJECT is site-packages there.
INSTALLED = any(PROJECT.glob("noregret-*.dist-info"))


def shown(path: Path) -> str:
    """Return a path relative to the working directory, or whole if it is outside."""
    text = os.path.relpath(path)
    return str(path) if text.startswith("..") else text


def locate(path: str) -> Path | None:
    """Return the file of a recipe's path, relative to here or to the project, or None."""
    # Unlike Path's methods, os.path's do not raise for names that no file or user can have.
    expanded = os.path.expanduser(path)
    for candidate in (Path(expanded), PROJECT / expanded):
        if os.path.exists(candidate):
            return candidate.resolve()
    return None
