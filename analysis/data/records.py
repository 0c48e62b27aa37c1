"""Read the files of one run directory into a `Record`.

Facts come from the contents of files, never from their names. Damage becomes a record's `reason`.
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

# The status of a directory that cannot be read, and of a trial whose inputs differ from those of
# the trials that are compared. No run ever has them.
UNREADABLE = "UNREADABLE"
OTHER_INPUTS = "ON OTHER INPUTS"
STATUSES = (*(status.value for status in Status), UNREADABLE, OTHER_INPUTS)
# Stands between the inputs of a run that was resumed with others.
THEN = " then "
# Prefixes of metrics that are a share when every reward is 0 to 1.
SHARES = ("eval/accuracy", "eval/mean@", "eval/pass@")
# A swept key names a column and a figure's file.
_KEY = re.compile(r"(?=.{3,200}$)[A-Za-z_]\w*(\.\w+)+", re.ASCII)
# PyYAML's C parser is ten times as fast, but deep nesting overflows its stack: short texts only.
_SHORT = 20_000 if yaml.__with_libyaml__ else 0
# The parts of a manifest that the tables need; each has this type or is absent.
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
    """One run directory's contents.

    `reason` says why the run did not complete, or what could not be read.
    """

    run_dir: str
    status: str
    reason: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def trial(self) -> dict[str, Any]:
        """A trial's number, configuration, seed, params and `confirm`; empty for a single run."""
        return self.manifest.get("trial") or {}

    def identity(self) -> dict[str, Any]:
        """Return the columns that say which run a row of any table belongs to."""
        return {
            "number": self.trial.get("number"),
            "configuration": self.trial.get("configuration"),
            "seed": self.seed,
            "status": self.status,
            "confirm": bool(self.trial.get("confirm")),
        }

    @property
    def seed(self) -> int | None:
        """The seed of the trial, else of the run."""
        seed: int | None = self.trial.get("seed", self.manifest.get("seed"))
        return seed

    @property
    def inputs(self) -> str:
        """The numbers of the run's inputs: "1", or "1 then 2" when they changed at a resume."""
        return THEN.join(map(str, versions(self.manifest)))

    @property
    def seconds(self) -> float | None:
        """Seconds the run took; None while it has not ended."""
        result, times = self.manifest.get("result") or {}, times_of(self.manifest)
        began, ended = times["started"], times["ended"]
        return result.get("seconds", None if began is None or ended is None else ended - began)

    @property
    def num_problems(self) -> int | None:
        """Held-out problems of the run's evaluations, as logged; None where it logged none."""
        name = "eval/num_problems"
        logged = [row[name] for row in self.rows if name in row and row[name] == row[name]]
        return int(logged[-1]) if logged else None


def check_inside(run: RunDir, *paths: Path) -> None:
    """Raise UserError for a path that leaves the run directory through a link.

    A report shows what it reads, so it must not read another folder's files.
    """
    for path in paths:
        if not path.resolve().is_relative_to(run.path):
            raise UserError(
                "a link leads out of the run directory", got=path, fix="put a copy in its place"
            )


def read_records(directory: str | Path) -> list[Record]:
    """Return a record for each trial of a sweep, or one for a run; raises UserError otherwise."""
    run = RunDir(directory)
    check_inside(run, run.manifest, run.recipe, run.trials)
    manifest = run.read_manifest()
    if manifest.get("kind") != "sweep":
        return [read_record(run, ".")]
    if problem := _first_error(manifest):
        raise UserError("the sweep's manifest is damaged", got=f"{run.manifest}: {problem}")
    records = []
    for folder in sorted(run.trials.iterdir()) if run.trials.is_dir() else []:
        if not folder.is_dir():
            continue
        name = str(folder.relative_to(run.path))
        try:
            check_inside(run, folder)
            records.append(read_record(RunDir(folder), name))
        except UserError as error:
            records.append(Record(name, UNREADABLE, _brief(error)))
    return records


def read_record(run: RunDir, name: str) -> Record:
    """Return one run directory's record; damage becomes its reason."""
    recipe = parse_recipe(recipe_text(run))
    try:
        check_inside(run, run.manifest, run.metrics)
        manifest = run.read_manifest()
    except (UserError, OSError, ValueError) as error:
        return Record(name, UNREADABLE, _brief(error), recipe=recipe)
    if problem := _first_error(manifest):
        return Record(name, UNREADABLE, f"manifest: {problem}", recipe=recipe)
    status = manifest["status"]
    try:
        rows = MetricsFile(run.metrics).rows()
    except (UserError, OSError) as error:
        return Record(name, status, f"metrics.jsonl: {_brief(error)}", manifest, [], recipe)
    result = manifest.get("result") or {}
    stored = [(f"manifest: result.{part}.", result.get(part) or {}) for part in ("metrics", "base")]
    logged = [(f"line {number} of metrics.jsonl: ", row) for number, row in enumerate(rows, 1)]
    errors = [
        f"{where}{wrong}" for where, row in (*stored, *logged) if (wrong := _share_error(row))
    ]
    if errors and rewards_are_shares(recipe, _rewards(run, rows)):
        if errors[0].startswith("manifest"):
            return Record(name, UNREADABLE, errors[0], recipe=recipe)
        return Record(name, status, errors[0], manifest, [], recipe)
    return Record(name, status, manifest.get("reason"), manifest, rows, recipe)


def recipe_text(run: RunDir) -> str:
    """Return the text of the directory's resolved recipe; empty when it cannot be read."""
    try:
        check_inside(run, run.recipe)
        return run.recipe.read_text()
    except (UserError, OSError, ValueError):
        return ""


def parse_recipe(text: str) -> dict[str, Any]:
    """Return a resolved recipe as plain values, whatever schema version; empty for damaged YAML."""
    try:
        if len(text) <= _SHORT:
            values = yaml.load(text, Loader=yaml.CSafeLoader)
        else:
            values = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def lookup(values: dict[str, Any], key: str) -> Any:
    """Return a dotted key's value in nested dictionaries; None where it is absent."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def times_of(manifest: dict[str, Any]) -> dict[str, float | None]:
    """Return when a run was created, started (first RUNNING) and ended, in seconds since 1970."""
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
    """Return whether all rewards are 0 to 1; a user's own environment may give any number."""
    name = lookup(recipe, "environment.env_class")
    built_in = isinstance(name, str) and "." not in name
    return built_in and all(0 <= reward <= 1 for reward in rewards if reward == reward)


def _rewards(run: RunDir, rows: list[dict[str, float]]) -> list[float]:
    """Return the rewards in the metrics and samples: the data may name another environment."""
    rewards = [row["reward"] for row in rows if "reward" in row]
    for file in sorted(run.samples.glob("*.parquet")):
        with contextlib.suppress(UserError, OSError, ValueError, KeyError):
            check_inside(run, file)
            rewards += pq.read_table(file, columns=["reward"])["reward"].to_pylist()
    return [reward for reward in rewards if isinstance(reward, int | float)]


def _share_error(row: dict[str, Any]) -> str | None:
    """Return the first metric of a row that should be a share and is not within 0 to 1."""
    for name, value in row.items():
        if name.startswith(SHARES) and value is not None and (value < 0 or value > 1):
            return f"{name} is {value:g}, allowed: 0 to 1, as its rewards are"
    return None


def _first_error(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with a manifest's structure; None when the tables can be made of it."""
    known = [status.value for status in Status]
    if manifest.get("status") not in known:
        return f"status is {manifest.get('status')!r}, not one of {', '.join(known)}"
    return next(wrong_types(manifest), None)


def wrong_types(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of a manifest that do not have the type the tables need."""
    for path, allowed in _STRUCTURE.items():
        value = lookup(manifest, path)
        types = int | float if allowed is float else allowed
        wrong_flag = isinstance(value, bool) and allowed is not bool
        if value is not None and (wrong_flag or not isinstance(value, types)):
            yield f"{path} is {type(value).__name__}, expected {allowed.__name__}"
    for part in ("result.metrics", "result.base"):
        for name, value in (lookup(manifest, part) or {}).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not number:
                yield f"{part}.{name} is {value!r:.60}, allowed: a number or null"
    for name in (manifest.get("trial") or {}).get("params") or {}:
        if not _KEY.fullmatch(name):
            yield f"trial.params names {name[:100]!r}, which is no recipe key"
    for entry in manifest.get("status_history") or []:
        texts = [entry.get("status"), entry.get("time")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            yield f"status_history holds {entry!r}"


def _brief(error: Exception) -> str:
    return error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
