"""Write docs/guides/reliability.md: fixed text, and a table of the tested faults."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from harness.core.paths import PROJECT

PAGE = PROJECT / "docs" / "guides" / "reliability.md"
HEAD = "| fault | times tried | what happened | lost steps |"
# How the names of three kinds of faults begin; the others are damage to files or full disks.
KINDS = ("SIGKILL: ", "mutated ", "a trial")
_ROW = re.compile(r"\| (.+) \| (\d+) \| (.+) \| (\d+) \|")

WORDS = PROJECT / "tests" / "faults" / "words.md"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    It has a fault, how often it was tried, its outcome, and the steps lost in total.
    """

    fault: str
    tried: int
    happened: str
    lost: int


def gather(results: Iterable[tuple[str, str, int]]) -> list[Row]:
    """Return rows for outcomes of faults (fault, outcome, lost steps), in order of appearance."""
    rows: dict[str, Row] = {}
    for fault, happened, lost in results:
        old = rows.get(fault, Row(fault, 0, happened, 0))
        assert old.happened == happened, f"{fault}: {old.happened}, and {happened}"
        rows[fault] = Row(fault, old.tried + 1, happened, old.lost + lost)
    return list(rows.values())


def page(rows: Iterable[Row]) -> str:
    """Return the page with its table."""
    rows = list(rows)
    lines = [f"| {row.fault} | {row.tried} | {row.happened} | {row.lost} |" for row in rows]
    kills, mutated, trials = (
        sum(row.tried for row in rows if row.fault.startswith(kind)) for kind in KINDS
    )
    other = sum(not row.fault.startswith(KINDS) for row in rows)
    total = (
        f"\n{kills} kills, {other} kinds of damage or no room, {trials} failing trials, "
        f"{mutated} mutated inputs.\n"
        "Made by `NOREGRET_WRITE_DOCS=1 python -m pytest tests/faults`.\n"
    )
    return (
        f"{WORDS.read_text()}\n"
        + "\n".join([HEAD, "| --- | ---: | --- | ---: |", *lines])
        + "\n"
        + total
    )


def read(text: str) -> list[Row]:
    """Return the rows of a page."""
    return [
        Row(m[1], int(m[2]), m[3], int(m[4]))
        for line in text.splitlines()
        if (m := _ROW.fullmatch(line))
    ]
