"""Types and bounds of single keys as the schema declares them: checks, and words for messages."""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from harness.config.plain import LARGEST
from harness.core.errors import UserError

BOUNDS = {
    "ge": (operator.ge, ">="),
    "gt": (operator.gt, ">"),
    "le": (operator.le, "<="),
    "lt": (operator.lt, "<"),
}


def check_bounds(node: Any, prefix: str = "") -> None:
    """Raise UserError for a value of a recipe, or of a section of it, that its metadata forbids."""
    hints = typing.get_type_hints(type(node))
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        _check_elements(key, value, hints[item.name])
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif "one_of" in item.metadata:
            if not _is_one_of(value, item.metadata["one_of"]):
                raise UserError(
                    f"{key} cannot take this value", got=value, allowed=bounded(item.metadata)
                )
        elif value is not None and item.metadata:
            within = all(BOUNDS[name][0](value, limit) for name, limit in item.metadata.items())
            if not within or not math.isfinite(value):
                raise UserError(f"{key} is out of range", got=value, allowed=bounded(item.metadata))


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    if int in allowed and isinstance(value, int) and not isinstance(value, bool):
        return 1 <= value <= LARGEST
    return any(value is other or (isinstance(other, str) and value == other) for other in allowed)


def _check_elements(key: str, value: Any, hint: Any) -> None:
    """Check the elements of a list, and that a mapping is one.

    OmegaConf lets other values pass in a list or through an interpolation.
    """
    kind, optional = typing.get_origin(hint), type(None) in typing.get_args(hint)
    if optional:
        hint = typing.get_args(hint)[0]
        kind = typing.get_origin(hint)
    if kind not in (list, dict) or (optional and value is None):
        return
    inner = typing.get_args(hint)[0]
    types: Any = (int, float) if inner is float else typing.get_origin(inner) or inner
    if not isinstance(value, kind) or any(
        isinstance(item, bool) or not isinstance(item, types) for item in value
    ):
        raise UserError(f"{key} cannot take this value", got=value, allowed=described(hint))


def bounded(limits: Mapping[str, Any]) -> str:
    """Return in words what a key's metadata allows: `>= 0 and <= 1`, `auto, true, false`, or ""."""
    if "one_of" in limits:
        words = {None: "null", True: "true", False: "false", int: "whole numbers >= 1"}
        return ", ".join(words.get(value, value) for value in limits["one_of"])
    return " and ".join(f"{BOUNDS[name][1]} {limit:g}" for name, limit in limits.items())


def names_of(hint: Any) -> list[str]:
    """Return the names that a type allows for a key, or for each element of it; [] if no enum."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.name for member in hint]
    return [name for inner in typing.get_args(hint) for name in names_of(inner)]


def described(hint: Any) -> str:
    """Return a type in words: `a list of text`, `grpo, rloo`."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"a list of {described(inner[0])}"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    if inner:
        return " or ".join("null" if part is type(None) else described(part) for part in inner)
    words = {
        Any: "any value",
        str: "text",
        int: "whole numbers",
        float: "numbers",
        bool: "true, false",
    }
    return ", ".join(names_of(hint)) or words.get(hint) or "a group of keys"
