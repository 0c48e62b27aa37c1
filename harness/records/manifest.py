"""Provenance: what a run was started with and on, enough for a stranger to redo it, and what
differs now.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.digest import recipe_digest
from harness.config.schema import AdvantageEstimator, Recipe
from harness.core import machine
from harness.core.cli import started_by_script
from harness.core.errors import UserError
from harness.core.paths import locate
from harness.records.run_dir import RunDir, now

FORMAT = 2
ABSENT = "absent"
SHOWN_DIGITS = 12
_DIGEST = re.compile(r"(sha256:)?([0-9a-f]{40,64})")
# What a run need not have; anything else is recorded or unknown.
_OPTIONAL = ("critic", "checkpoint")
# What makes of a run another experiment where it changes; "code" is here the user's environment
# module.
_INPUTS = ("model", "critic", "data", "code")
_OWN_CODE = "noregret"
_TOKENIZER = ("*token*", "vocab.*", "merges.txt", "chat_template*", "*.model")


def build(
    recipe: Recipe,
    *,
    kind: str,
    name: str,
    source: str,
    overrides: Sequence[str] = (),
    command: Sequence[str] = (),
    trial: dict[str, Any] | None = None,
    inputs: int = 1,
) -> dict[str, Any]:
    """The manifest of a run, a trial or a sweep (`kind`), status and result aside.

    `inputs`: which state of its sweep's inputs a trial is trained on; they count up each time they
    change.
    """
    packages, dependencies = machine.packages()
    return {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "command": list(command),
        "recipe": {
            "source": source,
            "overrides": list(overrides),
            "digest": recipe_digest(recipe),
        },
        "seed": recipe.seed,
        "trial": trial,
        "git": machine.git_state(),
        "code": _code(recipe),
        "packages": packages,
        "dependencies": dependencies,
        "python": platform.python_version(),
        "hardware": machine.hardware(),
        "threads": recipe.trainer.num_threads,
        "thread_variables": machine.thread_variables(),
        **_inputs(recipe),
        "inputs": [inputs],
        "result": None,
    }


def resumption(record: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """When and how a run is gone on with, and what differs now from its manifest."""
    again = build(
        recipe, kind=record["kind"], name=record["name"], source=record["recipe"]["source"]
    )
    different = [str(difference) for difference in compare(record, again).different]
    return {"time": now(), "command": this_command(), "different": different}


def this_command() -> list[str]:
    """The command line that started this process; of the console script the `python -m` form.

    That form works from a clone and from an installed wheel alike.
    """
    if started_by_script():
        return ["python", "-m", f"harness.{sys.argv[1]}", *sys.argv[2:]]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", module.name] if module else ["python", sys.argv[0]]
    return [*start, *sys.argv[1:]]


def changed_inputs(record: dict[str, Any]) -> list[Difference]:
    """Return what of a run's model, critic, data and environment module is another now than its
    manifest says.

    Where a digest is not known, then or now (a hub's model before its download), there is nothing
    to compare.
    """
    old, new = _compared(record), _compared({**record, **_inputs_now(record)})
    found = [
        _difference(name, was, new[kind].get(name))
        for kind in _INPUTS
        for name, was in old[kind].items()
        if was is not None and (kind in ("data", "code") or name in new[kind])
    ]
    return [difference for difference in found if difference is not None]


def check_inputs(changes: Sequence[Difference], kind: str, *, allowed: bool) -> None:
    """Raise UserError for inputs that changed since a run or sweep (`kind`) began, unless that is
    `allowed`.
    """
    if changes and not allowed:
        raise UserError(
            f"the inputs are not those that this {kind} began with",
            got="; ".join(map(str, changes)),
            fix=f"put them back, start a new {kind} under another trainer.run_name, or add "
            "--changed-inputs: what was "
            "trained on the former inputs is then marked, and not compared with the rest",
        )


def accept_inputs(run_dir: RunDir, version: int | None = None) -> list[str]:
    """Record in a manifest the inputs as they are now, and return what of them is another.

    `inputs` lists the states of its inputs that a run was trained on, the last with the digests in
    the manifest; those before, with the step that they were used to, are in `resumed`. A run
    without a checkpoint begins anew: it counts as trained on the new inputs alone. `version` is the
    number of the new state, by default the next.
    """
    record = run_dir.read_manifest()
    changes, now_there = [str(change) for change in changed_inputs(record)], _inputs_now(record)
    steps = [
        int(folder.name[5:])
        for folder in run_dir.checkpoints.glob("step_*")
        if folder.name[5:].isdigit()
    ]
    trained = versions(record)
    kept = trained if changes and (steps or record["kind"] == "sweep") else trained[:-1]
    values: dict[str, Any] = {"inputs": [*kept, version or trained[-1] + 1]}
    if changes:
        was = {"step": max(steps, default=0), "was": {kind: record.get(kind) for kind in now_there}}
        entry = {"time": now(), "command": this_command(), "different": changes, "inputs": was}
        values |= {**now_there, "resumed": [*record.get("resumed", []), entry]}
    run_dir.update(**values)
    return changes


def versions(record: dict[str, Any]) -> list[int]:
    """Return the states of its inputs that a run was trained on, in order: [1] unless they
    changed.
    """
    known = record.get("inputs")
    if isinstance(known, list) and known and all(type(one) is int for one in known):
        return known
    return [1]


def digest_path(path: str) -> str | None:
    """SHA-256 over a file, or over a folder's files and their names; None for a name that is not on
    this machine.
    """
    found = locate(path)
    if found is None:
        return None
    files = (p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]
    return _digest_of(files, found)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that a run depends on and that is another now: what, what it was, what it is."""

    what: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.was} -> {self.now}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two manifests compared: kinds of things that are equal, what differs, kinds that the first
    did not record.
    """

    equal: list[str]
    different: list[Difference]
    unrecorded: list[str]


def compare(record: dict[str, Any], again: dict[str, Any]) -> Agreement:
    """What a run's manifest says it was made from and with, against that of the same run
    made now.
    """
    old, new = _compared(record), _compared(again)
    agreement = Agreement([], [], [])
    for kind, values in new.items():
        if not old[kind]:
            if values or kind not in _OPTIONAL:
                agreement.unrecorded.append(kind)
            continue
        # A package that was not recorded is none that the run used.
        names = old[kind] if kind == "packages" else dict.fromkeys([*old[kind], *values])
        found = [_difference(name, old[kind].get(name), values.get(name)) for name in names]
        agreement.different.extend(difference for difference in found if difference is not None)
        if not any(found):
            agreement.equal.append(f"{len(names)} packages" if kind == "packages" else kind)
    return agreement


def _code(recipe: Recipe) -> dict[str, str | None]:
    """Digests of the project's source, and of the user's environment module where the recipe names
    one.
    """
    own = recipe.environment.env_class
    return {_OWN_CODE: machine.code_digest()} | (
        {own: machine.module_digest(own)} if "." in own else {}
    )


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """Model, tokenizer, critic, data and the checkpoint gone on from, with their digests."""
    trainer = recipe.trainer
    model, critic, start = trainer.policy.model.path, trainer.critic.model.path, trainer.resume_mode
    gae = trainer.algorithm.advantage_estimator is AdvantageEstimator["gae"]
    return {
        "model": _model(model),
        "tokenizer": {"path": model, "digest": _digest_tokenizer(model)},
        "critic": _model(critic) if gae and critic is not None else None,
        "data": {
            path: digest_path(path) for path in (*recipe.data.train_data, *recipe.data.val_data)
        },
        "checkpoint": {"path": start, "digest": digest_path(start)}
        if start not in (None, "latest", "none")
        else None,
    }


def _inputs_now(record: dict[str, Any]) -> dict[str, Any]:
    """The parts of a manifest that name inputs, with what their paths hold now."""
    found: dict[str, Any] = {}
    for kind in ("model", "critic"):
        part = record.get(kind)
        if isinstance(part, dict) and isinstance(part.get("path"), str):
            found[kind] = _model(part["path"])
    if "model" in found:
        path = found["model"]["path"]
        found["tokenizer"] = {"path": path, "digest": _digest_tokenizer(path)}
    if isinstance(data := record.get("data"), dict):
        found["data"] = {path: digest_path(path) for path in data}
    if isinstance(code := record.get("code"), dict):
        found["code"] = {
            name: digest if name == _OWN_CODE else machine.module_digest(name)
            for name, digest in code.items()
        }
    return found


def _model(path: str) -> dict[str, str | None]:
    """A local folder has a digest; a hub's name has the revision in the cache, None before its
    first download.
    """
    return {
        "path": path,
        "digest": digest_path(path),
        "revision": _revision(path) if locate(path) is None else None,
    }


def _revision(name: str) -> str | None:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    try:
        return (cache / f"models--{name.replace('/', '--')}" / "refs" / "main").read_text().strip()
    except OSError:
        return None


def _digest_tokenizer(path: str) -> str | None:
    found = locate(path)
    if found is None or not found.is_dir():
        return None
    return _digest_of(
        {file for pattern in _TOKENIZER for file in found.glob(pattern) if file.is_file()}, found
    )


def _digest_of(files: Iterable[Path], root: Path) -> str:
    # A file that changed while a sweep runs is read again.
    stats = [(file, file.stat()) for file in sorted(files)]
    return _digest(
        tuple((file, one.st_ino, one.st_size, one.st_mtime_ns) for file, one in stats), root
    )


@functools.lru_cache(maxsize=1024)
def _digest(files: tuple[tuple[Path, int, int, int], ...], root: Path) -> str:
    total = hashlib.sha256()
    for file, *_ in files:
        total.update(str(file.relative_to(root)).encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def _compared(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a manifest results depend on: by kind, each thing's label and value."""

    def part(*keys: str) -> dict[str, Any]:
        value: Any = manifest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    changes = part("git", "diff").get("digest")
    git = (
        {"commit": part("git").get("commit"), "uncommitted changes": changes} if part("git") else {}
    )
    threads = {"trainer.num_threads": manifest.get("threads")} if "threads" in manifest else {}
    # A number in the recipe wins over the environment's.
    variables = part("thread_variables") if manifest.get("threads") is None else {}
    return {
        "recipe": {"recipe": part("recipe").get("digest")} if part("recipe") else {},
        "commit": git,
        "code": {f"code of {name}": digest for name, digest in part("code").items()},
        "python": {"python": manifest["python"]} if "python" in manifest else {},
        "packages": {**part("packages"), **part("dependencies")},
        "hardware": part("hardware"),
        "threads": {**threads, **variables},
        **{
            kind: _labelled(kind, part(kind))
            for kind in ("model", "tokenizer", "critic", "checkpoint")
        },
        "data": {f"data {path}": digest for path, digest in part("data").items()},
    }


def _labelled(kind: str, part: dict[str, Any]) -> dict[str, Any]:
    known = part.get("digest") or part.get("revision")
    return {f"{kind} {part.get('path')}": known} if known else {}


def _difference(what: str, was: Any, now: Any) -> Difference | None:
    return None if was == now else Difference(what, _shown(was), _shown(now))


def _shown(value: Any) -> str:
    """A value for people: of a digest its first digits, of nothing that it is absent."""
    if value is None or value == []:
        return ABSENT
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    digest = _DIGEST.fullmatch(text)
    return f"{digest[1] or ''}{digest[2][:SHOWN_DIGITS]}" if digest else text
