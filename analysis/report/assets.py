"""The page's one script, and the hash by which the page's content security policy lets it, and
nothing else, run.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

SCRIPT = Path(__file__).parent / "templates" / "report.js"


@cache
def script() -> str:
    """The script as it stands between the page's script tags."""
    return "\n" + SCRIPT.read_text(encoding="utf-8")


@cache
def script_hash() -> str:
    """The script's source expression for `script-src` (CSP level 3, 2.3.1): `'sha256-…'`."""
    digest = hashlib.sha256(script().encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
