"""How templates are filled: HTML that is only ever text, and Markdown that cannot leave
its place.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from analysis.report import assets


def fill(template: str, content: dict[str, Any]) -> str:
    """A template of this package with its content filled in; for HTML every text is escaped."""
    return _environment().get_template(template).render(**content)


def markdown(template: str, content: dict[str, Any]) -> str:
    """The same for Markdown, without the empty lines that a template's own structure leaves."""
    return re.sub(r"\n{3,}", "\n\n", fill(template, content))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"script": assets.script, "script_hash": assets.script_hash}
    environment.filters |= {"cell": _markdown_cell, "fenced": _fenced, "code": _code}
    return environment


def _markdown_cell(text: object) -> str:
    """Text that can neither leave its Markdown table cell nor become a link, an image, code or
    HTML.
    """
    escaped = re.sub(r"([\\`*\[\]|<])", r"\\\1", str(text).replace("&", "&amp;"))
    return " ".join(escaped.split())


def _fenced(text: str, language: str = "text") -> str:
    """Text in a code fence longer than any run of backticks within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Text on one line between backticks, which it cannot end."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
