"""One run or sweep, read once: what every figure, statistic and page is made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from analysis import stats
from analysis.labels import LR, RANK
from analysis.load import Tables, load, load_steps, load_trials, metric_of, param_columns
from analysis.records import read_recipe
from harness import metrics
from harness.manifest import digest_path
from harness.paths import locate
from harness.rundir import RunDir, Status

DATA_FILES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Experiment:
    """A run's or sweep's tables with its metric, the metric's better end, its seeds and its held-out problems.

    `problems` is None where they cannot be counted, or where the score is not a share of right answers.
    """

    path: Path
    manifest: dict[str, Any]
    recipe: dict[str, Any]
    metric: str
    direction: metrics.Direction
    seeds: list[int]
    problems: int | None
    trials: pd.DataFrame
    steps: pd.DataFrame

    @classmethod
    def open(cls, directory: str | Path) -> Experiment:
        """Read a run or sweep directory; raises UserError when it is neither."""
        path = Path(directory)
        manifest, recipe = RunDir(path).read_manifest(), read_recipe(path)
        trials, metric = load_trials(path), metric_of(path)
        seeds = _seeds(recipe) if manifest.get("kind") == "sweep" else None
        return cls(
            path=path,
            manifest=manifest,
            recipe=recipe,
            metric=metric,
            direction=metrics.direction(metric),
            seeds=seeds or sorted({int(seed) for seed in trials["seed"].dropna()}),
            problems=_binomial_problems(manifest, recipe, metric, trials),
            trials=trials,
            steps=load_steps(path),
        )

    @cached_property
    def tables(self) -> Tables:
        """The tidy tables that figures, claims and statistics are made from."""
        return load([self.path])

    @property
    def is_sweep(self) -> bool:
        """Whether this is a sweep rather than a single run."""
        return self.manifest.get("kind") == "sweep"

    @property
    def finished(self) -> bool:
        """Whether the whole run or sweep has ended."""
        return self.manifest.get("status") not in (Status.CREATED.value, Status.RUNNING.value)

    @cached_property
    def complete(self) -> pd.DataFrame:
        """The trials that count: COMPLETE, with a score."""
        return stats.complete(self.trials, self.metric)

    @cached_property
    def configurations(self) -> pd.DataFrame:
        """One row per configuration, best first (see `stats.by_configuration`)."""
        return stats.by_configuration(self.trials, self.metric, self.direction, self.seeds, self.problems)

    @cached_property
    def best(self) -> stats.Best | None:
        """The winning configuration, or None when none has all its seeds complete."""
        return stats.best_configuration(self.trials, self.metric, self.direction, self.seeds)

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
        return stats.wilson(self.base, self.problems) if self.base is not None and self.problems else None

    def better(self, first: float, second: float) -> bool:
        """Whether the first score is the better one."""
        return first > second if self.direction == "maximize" else first < second

    def best_trial(self) -> pd.Series | None:
        """The winning configuration's best trial, or the run's own row once complete; None when there is none."""
        rows = self.complete
        if self.is_sweep:
            rows = rows[rows["configuration"] == self.best.configuration] if self.best else rows.iloc[:0]
        if rows.empty:
            return None
        return rows.sort_values(self.metric, ascending=self.direction == "minimize").iloc[0]

    def basin(self, *ranks: int) -> stats.Basin | None:
        """Learning rates too low, good and too high at these ranks (all when none is named); None without evidence."""
        if LR not in self.trials.columns:
            return None
        pruned = self.trials.loc[self.trials["status"] == Status.PRUNED.value, "configuration"]
        table = self.configurations.dropna(subset=[LR])
        table = table[table["whole"] | table["configuration"].isin(pruned)]
        if ranks and RANK in table.columns:
            table = table[table[RANK].isin(ranks)]
        if table.empty:
            return None
        points = pd.DataFrame({"lr": table[LR], "score": table["mean"], "finished": table["whole"]})
        worst = points["score"].min() if self.direction == "maximize" else points["score"].max()
        return stats.basin(points, worst if self.base is None else self.base, self.direction)


def _seeds(recipe: dict[str, Any]) -> list[int] | None:
    """The seeds that a sweep's recipe names; None where it names none, or nonsense."""
    sweep = recipe.get("sweep")
    seeds = sweep.get("seeds") if isinstance(sweep, dict) else None
    return seeds if isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds) else None


def _binomial_problems(
    manifest: dict[str, Any], recipe: dict[str, Any], metric: str, trials: pd.DataFrame
) -> int | None:
    """Held-out problems behind each score, counted in the very files the run used, if scores are shares of them."""
    if metric != "eval/accuracy" and not metric.startswith("eval/pass@"):
        return None
    counts = [_rows(name, manifest) for name in (recipe.get("data") or {}).get("val_data") or []]
    if not counts or None in counts:
        return None
    problems = sum(count for count in counts if count is not None)
    samples = (recipe.get("generator") or {}).get("eval_n_samples_per_prompt") or 1
    shares = [float(share) for name in (metric, f"base/{metric}") for share in trials[name].dropna()]
    total = problems if metric.startswith("eval/pass@") else problems * samples
    return problems if problems and stats.counts_right_answers(shares, total) else None


def _rows(name: str, manifest: dict[str, Any]) -> int | None:
    """Rows of a data file that still is the one the manifest names; None when it is gone or has changed.

    The name is the run directory's: any other file, a device or a pipe is not opened for it.
    """
    found, recorded = locate(name) if isinstance(name, str) else None, (manifest.get("data") or {}).get(name)
    if found is None or not recorded or not found.is_file() or found.suffix not in DATA_FILES:
        return None
    if digest_path(name) != recorded:
        return None
    if found.suffix == ".parquet":
        return int(pq.read_metadata(found).num_rows)
    with found.open("rb") as file:
        return sum(1 for line in file if line.strip())
