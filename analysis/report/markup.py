"""Fill the templates: escaped HTML, and Markdown whose texts cannot leave their place."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


@cache
def script() -> str:
    """Return the page's one script, as it stands between the script tags."""
    file = Path(__file__).parent / "templates" / "report.js"
    return "\n" + file.read_text(encoding="utf-8")


@cache
def script_hash() -> str:
    """Return the script's source expression for `script-src` (CSP level 3, 2.3.1): `'sha256-…'`.

    With it the page's security policy lets this script run, and no other.
    """
    digest = hashlib.sha256(script().encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def fill(template: str, content: dict[str, Any]) -> str:
    """Fill a template of this package; in HTML every text is escaped."""
    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"script": script, "script_hash": script_hash}
    environment.filters |= {"cell": _markdown_cell, "fenced": _fenced}
    return environment.get_template(template).render(**content)


def markdown(template: str, content: dict[str, Any]) -> str:
    """Fill a Markdown template, without the empty lines that its own structure leaves."""
    return re.sub(r"\n{3,}", "\n\n", fill(template, content))


def _markdown_cell(text: object) -> str:
    """Escape a text so that it stays in its cell, and is no link, image, code or HTML."""
    escaped = re.sub(r"([\\`*\[\]|<])", r"\\\1", str(text).replace("&", "&amp;"))
    return " ".join(escaped.split())


def _fenced(text: str, language: str = "text") -> str:
    """Put a text in a code fence that is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
