"""One run or sweep, read once: what every figure, statistic and page is made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.data.labels import LR, RANK
from analysis.data.records import THEN, parsed_recipe
from analysis.data.rows import as_trials, param_columns
from analysis.data.sources import DEFAULT_METRIC
from analysis.data.tables import Tables, load
from analysis.stats import ranking as stats
from analysis.stats.selection import Held
from analysis.stats.values import Comparison, compare_values, expected
from harness.config import metrics
from harness.core.errors import UserError
from harness.records.run_dir import Status

if TYPE_CHECKING:
    from analysis.claims.evidence import Evidence


@dataclass(frozen=True)
class Experiment:
    """A run or sweep as its tables say it was: its own rows alone, whatever has become of its
    directory.
    """

    tables: Tables

    @classmethod
    def open(cls, directory: str | Path) -> Experiment:
        """Read a run or sweep directory; raises UserError when it is neither."""
        return cls.of(load([directory]))

    @classmethod
    def of(cls, tables: Tables, directory: str | None = None) -> Experiment:
        """One directory of some tables, by the name recorded there; None: the only one. Raises
        UserError if absent.
        """
        known = tables.sources["directory"].tolist()
        if directory not in known if directory is not None else len(known) != 1:
            raise UserError(
                "the tables hold no such directory",
                got=directory or "no name",
                allowed=", ".join(known),
            )
        return cls(tables.of([directory or known[0]]))

    @cached_property
    def source(self) -> pd.Series:
        """What is known of the directory as a whole (see `sources.source_row`)."""
        return self.tables.sources.iloc[0]

    @property
    def directory(self) -> str:
        """Where the run or sweep was when it was read."""
        return str(self.source["directory"])

    @property
    def path(self) -> Path:
        """The same as a path, which need not exist any more."""
        return Path(self.directory)

    @property
    def name(self) -> str:
        """The name its manifest gives it."""
        return str(self.source["name"])

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Provenance as recorded."""
        found: dict[str, Any] = json.loads(self.source["manifest"])
        return found

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values; empty where it could not be read."""
        return parsed_recipe(str(self.source["recipe"]))

    @property
    def metric(self) -> str:
        """The metric that was optimised, or that a single run is judged by."""
        return str(self.source["metric"])

    @property
    def direction(self) -> metrics.Direction:
        """The metric's better end."""
        return "maximize" if self.source["maximize"] else "minimize"

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds that each configuration is to run on."""
        return [int(seed) for seed in json.loads(self.source["seeds"])]

    @cached_property
    def problems(self) -> int | None:
        """Held-out problems behind each score; None where unknown, or where no score is a share of
        right answers.
        """
        problems, shares = (
            self.source["problems"],
            self.metric == DEFAULT_METRIC or self.metric.startswith("eval/pass@"),
        )
        if not shares or pd.isna(problems):
            return None
        samples = (self.recipe.get("generator") or {}).get("eval_n_samples_per_prompt") or 1
        total = int(problems) if self.metric != DEFAULT_METRIC else int(problems) * samples
        found = [
            float(share)
            for name in (self.metric, f"base/{self.metric}")
            for share in self.trials[name].dropna()
        ]
        return int(problems) if stats.counts_right_answers(found, total) else None

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row per trial (see `rows.as_trials`)."""
        return as_trials(self.tables.runs, self.metric)

    @property
    def steps(self) -> pd.DataFrame:
        """A row per run and logged step."""
        return self.tables.steps

    @cached_property
    def evidence(self) -> Evidence | None:
        """The runs that differ only in what the claims vary, where there are most of them; None
        without runs.
        """
        from analysis.claims.evidence import evidence

        return evidence(self.tables.runs, self.tables.steps)

    @property
    def is_sweep(self) -> bool:
        """Whether this is a sweep rather than a single run."""
        return bool(self.source["kind"] == "sweep")

    @property
    def finished(self) -> bool:
        """Whether the whole run or sweep has ended."""
        return self.source["status"] not in (Status.CREATED.value, Status.RUNNING.value)

    @cached_property
    def inputs_changed(self) -> bool:
        """Whether data, model or environment module changed while it ran: its runs then name theirs
        in `inputs`.
        """
        runs = self.tables.runs
        known = set(runs["inputs"].dropna()) if "inputs" in runs.columns else set()
        return len(known) > 1 or any(THEN in one for one in known)

    @cached_property
    def complete(self) -> pd.DataFrame:
        """The trials that count: COMPLETE, with a score."""
        return stats.complete(self.trials, self.metric)

    @cached_property
    def configurations(self) -> pd.DataFrame:
        """One row per configuration, best first (see `stats.by_configuration`)."""
        return stats.by_configuration(
            self.trials, self.metric, self.direction, self.seeds, self.problems
        )

    @cached_property
    def best(self) -> stats.Best | None:
        """The winning configuration (see `stats.best_configuration`), or None when none has all its
        seeds complete.
        """
        return stats.best_configuration(self.trials, self.metric, self.direction, self.seeds)

    @cached_property
    def ranking(self) -> Comparison | None:
        """The winning configuration against each other one; None without a winner."""
        if not self.is_sweep or self.best is None:
            return None
        return compare_values(
            self.tables.runs,
            "configuration",
            self.best.configuration,
            [],
            self.base,
            maximize=self.direction == "maximize",
        )

    @cached_property
    def expected(self) -> Held | None:
        """The winner's score as it would be seen again, corrected for selection bias; None with one
        seed.
        """
        if not self.is_sweep or self.best is None:
            return None
        return expected(self.tables.runs, self.base, maximize=self.direction == "maximize")

    @cached_property
    def axes(self) -> list[str]:
        """The swept recipe keys that took more than one value."""
        return [name for name in param_columns(self.trials) if self.trials[name].nunique() > 1]

    @cached_property
    def base(self) -> float | None:
        """The score of the base model before training, over all runs that measured it."""
        values = self.trials[f"base/{self.metric}"].dropna()
        return float(values.mean()) if len(values) else None

    @cached_property
    def base_interval(self) -> stats.Interval | None:
        """The interval of the base's score over the held-out problems."""
        return (
            stats.wilson(self.base, self.problems)
            if self.base is not None and self.problems
            else None
        )

    def better(self, first: float, second: float) -> bool:
        """Whether the first score is the better one."""
        return first > second if self.direction == "maximize" else first < second

    def best_trial(self) -> pd.Series | None:
        """The winning configuration's best trial, or the run's own row once complete; None when
        there is none.
        """
        rows = self.complete
        if self.is_sweep:
            rows = (
                rows[rows["configuration"] == self.best.configuration]
                if self.best
                else rows.iloc[:0]
            )
        if rows.empty:
            return None
        return rows.sort_values(self.metric, ascending=self.direction == "minimize").iloc[0]

    def basin(self, *ranks: int) -> stats.Basin | None:
        """Learning rates too low, good and too high at these ranks (all when none is named); None
        without evidence.
        """
        if LR not in self.trials.columns:
            return None
        # A run that was pruned or diverged has no score, and tells against its rate all the same.
        runs = self.tables.runs
        bad = runs.loc[(runs["status"] == Status.PRUNED.value) | runs["diverged"], "configuration"]
        table = self.configurations.dropna(subset=[LR])
        table = table[table["whole"] | table["configuration"].isin(bad)]
        if ranks and RANK in table.columns:
            table = table[table[RANK].isin(ranks)]
        if table.empty:
            return None
        points = pd.DataFrame({"lr": table[LR], "score": table["mean"], "finished": table["whole"]})
        worst = points["score"].min() if self.direction == "maximize" else points["score"].max()
        return stats.basin(points, worst if self.base is None else self.base, self.direction)
