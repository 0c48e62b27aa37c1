"""Errors a user can act on, and how a command shows them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from unicodedata import category


class UserError(Exception):
    """Bad input: what is wrong, what was given, what is allowed, what to do; commands print it and exit 2."""

    def __init__(self, what: str, *, got: object = None, allowed: object = None, fix: str | None = None) -> None:
        self.what = what
        self.got = got
        self.allowed = allowed
        self.fix = fix
        super().__init__(str(self))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and Ray pickles errors between processes.
        return (_rebuild, (self.what, self.got, self.allowed, self.fix))

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.got is not None:
            lines.append(f"  got:     {self.got}")
        if self.allowed is not None:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix is not None:
            lines.append(f"  fix:     {self.fix}")
        return visible("\n".join(lines))


def visible(text: str) -> str:
    """Text with what cannot be printed written as escapes, line breaks aside: it moves no cursor and hides nothing."""
    return "".join(c if c.isprintable() or c == "\n" or category(c) == "Zs" else ascii(c)[1:-1] for c in text)


def _rebuild(what: str, got: object, allowed: object, fix: str | None) -> UserError:
    return UserError(what, got=got, allowed=allowed, fix=fix)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one, or None when nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
