"""The claims of LoRA Without Regret, judged for the runs of a page, as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.claims import Verdict, contexts, judge_tables
from analysis.claims.claim import FAILS, HOLDS, UNKNOWN
from analysis.data.labels import plural
from analysis.data.tables import Tables
from analysis.experiment import Experiment

_COMMAND = re.compile(r":?\s*(python -m harness\.\S.*)$")


@dataclass(frozen=True, slots=True)
class Judged:
    """A claim's verdict in words: no effect and no interval where there was too little to test."""

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
class Claims:
    """Every claim for one set of comparable runs, which `note` names; how many came out how."""

    note: str
    counts: list[tuple[str, int]]
    rows: list[Judged]

    @property
    def judged(self) -> bool:
        """Whether these runs have enough to test any claim."""
        return any(row.effect for row in self.rows)


def claims(experiments: Sequence[Experiment]) -> Claims | None:
    """The claims on the runs of one or more experiments, those of one context; None where there are
    no such runs.
    """
    tables = Tables.joined([experiment.tables for experiment in experiments])
    found = contexts(tables.runs)
    if not found or not any(experiment.is_sweep for experiment in experiments):
        return None
    rows = [_judged(verdict) for verdict in judge_tables(tables)]
    used = int((tables.runs["context"] == found[0]).sum())
    note = (
        f"Each claim is judged on {plural(used, 'run')} that differ only in what the claims vary. "
        '"Cannot tell" is no verdict on the claim: it says that these runs do not settle it.'
    )
    if left := int(tables.runs["context"].notna().sum()) - used:
        note += (
            f" {plural(left, 'run')} of another model, task or algorithm cannot be "
            "compared with these."
        )
    kinds: list[str] = [HOLDS, FAILS, UNKNOWN]
    counts = [(kind, sum(row.verdict == kind for row in rows)) for kind in kinds]
    return Claims(note, counts, rows)


def _judged(verdict: Verdict) -> Judged:
    command = _COMMAND.search(verdict.settle)
    settle = verdict.settle[: command.start()] if command else verdict.settle
    effect = interval = ""
    if verdict.effect is not None:
        effect = f"{_signed(verdict.effect)} {verdict.unit}".strip()
        if verdict.interval is not None:
            interval = " to ".join(_signed(end) for end in verdict.interval)
    return Judged(
        verdict.id,
        verdict.claim,
        verdict.verdict,
        effect,
        interval,
        verdict.n,
        verdict.test,
        verdict.margin,
        verdict.reading,
        settle,
        command[1] if command else None,
    )


def _signed(value: float) -> str:
    """A number with its sign and three digits after the point, fewer where it is large."""
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.3g}"
