"""What one run directory's files say, damage included. Facts come from the files' contents, never
from names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from harness.core.errors import UserError
from harness.records.manifest import versions
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status

# A directory whose status cannot be known: not a state a run is ever in.
UNREADABLE = "UNREADABLE"
# Nor this: the run of a sweep that was trained on other inputs than those that are compared.
OTHER_INPUTS = "ON OTHER INPUTS"
STATUSES = (*(status.value for status in Status), UNREADABLE, OTHER_INPUTS)
# Between the inputs of a run that went on with others.
THEN = " then "
# Metrics that are a share where every reward is 0 to 1.
SHARES = ("eval/accuracy", "eval/mean@", "eval/pass@")
# A swept key names a column and a figure's file.
_KEY = re.compile(r"(?=.{3,200}$)[A-Za-z_]\w*(\.\w+)+", re.ASCII)
# PyYAML's parser in C takes a tenth of the time, but what is nested deep enough overflows its
# stack: only short texts.
_SHORT = 20_000 if yaml.__with_libyaml__ else 0
# The parts of a manifest that the tables are made from, each of this type or absent.
_STRUCTURE: dict[str, type] = {
    "seed": int,
    "trial": dict,
    "trial.number": int,
    "trial.configuration": int,
    "trial.seed": int,
    "trial.params": dict,
    "trial.confirm": bool,
    "status_history": list,
    "command": list,
    "recipe": dict,
    "recipe.overrides": list,
    "model": dict,
    "data": dict,
    "git": dict,
    "hardware": dict,
    "packages": dict,
    "result": dict,
    "result.metrics": dict,
    "result.base": dict,
    "result.seconds": float,
    "resumed": list,
}


@dataclass(frozen=True, slots=True)
class Record:
    """What one run directory's files say; `reason` is why the run did not complete, or what could
    not be read.
    """

    run_dir: str
    status: str
    reason: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def trial(self) -> dict[str, Any]:
        """Number, configuration, seed and params of a sweep's trial, and `confirm` where it re-runs
        a leading one.
        """
        return self.manifest.get("trial") or {}

    def identity(self) -> dict[str, Any]:
        """The columns that say which run a row of any table belongs to."""
        return {
            "number": self.trial.get("number"),
            "configuration": self.trial.get("configuration"),
            "seed": self.seed,
            "status": self.status,
            "confirm": bool(self.trial.get("confirm")),
        }

    @property
    def seed(self) -> int | None:
        """The seed of a trial, else of the run."""
        seed: int | None = self.trial.get("seed", self.manifest.get("seed"))
        return seed

    @property
    def params(self) -> dict[str, Any]:
        """A trial's swept recipe keys and their values as given; empty for a single run."""
        return self.trial.get("params") or {}

    @property
    def inputs(self) -> str:
        """Which states of its inputs the run was trained on, by number: "1" unless they changed, "1
        then 2".
        """
        return THEN.join(map(str, versions(self.manifest)))

    @property
    def seconds(self) -> float | None:
        """Seconds the run took; None for one that has not ended."""
        result = self.manifest.get("result") or {}
        times = times_of(self.manifest)
        began, ended = times["started"], times["ended"]
        return result.get("seconds", None if began is None or ended is None else ended - began)


def check_own(run: RunDir, *paths: Path) -> None:
    """Raise UserError for a path of a run directory that leads out of it, by a link: a report shows
    what it reads.
    """
    for path in paths:
        if not path.resolve().is_relative_to(run.path):
            raise UserError(
                "a link leads out of the run directory", got=path, fix="put a copy in its place"
            )


def read_records(directory: str | Path) -> list[Record]:
    """A record per trial of a sweep, or a run's own; raises UserError when `directory` is
    neither.
    """
    run = RunDir(directory)
    check_own(run, run.manifest, run.recipe, run.trials)
    manifest = run.read_manifest()
    if manifest.get("kind") != "sweep":
        return [read_record(run, ".")]
    if problem := _problem(manifest):
        raise UserError("the sweep's manifest is damaged", got=f"{run.manifest}: {problem}")
    folders = sorted(p for p in run.trials.iterdir() if p.is_dir()) if run.trials.is_dir() else []
    return [_trial_record(run, folder, str(folder.relative_to(run.path))) for folder in folders]


def _trial_record(sweep: RunDir, folder: Path, name: str) -> Record:
    try:
        check_own(sweep, folder)
    except UserError as error:
        return Record(name, UNREADABLE, _brief(error))
    return read_record(RunDir(folder), name)


def read_record(run: RunDir, name: str) -> Record:
    """One run directory's record; what is damaged becomes its reason."""
    recipe = read_recipe(run.path)
    try:
        check_own(run, run.manifest, run.metrics)
        manifest = run.read_manifest()
    except (UserError, OSError, ValueError) as error:
        return Record(name, UNREADABLE, _brief(error), recipe=recipe)
    problem = _problem(manifest)
    if problem:
        return Record(name, UNREADABLE, f"manifest: {problem}", recipe=recipe)
    reason = manifest.get("reason")
    try:
        rows = MetricsFile(run.metrics).rows()
        result = {
            f"result.{part}": (manifest.get("result") or {}).get(part) or {}
            for part in ("metrics", "base")
        }
        logged = [(f"line {number} of metrics.jsonl: ", row) for number, row in enumerate(rows, 1)]
        stored = [(f"manifest: {part}.", row) for part, row in result.items()]
        wrong = [
            f"{where}{fault}" for where, row in (*stored, *logged) if (fault := _no_share(row))
        ]
        if wrong and rewards_are_shares(recipe, _rewards(run, rows)):
            if wrong[0].startswith("manifest"):
                return Record(name, UNREADABLE, wrong[0], recipe=recipe)
            rows, reason = [], wrong[0]
    except (UserError, OSError) as error:
        rows, reason = [], f"metrics.jsonl: {_brief(error)}"
    return Record(name, manifest["status"], reason, manifest, rows, recipe)


def read_recipe(directory: str | Path) -> dict[str, Any]:
    """The resolved recipe as plain values, whatever version of the schema wrote it; empty when it
    cannot be read.
    """
    return parsed_recipe(recipe_text(RunDir(directory)))


def recipe_text(run: RunDir) -> str:
    """The resolved recipe as it stands in the directory; empty when it cannot be read."""
    try:
        check_own(run, run.recipe)
        return run.recipe.read_text()
    except (UserError, OSError, ValueError):
        return ""


def parsed_recipe(text: str) -> dict[str, Any]:
    """A resolved recipe's plain values; empty for damaged YAML."""
    try:
        values = (
            yaml.load(text, Loader=yaml.CSafeLoader)
            if len(text) <= _SHORT
            else yaml.safe_load(text)
        )
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def lookup(values: dict[str, Any], key: str) -> Any:
    """A dotted key's value in nested dictionaries; None where it is absent."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def times_of(manifest: dict[str, Any]) -> dict[str, float | None]:
    """When a run was made, `started` (first RUNNING) and `ended` (in a final status), in seconds
    since 1970, UTC.
    """
    history = manifest.get("status_history") or []
    running = next((entry for entry in history if entry["status"] == Status.RUNNING.value), None)
    ended = history and manifest.get("status") not in (Status.CREATED.value, Status.RUNNING.value)
    return {
        "created": _epoch(history[0]) if history else None,
        "started": _epoch(running) if running else None,
        "ended": _epoch(history[-1]) if ended else None,
    }


def _epoch(entry: dict[str, Any]) -> float | None:
    try:
        stamp = datetime.fromisoformat(entry["time"])
        return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def rewards_are_shares(recipe: dict[str, Any], rewards: Iterable[float]) -> bool:
    """Return whether all rewards are 0 to 1, as those of every environment but a user's own are."""
    name = lookup(recipe, "environment.env_class")
    known = isinstance(name, str) and "." not in name
    return known and all(0 <= reward <= 1 for reward in rewards if reward == reward)


def _rewards(run: RunDir, rows: list[dict[str, float]]) -> list[float]:
    """The rewards that a run logged and kept, for the data may name an environment of their own."""
    found = [row["reward"] for row in rows if "reward" in row]
    for file in sorted(run.samples.glob("*.parquet")):
        with contextlib.suppress(UserError, OSError, ValueError, KeyError):
            check_own(run, file)
            found += pq.read_table(file, columns=["reward"])["reward"].to_pylist()
    return [reward for reward in found if isinstance(reward, int | float)]


def _no_share(row: dict[str, Any]) -> str | None:
    """The first metric of a row that should be a share and is none."""
    for name, value in row.items():
        if name.startswith(SHARES) and value is not None and (value < 0 or value > 1):
            return f"{name} is {value:g}, allowed: 0 to 1, as its rewards are"
    return None


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest's structure, or None when the tables can be made from it."""
    known = [status.value for status in Status]
    if manifest.get("status") not in known:
        return f"status is {manifest.get('status')!r}, not one of {', '.join(known)}"
    return next(wrong_types(manifest), None)


def wrong_types(manifest: dict[str, Any]) -> Iterator[str]:
    """What of a manifest is not of the type that the tables are made from."""
    for path, allowed in _STRUCTURE.items():
        value = lookup(manifest, path)
        flag = isinstance(value, bool) and allowed is not bool
        if value is not None and (
            flag or not isinstance(value, int | float if allowed is float else allowed)
        ):
            yield f"{path} is {type(value).__name__}, expected {allowed.__name__}"
    for part in ("result.metrics", "result.base"):
        for name, value in (lookup(manifest, part) or {}).items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                yield f"{part}.{name} is {value!r:.60}, allowed: a number or null"
    for name in (manifest.get("trial") or {}).get("params") or {}:
        if not _KEY.fullmatch(name):
            yield f"trial.params names {name[:100]!r}, which is no recipe key"
    for entry in manifest.get("status_history") or []:
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("status"), str)
            and isinstance(entry.get("time"), str)
        ):
            yield f"status_history holds {entry!r}"


def _brief(error: Exception) -> str:
    return error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
