"""Makes docs/keys.md from the schema and the comments of `recipes/base.yaml`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from harness.config.bounds import bounded, described
from harness.config.recipe_keys import RENAMED, WITHOUT_EFFECT, known_keys
from harness.config.schema import Recipe
from harness.core.paths import RECIPES

# `sweep` is null by default: base.yaml shows its keys in comments, below this line.
_SWEEP = "\n# sweep:\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A key or group of base.yaml: its default as written, its meaning, and how SkyRL differs."""

    default: str
    meaning: str
    skyrl: str


def entries(text: str) -> dict[str, Entry]:
    """Return the entries of a text like base.yaml, by key or group.

    A comment begins after a key's value and continues in the lines below that are only a comment.
    """
    base, _, sweep = text.partition(_SWEEP)
    shown = "\n".join(line.removeprefix("# ") for line in sweep.splitlines())
    return (_read(f"sweep:\n{shown}") if sweep else {}) | _read(base)


def _read(text: str) -> dict[str, Entry]:
    lines, read = text.splitlines(), {}

    def visit(node: yaml.MappingNode, prefix: str) -> None:
        for name, value in node.value:
            key = f"{prefix}{name.value}"
            block = isinstance(value, yaml.MappingNode) and not value.flow_style
            end = name.end_mark if block else value.end_mark
            meaning, _, skyrl = _comment(lines, end.line, end.column).partition("SkyRL: ")
            # Below a key that is no group a block is an example, not a default.
            default = "{}" if block else text[value.start_mark.index : value.end_mark.index]
            read[key] = Entry(default, meaning.strip().removesuffix("."), skyrl)
            if block and key not in known_keys():
                visit(value, f"{key}.")

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    visit(root, "")
    return read


def _comment(lines: list[str], line: int, column: int) -> str:
    parts = [lines[line][column:].partition("#")[2]]
    for below in lines[line + 1 :]:
        if not below.lstrip().startswith("#"):
            break
        parts.append(below.lstrip().removeprefix("#"))
    return " ".join(part.strip() for part in parts).strip()


def allowed(key: str) -> str:
    """Return in words which values a key's type and bounds allow; "" where it has neither."""
    *groups, name = key.split(".")
    owner: Any = Recipe
    for group in groups:
        hint = typing.get_type_hints(owner)[group]
        owner = next(t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t))
    hint = typing.get_type_hints(owner)[name]
    words = "" if hint is Any else described(hint)
    limits = bounded(owner.__dataclass_fields__[name].metadata)
    return ", ".join(part for part in (words, limits) if part)


_HEAD = """# Keys of a recipe

Every key with its default, the values its type allows, what it does, and what SkyRL has where it
differs. The names are those of SkyRL's LoRA guide; "later" is the name or form that SkyRL gave a
key after the guide. `recipes/base.yaml` holds the same keys as a recipe inherits them.

Made from the comments of `recipes/base.yaml` and from `harness/config/schema.py`:
`python -m harness.config.keys_page > docs/reference/keys.md`.
"""
_WITHOUT_EFFECT = """
## Accepted without effect

Settings of the guide's command line that there is nothing to set for here. They are taken on the
command line, with a note, and refused in a recipe file.

"""
_RENAMED = """
## Other names

SkyRL's names that get a "did you mean" with the key here. Any other unknown key gets the nearest
one.

"""


def markdown() -> str:
    """Return the page: a table for each group of keys, then SkyRL's names that are no keys here."""
    written = entries((RECIPES / "base.yaml").read_text())
    sections: dict[str, list[str]] = {}
    for key in known_keys():
        group = ".".join(key.split(".")[:-1][:2])
        sections.setdefault(group, []).append(key)
    page = _HEAD + "".join(_section(group, keys, written) for group, keys in sections.items())
    unused = [(f"`{key}`", why) for key, why in WITHOUT_EFFECT.items()]
    renamed = [(f"`{name}`", f"`{key}`") for name, key in RENAMED.items()]
    page += _WITHOUT_EFFECT + _table(("key", "why"), unused)
    return page + _RENAMED + _table(("SkyRL's name", "key here"), renamed)


def _section(group: str, keys: list[str], written: dict[str, Entry]) -> str:
    text = f"\n## `{group}`\n\n" if group else "\n## Top level\n\n"
    if group in written and (intro := written[group]).meaning:
        text += intro.meaning[0].upper() + intro.meaning[1:] + "."
        text += f" SkyRL: {intro.skyrl}.\n\n" if intro.skyrl else "\n\n"
    rows = [
        (f"`{key}`", f"`{entry.default}`", allowed(key), entry.meaning, entry.skyrl)
        for key in keys
        for entry in [written[key]]
    ]
    head = ("key", "default", "allowed", "meaning", "SkyRL, where it differs")
    differs = any(row[-1] for row in rows)
    width = len(head) if differs else len(head) - 1
    return text + _table(head[:width], [row[:width] for row in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    return "".join(f"| {line} |\n" for line in cells)


if __name__ == "__main__":
    print(markdown(), end="")
