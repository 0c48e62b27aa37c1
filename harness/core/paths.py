"""Paths of the project's files, and how a path in a recipe is found."""

from __future__ import annotations

import contextlib
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


def locate_folder(name: str, file: str) -> Path | None:
    """Return the folder of a recipe's path, or of a hub's name in its cache, or None.

    A folder in the cache is found by a `file` that it holds.
    """
    folder = locate(name)
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        with contextlib.suppress(ValueError, OSError):  # a name that the hub could not have
            cached = try_to_load_from_cache(name, file)
            return Path(cached).parent if isinstance(cached, str) else None
    return folder
