"""Compare the table of docs/guides/reliability.md with the faults that the tests try."""

from __future__ import annotations

import pytest

from tests.faults import cases, table
from tests.faults.table import Row


def test_the_page_has_the_number_of_tries_of_every_fault() -> None:
    rows = table.read(table.PAGE.read_text())
    assert {row.fault: row.tried for row in rows} == cases.expected()
    assert [row.fault for row in rows] == list(cases.expected())
    assert {row.fault: row.lost for row in rows} == dict.fromkeys(cases.expected(), 0)


def test_the_page_has_the_outcomes_of_the_tests() -> None:
    text = table.PAGE.read_text()
    rows = table.read(text)
    assert text == table.page(rows)
    happened = dict.fromkeys(cases.MUTATIONS, cases.ANSWERED) | dict.fromkeys(
        cases.FAILURES.values(), cases.ALONE
    )
    happened |= {case.name: case.happened for case in cases.CORRUPTIONS} | cases.OTHER_OUTCOMES
    happened |= {name: cases.REFUSED for name, *_ in cases.REFUSALS}
    assert {
        row.fault: row.happened for row in rows if not row.fault.startswith("SIGKILL")
    } == happened
    assert {row.happened for row in rows if row.fault.startswith("SIGKILL")} == {cases.SAME}


def test_number_of_faults() -> None:
    kills = [count for name, count in cases.expected().items() if name.startswith("SIGKILL")]
    assert sum(kills) >= 30
    assert (
        sum(count for name, count in cases.expected().items() if name.startswith("SIGKILL: sweep"))
        >= 6
    )
    assert len([name for name in cases.expected() if not name.startswith(table.KINDS)]) >= 12
    assert sum(cases.MUTATIONS.values()) >= 300


def test_one_fault_has_one_outcome() -> None:
    assert table.gather([("a", "good", 0), ("b", "bad", 2), ("a", "good", 1)]) == [
        Row("a", 2, "good", 1),
        Row("b", 1, "bad", 2),
    ]
    with pytest.raises(AssertionError, match="a: good, and bad"):
        table.gather([("a", "good", 0), ("a", "bad", 0)])
