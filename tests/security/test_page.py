"""Check that a test names each claim of docs/guides/security.md: `@pytest.mark.claim("...")`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from harness.core.paths import PROJECT

TESTS = sorted((PROJECT / "tests").rglob("test_*.py"))
# A claim is a paragraph that begins in bold. Bold text at the start of a list item names what is
# trusted.
CLAIM = re.compile(r"(?m)^\*\*(.+?)\.?\*\*")


def claims(page: str) -> list[str]:
    return CLAIM.findall(page)


def named(source: str) -> Iterator[str]:
    """Yield the claims that a file's tests name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.claim":
                    yield from (ast.literal_eval(text) for text in mark.args)


def test_a_test_names_every_claim_of_the_page() -> None:
    on_page = claims((PROJECT / "docs" / "guides" / "security.md").read_text())
    in_tests = {claim for file in TESTS for claim in named(file.read_text())}
    assert len(on_page) == len(set(on_page)) > 10
    assert set(on_page) - in_tests == set(), "no test names these claims"
    assert in_tests - set(on_page) == set(), "the page does not make these claims"


@pytest.mark.parametrize(
    ("source", "claimed"),
    [
        ('@pytest.mark.claim("a")\n@pytest.mark.timeout(3)\ndef test_it(): ...', ["a"]),
        ('class TestIt:\n    @pytest.mark.claim("a", "b")\n    def test_it(self): ...', ["a", "b"]),
        ('@pytest.mark.claim("a")\ndef helper(): ...', []),
        ('# @pytest.mark.claim("a")\ndef test_it(): ...', []),
        ('"""pytest.mark.claim("a")"""\ndef test_it(): ...', []),
    ],
)
def test_only_a_test_names_a_claim(source: str, claimed: list[str]) -> None:
    assert list(named(source)) == claimed


def test_claims_begin_paragraphs() -> None:
    page = "**All is safe.** Not **this**.\n\n**Nearly**, so.\n\n- **Trusted.** Not this.\n"
    assert claims(page) == ["All is safe", "Nearly"]
