"""Checks of plain nested values before they become a recipe."""

from __future__ import annotations

import math
import re
from typing import Any

from harness.core.errors import UserError

# Far above what a recipe holds, far below what takes long to read: with YAML's aliases a few lines
# can hold any number of values.
MOST_VALUES = 20_000
DEEPEST = 40
LARGEST = 2**63 - 1
LONGEST_NAME = 200
# OmegaConf's resolvers, such as `${oc.env:NAME}`.
_RESOLVER = re.compile(r"\$\{[^{}]*:")


def check_plain(values: Any, source: str) -> None:
    """Check that nested values are text, finite numbers, true, false or null, as a recipe can hold.

    Interpolations that read from outside the recipe are refused: the environment has keys and
    tokens. Raises UserError naming `source` and the key.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{source}: a recipe is a mapping of keys to values", got=type(values).__name__
        )
    remaining: list[tuple[str, Any]] = [("", values)]
    for _ in range(MOST_VALUES):
        if not remaining:
            return
        key, value = remaining.pop()
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise UserError(
                        f"{source}: a key is not text", got=f"{name!r} under {key or 'the top'}"
                    )
                _check_text(f"a key under {key or 'the top'}", name, source)
            remaining += [(f"{key}.{name}" if key else name, item) for name, item in value.items()]
        elif isinstance(value, list):
            remaining += [(f"{key}[{index}]", item) for index, item in enumerate(value)]
        else:
            _check_scalar(key, value, source)
        if len(key) > LONGEST_NAME * DEEPEST or key.count(".") + key.count("[") > DEEPEST:
            raise UserError(
                f"{source}: values are nested too deep",
                got=f"{key[:80]}...",
                allowed=f"<= {DEEPEST}",
            )
    raise UserError(
        f"{source} holds too many values",
        allowed=f"<= {MOST_VALUES}, aliases written out",
        fix="write the values out, without aliases of aliases",
    )


def _check_scalar(key: str, value: Any, source: str) -> None:
    if isinstance(value, str):
        _check_text(key, value, source)
        if _RESOLVER.search(value):
            raise UserError(
                f"{source}: {key} asks for something outside the recipe",
                got=value,
                fix="write the value itself: a recipe is the same everywhere",
            )
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source}: {key} is out of range", got=value, allowed="finite numbers")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(
            f"{source}: {key} is out of range", got=value, allowed="whole numbers of 64 bits"
        )
    elif value is not None and not isinstance(value, float | int):
        raise UserError(
            f"{source}: {key} cannot take this value",
            got=f"{value} ({type(value).__name__})",
            allowed="text, a number, true, false, null, a list",
            fix="put text in quotes",
        )


def _check_text(key: str, text: str, source: str) -> None:
    """Refuse NUL, which no file name has, and lone surrogates, which no UTF-8 file has."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{source}: {key} holds a character that no file can", got=ascii(text)[:80])
