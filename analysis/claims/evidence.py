"""What the claims are judged on: one comparable set of runs as columns, and its arms, each over
learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.claims.arm import Arm
from harness.records.run_dir import Status

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
ALL, ATTENTION, MLP = 0.0, 1.0, 2.0
_TARGETS = ("all-linear", "attention", "mlp")  # in the order of their codes
Column = Literal["rank", "alpha", "scale", "lr", "targets", "batch", "budget", "seed"]
# Full fine-tuning has neither alpha nor target modules: it belongs to every setting of these.
_SETTING: tuple[Column, ...] = ("batch", "budget")


@dataclass(frozen=True, slots=True)
class Level:
    """A score with its 95% interval, NaN where chance between seeds is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """Runs that differ only in what claims vary, a column each `[N]`; scores are oriented so that
    higher is better.

    `score` is NaN unless COMPLETE. `bad` runs tell against their learning rate: diverged, or
    pruned, at `fallback`. `targets` is ALL, ATTENTION, MLP or another code, a place in
    `target_names`; `scale` is alpha / rank. `curves` `[N, T]` is the training reward.
    """

    rank: Floats
    alpha: Floats
    lr: Floats
    targets: Floats
    batch: Floats
    budget: Floats
    seed: Floats
    score: Floats
    bad: Mask
    fallback: Floats
    confirm: Mask
    parameters: Floats
    episodes: Floats
    curves: Floats
    base: float = math.nan
    sign: float = 1.0
    metric: str = "eval/accuracy"
    model_parameters: float = math.nan
    rule_lr: float = math.nan
    sources: tuple[str, ...] = ()
    update_seconds: Floats = field(default_factory=lambda: np.empty(0))
    target_names: tuple[str, ...] = _TARGETS

    @property
    def scale(self) -> Floats:
        """The factor on BA, alpha / rank; NaN for full fine-tuning."""
        return self.alpha / np.where(self.rank > 0, self.rank, math.nan)

    @property
    def lora(self) -> Mask:
        """The runs that trained an adapter."""
        return self.rank > 0

    @property
    def full(self) -> Mask:
        """The runs that trained all weights."""
        return self.rank == 0

    def ranks(self, where: Mask) -> list[int]:
        """The ranks among some runs, in order."""
        return [int(rank) for rank in np.unique(self.rank[where])]

    def strata(self, where: Mask, *keys: Column) -> Iterator[Mask]:
        """Parts of some runs that agree in `keys`: most ranks first, then most runs, then all
        layers and alpha 32.
        """
        if not where.any():
            return
        table = np.column_stack([getattr(self, key)[where] for key in keys])
        found, inverse = np.unique(table, axis=0, return_inverse=True)
        places = np.flatnonzero(where)
        parts = []
        for number in range(len(found)):
            if np.isnan(found[number]).any():
                continue
            mask = np.zeros(len(where), bool)
            mask[places[inverse.reshape(-1) == number]] = True
            usual = dict(zip(keys, found[number], strict=True))
            order = (
                -len(np.unique(self.rank[mask])),
                -int(mask.sum()),
                usual.get("targets", ALL) != ALL,
                abs(math.log(usual.get("alpha", 32.0) / 32.0)),
                number,
            )
            parts.append((order, mask))
        yield from (mask for _, mask in sorted(parts, key=lambda part: part[0]))

    def full_like(self, where: Mask) -> Mask:
        """The full fine-tuning runs of the same batch size and length as some adapters'."""
        same = self.full
        for key in _SETTING:
            same = same & (getattr(self, key) == getattr(self, key)[where][0])
        return same

    def arm(self, where: Mask) -> Arm | None:
        """Some runs as an arm over their learning rates; None without a score among them."""
        if not np.isfinite(self.score[where]).any():
            return None
        return Arm(
            self.lr[where],
            self.seed[where],
            self.score[where],
            self.bad[where],
            self.fallback[where],
            self.confirm[where],
            base=self.base,
        )

    def level(self, arm: Arm) -> Level:
        """An arm's best score as the metric counts it, free of the choice; with one seed its best
        mean as it is.
        """
        if arm.peak is None:
            best = float(arm.means[arm.top]) if arm.eligible.any() else math.nan
            return Level(self.sign * best, math.nan, math.nan)
        ends = sorted(self.sign * end for end in arm.peak.interval(0.025))
        return Level(self.sign * arm.peak.value, *ends)

    def arms(self, where: Mask, ranks: Sequence[int]) -> dict[int, Arm]:
        """An arm per rank, for the ranks with a score among some runs."""
        found = {rank: self.arm(where & (self.rank == rank)) for rank in ranks}
        return {rank: arm for rank, arm in found.items() if arm is not None}


def contexts(runs: pd.DataFrame) -> list[str]:
    """The contexts of a table of runs, the one with most runs first: only within one are runs
    comparable.
    """
    return [str(name) for name in runs["context"].dropna().value_counts().index]


def evidence(
    runs: pd.DataFrame, steps: pd.DataFrame, context: str | None = None
) -> Evidence | None:
    """The runs of a context (by default the one with most) as evidence; None without runs."""
    known = contexts(runs)
    if not known:
        return None
    rows = runs[runs["context"] == (context or known[0])].sort_values(["directory", "number"])
    sign = 1.0 if bool(rows["maximize"].iloc[0]) else -1.0
    bad = _flag(rows["diverged"]) | (rows["status"] == Status.PRUNED.value).to_numpy(
        bool, na_value=False
    )
    others = sorted(set(rows["targets"].dropna()) - set(_TARGETS))
    codes = {name: float(place) for place, name in enumerate((*_TARGETS, *others))}
    score = sign * _real(rows["score"])
    return Evidence(
        rank=_real(rows["rank"]),
        alpha=_real(rows["alpha"]),
        lr=_real(rows["lr"]),
        targets=_real(rows["targets"].map(codes)),
        batch=_real(rows["batch_size"]),
        budget=pd.factorize(rows["budget"])[0].astype(float),
        seed=_real(rows["seed"]),
        score=np.where(bad, math.nan, score),
        bad=bad,
        fallback=np.where(_flag(rows["diverged"]), math.nan, sign * _real(rows["last"])),
        confirm=_flag(rows["confirm"]),
        parameters=_real(rows["parameters"]),
        episodes=_real(rows["episodes"]),
        curves=_curves(rows, steps),
        base=sign * float(rows["base"].mean()),
        sign=sign,
        metric=str(rows["metric"].iloc[0]),
        model_parameters=float(_real(rows["model_parameters"])[0]),
        rule_lr=float(_real(rows["rule_lr"])[0]),
        sources=tuple(sorted({str(name) for name in rows["source"].dropna()})),
        update_seconds=_real(rows["update_seconds"]) / _real(rows["tokens"]),
        target_names=tuple(codes),
    )


def _curves(rows: pd.DataFrame, steps: pd.DataFrame) -> Floats:
    """The training reward of each run, `[N, T]`, NaN where a run logged none."""
    if "reward" not in steps.columns or steps.empty:
        return np.full((len(rows), 0), math.nan)
    logged = steps[steps["reward"].notna() & (steps["step"] > 0)]
    table = logged.pivot_table(
        index=["directory", "run_dir"], columns="step", values="reward", aggfunc="last"
    )
    wanted = pd.MultiIndex.from_frame(rows[["directory", "run_dir"]])
    return table.reindex(wanted).to_numpy(float)


def _real(column: pd.Series) -> Floats:
    return np.asarray(column.astype("Float64").to_numpy(np.float64, na_value=math.nan), np.float64)


def _flag(column: pd.Series) -> Any:
    return column.astype("boolean").fillna(False).to_numpy(bool)
