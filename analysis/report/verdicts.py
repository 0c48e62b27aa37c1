"""Judge the claims of LoRA Without Regret for the runs of a page, and write the verdicts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.claims import judge_tables
from analysis.claims.claim import FAILS, HOLDS, UNKNOWN, JudgedClaim
from analysis.claims.evidence import contexts
from analysis.data.labels import plural
from analysis.data.tables import Tables
from analysis.experiment import Experiment

_COMMAND = re.compile(r":?\s*(python -m harness\.\S.*)$")


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A claim's verdict in words; effect and interval are empty where nothing could be tested."""

    id: str
    claim: str
    verdict: str
    effect: str
    interval: str
    n: int
    test: str
    margin: str
    reading: str
    settle: str
    command: str | None


@dataclass(frozen=True, slots=True)
class ClaimTable:
    """Every claim for the comparable runs that `note` names, and the count of each verdict."""

    note: str
    counts: list[tuple[str, int]]
    rows: list[ClaimRow]

    @property
    def judged(self) -> bool:
        """Whether these runs test any claim."""
        return any(row.effect for row in self.rows)


def claim_table(experiments: Sequence[Experiment]) -> ClaimTable | None:
    """Judge the claims on the comparable runs of all experiments; None without such runs."""
    tables = Tables.joined([experiment.tables for experiment in experiments])
    known = contexts(tables.runs)
    if not known or not any(experiment.is_sweep for experiment in experiments):
        return None
    rows = [_row(judged) for judged in judge_tables(tables)]
    used = int((tables.runs["context"] == known[0]).sum())
    note = (
        f"Each claim is judged on {plural(used, 'run')} that differ only in what the claims vary. "
        '"Cannot tell" says that these runs do not settle the claim.'
    )
    if left := int(tables.runs["context"].notna().sum()) - used:
        note += f" {plural(left, 'run')} of another model, task or algorithm cannot be compared."
    kinds: list[str] = [HOLDS, FAILS, UNKNOWN]
    return ClaimTable(
        note, [(kind, sum(row.verdict == kind for row in rows)) for kind in kinds], rows
    )


def _row(judged: JudgedClaim) -> ClaimRow:
    command = _COMMAND.search(judged.settle)
    effect = interval = ""
    if judged.effect is not None:
        effect = f"{_signed(judged.effect)} {judged.unit}".strip()
        if judged.interval is not None:
            interval = " to ".join(_signed(end) for end in judged.interval)
    return ClaimRow(
        id=judged.id,
        claim=judged.claim,
        verdict=judged.verdict,
        effect=effect,
        interval=interval,
        n=judged.n,
        test=judged.test,
        margin=judged.margin,
        reading=judged.reading,
        settle=judged.settle[: command.start()] if command else judged.settle,
        command=command[1] if command else None,
    )


def _signed(value: float) -> str:
    """Write a number with its sign and three decimals, fewer where it is large."""
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.3g}"
