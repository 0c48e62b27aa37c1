"""docs/security.md names tests that exist."""

from __future__ import annotations

import re

from harness.paths import PROJECT

NAMED = re.compile(r"`(?:([\w/]+\.py))?(?:::(\w+))?`")


def test_every_test_that_the_page_names_is_there() -> None:
    text, file, found = (PROJECT / "docs" / "security.md").read_text(), "", 0
    for path, name in NAMED.findall(text):
        file = path or file
        if path or name:
            source = (PROJECT / "tests" / file).read_text()
            assert not name or f"def {name}(" in source, f"{file} has no {name}"
            found += 1
    assert found > 20
