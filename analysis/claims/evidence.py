"""Gather comparable runs as columns, and split them into arms over learning rates."""

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


@dataclass(frozen=True, slots=True)
class ScoreInterval:
    """A score with its 95% interval; NaN where chance between seeds is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """Runs that differ only in what the claims vary, a column each `[N]`, higher scores better.

    `score` is NaN unless COMPLETE. `bad` runs diverged, or were pruned at `fallback`, and count
    against their learning rate. `targets` is ALL, ATTENTION, MLP or another index of
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
        """Return the ranks among some runs, in order."""
        return [int(rank) for rank in np.unique(self.rank[where])]

    def strata(self, where: Mask, *keys: Column) -> Iterator[Mask]:
        """Yield the parts of some runs that agree in `keys`.

        Parts with most ranks come first, then most runs, all layers, alpha near 32.
        """
        if not where.any():
            return
        table = np.column_stack([getattr(self, key)[where] for key in keys])
        groups, inverse = np.unique(table, axis=0, return_inverse=True)
        places = np.flatnonzero(where)
        parts = []
        for number, group in enumerate(groups):
            if np.isnan(group).any():
                continue
            mask = np.zeros(len(where), bool)
            mask[places[inverse.reshape(-1) == number]] = True
            values = dict(zip(keys, group, strict=True))
            order = (
                -len(np.unique(self.rank[mask])),
                -int(mask.sum()),
                values.get("targets", ALL) != ALL,
                abs(math.log(values.get("alpha", 32.0) / 32.0)),
                number,
            )
            parts.append((order, mask))
        yield from (mask for _, mask in sorted(parts, key=lambda part: part[0]))

    def full_like(self, where: Mask) -> Mask:
        """Return the full fine-tuning runs of the same batch size and length as some adapters'.

        Full fine-tuning has neither alpha nor target modules, so that these need not agree.
        """
        same_batch = self.batch == self.batch[where][0]
        return self.full & same_batch & (self.budget == self.budget[where][0])

    def arm(self, where: Mask) -> Arm | None:
        """Return some runs as an arm over their learning rates; None without a score among them."""
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

    def arms(self, where: Mask, ranks: Sequence[int]) -> dict[int, Arm]:
        """Return an arm for each rank with a score among some runs."""
        arms = {rank: self.arm(where & (self.rank == rank)) for rank in ranks}
        return {rank: arm for rank, arm in arms.items() if arm is not None}

    def best_score(self, arm: Arm) -> ScoreInterval:
        """Return an arm's best score as the metric counts it, corrected for selection bias.

        With one seed it is the best mean as it is.
        """
        if arm.peak is None:
            best = float(arm.means[arm.top]) if arm.eligible.any() else math.nan
            return ScoreInterval(self.sign * best, math.nan, math.nan)
        ends = sorted(self.sign * end for end in arm.peak.interval(0.025))
        return ScoreInterval(self.sign * arm.peak.value, *ends)

    def size(self, where: Mask) -> float:
        """Return the most trained parameters among some runs; 0 where unknown."""
        return float(np.nanmax(self.parameters[where], initial=0))


def contexts(runs: pd.DataFrame) -> list[str]:
    """Return the contexts of a table of runs, that with most runs first.

    Runs are comparable within one context only.
    """
    return [str(name) for name in runs["context"].dropna().value_counts().index]


def gather(runs: pd.DataFrame, steps: pd.DataFrame, context: str | None = None) -> Evidence | None:
    """Return the runs of a context, by default the one with most; None without runs."""
    known = contexts(runs)
    if not known:
        return None
    rows = runs[runs["context"] == (context or known[0])].sort_values(["directory", "number"])
    sign = 1.0 if bool(rows["maximize"].iloc[0]) else -1.0
    diverged, pruned = _flag(rows["diverged"]), rows["status"] == Status.PRUNED.value
    bad = diverged | pruned.to_numpy(bool, na_value=False)
    others = sorted(set(rows["targets"].dropna()) - set(_TARGETS))
    codes = {name: float(place) for place, name in enumerate((*_TARGETS, *others))}
    return Evidence(
        rank=_real(rows["rank"]),
        alpha=_real(rows["alpha"]),
        lr=_real(rows["lr"]),
        targets=_real(rows["targets"].map(codes)),
        batch=_real(rows["batch_size"]),
        budget=pd.factorize(rows["budget"])[0].astype(float),
        seed=_real(rows["seed"]),
        score=np.where(bad, math.nan, sign * _real(rows["score"])),
        bad=bad,
        fallback=np.where(diverged, math.nan, sign * _real(rows["last"])),
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
    """Return the training reward of each run `[N, T]`, NaN where a run logged none."""
    if "reward" not in steps.columns or steps.empty:
        return np.full((len(rows), 0), math.nan)
    logged = steps[steps["reward"].notna() & (steps["step"] > 0)]
    keys = ["directory", "run_dir"]
    table = logged.pivot_table(index=keys, columns="step", values="reward", aggfunc="last")
    return table.reindex(pd.MultiIndex.from_frame(rows[keys])).to_numpy(float)


def _real(column: pd.Series) -> Floats:
    return np.asarray(column.astype("Float64").to_numpy(np.float64, na_value=math.nan), np.float64)


def _flag(column: pd.Series) -> Any:
    return column.astype("boolean").fillna(False).to_numpy(bool)
