"""One run or sweep: what every figure and page is made from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.claims.evidence import Evidence, gather
from analysis.data.columns import param_columns
from analysis.data.labels import LR, RANK
from analysis.data.records import THEN, lookup, parse_recipe
from analysis.data.rows import as_trials
from analysis.data.sources import DEFAULT_METRIC, of_manifest
from analysis.data.tables import Tables, load
from analysis.stats import ranking
from analysis.stats.rates import RateSplit, split_rates
from analysis.stats.scores import expected
from analysis.stats.selection import Held
from analysis.stats.values import ValueComparison, compare_values
from harness.config import metrics
from harness.core.errors import UserError
from harness.records.run_dir import Status


@dataclass(frozen=True)
class Experiment:
    """A run or sweep as its tables describe it, even when its directory is gone."""

    tables: Tables

    @classmethod
    def open(cls, directory: str | Path) -> Experiment:
        """Read a run or sweep directory; raises UserError when it is neither."""
        return cls.of(load([directory]))

    @classmethod
    def of(cls, tables: Tables, directory: str | None = None) -> Experiment:
        """Take one directory of some tables by its name there; None takes the only one.

        Raises UserError when the tables do not hold it.
        """
        known = tables.sources["directory"].tolist()
        if directory not in known if directory is not None else len(known) != 1:
            got, allowed = directory or "no name", ", ".join(known)
            raise UserError("the tables hold no such directory", got=got, allowed=allowed)
        return cls(tables.of([directory or known[0]]))

    def with_manifest(self, manifest: dict[str, Any]) -> Experiment:
        """Return the experiment as it is under a newer manifest of its directory."""
        sources = self.tables.sources.copy()
        for name, value in of_manifest(manifest).items():
            sources[name] = pd.Series([value], dtype=sources[name].dtype)
        return Experiment(replace(self.tables, sources=sources))

    @cached_property
    def source(self) -> pd.Series:
        """The directory's row (see `sources.source_row`)."""
        return self.tables.sources.iloc[0]

    @property
    def directory(self) -> str:
        """The directory as it was when it was read; it need not exist any more."""
        return str(self.source["directory"])

    @property
    def name(self) -> str:
        """The name in its manifest."""
        return str(self.source["name"])

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest as recorded."""
        manifest: dict[str, Any] = json.loads(self.source["manifest"])
        return manifest

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values; empty where it could not be read."""
        return parse_recipe(str(self.source["recipe"]))

    @property
    def metric(self) -> str:
        """The metric that the sweep optimized, or that a single run is judged by."""
        return str(self.source["metric"])

    @property
    def direction(self) -> metrics.Direction:
        """Whether higher or lower values of the metric are better."""
        return "maximize" if self.source["maximize"] else "minimize"

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds that each configuration is to run on."""
        return [int(seed) for seed in json.loads(self.source["seeds"])]

    @cached_property
    def problems(self) -> int | None:
        """Held-out problems behind each score.

        None where unknown, or where no score is a share of right answers.
        """
        problems = self.source["problems"]
        is_share = self.metric == DEFAULT_METRIC or self.metric.startswith("eval/pass@")
        if not is_share or pd.isna(problems):
            return None
        samples = lookup(self.recipe, "generator.eval_n_samples_per_prompt") or 1
        total = int(problems) * (samples if self.metric == DEFAULT_METRIC else 1)
        scores = self.trials[[self.metric, f"base/{self.metric}"]].melt()["value"].dropna()
        counted = ranking.counts_right_answers(scores.astype(float).tolist(), total)
        return int(problems) if counted else None

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row per trial (see `rows.as_trials`)."""
        return as_trials(self.tables.runs, self.metric)

    @cached_property
    def evidence(self) -> Evidence | None:
        """The comparable runs that the claims are judged on; None without runs."""
        return gather(self.tables.runs, self.tables.steps)

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
        """Whether data, model or environment changed meanwhile; runs then name their `inputs`."""
        runs = self.tables.runs
        inputs = set(runs["inputs"].dropna()) if "inputs" in runs.columns else set()
        return len(inputs) > 1 or any(THEN in name for name in inputs)

    @cached_property
    def complete(self) -> pd.DataFrame:
        """The trials that count: COMPLETE, with a score."""
        return ranking.complete(self.trials, self.metric)

    @cached_property
    def configurations(self) -> pd.DataFrame:
        """One row per configuration, best first (see `ranking.by_configuration`)."""
        return ranking.by_configuration(
            self.trials, self.metric, self.direction, self.seeds, self.problems
        )

    @cached_property
    def best(self) -> ranking.Winner | None:
        """The best configuration; None when none has all its seeds complete."""
        return ranking.best_configuration(self.trials, self.metric, self.direction, self.seeds)

    @cached_property
    def comparison(self) -> ValueComparison | None:
        """The best configuration against each other one; None without it."""
        if not self.is_sweep or self.best is None:
            return None
        return self.compare("configuration", self.best.configuration, [])

    def compare(
        self, column: str, winner: int, others: list[str], runs: pd.DataFrame | None = None
    ) -> ValueComparison | None:
        """Compare the values of a column with the winner's (see `values.compare_values`)."""
        table = self.tables.runs if runs is None else runs
        maximize = self.direction == "maximize"
        return compare_values(table, column, winner, others, self.base, maximize=maximize)

    @cached_property
    def expected(self) -> Held | None:
        """The best score corrected for selection bias; None with one seed."""
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
    def base_interval(self) -> ranking.Interval | None:
        """The interval of the base's score over the held-out problems."""
        if self.base is None or not self.problems:
            return None
        return ranking.wilson(self.base, self.problems)

    def better(self, first: float, second: float) -> bool:
        """Return whether the first score is the better one."""
        return first > second if self.direction == "maximize" else first < second

    def best_trial(self) -> pd.Series | None:
        """Return the best configuration's best trial, or the run's own row once complete."""
        rows = self.complete
        if self.is_sweep:
            number = self.best.configuration if self.best else -1
            rows = rows[rows["configuration"] == number]
        if rows.empty:
            return None
        return rows.sort_values(self.metric, ascending=self.direction == "minimize").iloc[0]

    def winner_row(self) -> pd.Series | None:
        """Return the row of `best_trial` in the table of runs."""
        trial, runs = self.best_trial(), self.tables.runs
        return None if trial is None else runs[runs["run_dir"] == trial["run_dir"]].iloc[0]

    def command(self, run_dir: str) -> str:
        """Return the command that runs a run or trial again."""
        runs = self.tables.runs
        return str(runs.loc[runs["run_dir"] == run_dir, "command"].iloc[0])

    def rate_split(self, *ranks: int) -> RateSplit | None:
        """Split the learning rates at these ranks (all when none is named); None without trials."""
        if LR not in self.trials.columns:
            return None
        # A run that was pruned or diverged has no score, and counts against its rate all the same.
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
        return split_rates(points, worst if self.base is None else self.base, self.direction)
