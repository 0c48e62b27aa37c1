"""The manifest's record of what a run was made from and with, and comparisons with it.

It holds recipe, inputs, code, packages and hardware: enough to reproduce a run elsewhere.
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
from harness.records.run_dir import RunDir, adapter_folder, now

FORMAT = 2
ABSENT = "absent"
SHOWN_DIGITS = 12
_DIGEST = re.compile(r"(sha256:)?([0-9a-f]{40,64})")
# Inputs that not every run has.
_OPTIONAL = ("critic", "adapter", "checkpoint")
# Inputs that make another experiment when they change; "code" is the user's environment module.
_INPUTS = ("model", "critic", "adapter", "data", "code")
# What an adapter's folder holds; a checkpoint has its weights alone.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "weights.safetensors")
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
    """Return the manifest of a run, a trial or a sweep (`kind`), without status and result.

    `inputs` is the version of its sweep's inputs that a trial is trained on.
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
    """Return the manifest's entry for a resumed run: time, command, and what differs now."""
    current = build(
        recipe, kind=record["kind"], name=record["name"], source=record["recipe"]["source"]
    )
    different = [str(difference) for difference in compare(record, current).different]
    return {"time": now(), "command": this_command(), "different": different}


def this_command() -> list[str]:
    """Return the command line that started this process, in its `python -m` form.

    That form works in a clone and with an installed wheel, unlike the console script.
    """
    if started_by_script():
        return ["python", "-m", f"harness.{sys.argv[1]}", *sys.argv[2:]]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", module.name] if module else ["python", sys.argv[0]]
    return [*start, *sys.argv[1:]]


def changed_inputs(record: dict[str, Any]) -> list[Difference]:
    """Return how a run's model, critic, data and environment module differ from its manifest.

    Inputs without a digest, then or now, are not compared: a hub's model before its download. Nor
    is the adapter that a run started from, of which the run has a copy; a sweep starts more trials.
    """
    old, new = _compared(record), _compared({**record, **_inputs_now(record)})
    changes = [
        _difference(name, was, new[kind].get(name))
        for kind in _INPUTS
        if (kind, record.get("kind")) != ("adapter", "run")
        for name, was in old[kind].items()
        if was is not None and (kind in ("data", "code") or name in new[kind])
    ]
    return [change for change in changes if change is not None]


def check_inputs(changes: Sequence[Difference], kind: str, *, allowed: bool) -> None:
    """Raise UserError for changed inputs of a run or sweep (`kind`), unless `allowed`."""
    if changes and not allowed:
        raise UserError(
            f"the inputs of this {kind} have changed since it began",
            got="; ".join(map(str, changes)),
            fix=f"restore them, start a new {kind} under another trainer.run_name, or add "
            "--changed-inputs: what was "
            "trained on the former inputs is then marked, and not compared with the rest",
        )


def accept_inputs(run_dir: RunDir, version: int | None = None) -> list[str]:
    """Record the current inputs in a manifest, and return what changed.

    `inputs` lists the versions of the inputs that a run was trained on. The manifest has the
    digests of the last version; `resumed` has those before, with the last step that used them. A
    run without a checkpoint starts again, so only the new version counts. `version` is the number
    of the new version, by default the next.
    """
    record = run_dir.read_manifest()
    changes, current = [str(change) for change in changed_inputs(record)], _inputs_now(record)
    steps = [
        int(folder.name[5:])
        for folder in run_dir.checkpoints.glob("step_*")
        if folder.name[5:].isdigit()
    ]
    trained = versions(record)
    kept = trained if changes and (steps or record["kind"] == "sweep") else trained[:-1]
    values: dict[str, Any] = {"inputs": [*kept, version or trained[-1] + 1]}
    if changes:
        was = {"step": max(steps, default=0), "was": {kind: record.get(kind) for kind in current}}
        entry = {"time": now(), "command": this_command(), "different": changes, "inputs": was}
        values |= {**current, "resumed": [*record.get("resumed", []), entry]}
    run_dir.update(**values)
    return changes


def versions(record: dict[str, Any]) -> list[int]:
    """Return the versions of its inputs that a run was trained on; [1] unless they changed."""
    recorded = record.get("inputs")
    if isinstance(recorded, list) and recorded and all(type(item) is int for item in recorded):
        return recorded
    return [1]


def digest_path(path: str) -> str | None:
    """Return the SHA-256 of a file, or of a folder's files and their names.

    None for a path that is not on this machine.
    """
    root = locate(path)
    if root is None:
        return None
    files = (file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return _digest_of(files, root)


def digest_adapter(path: str) -> str | None:
    """Return the SHA-256 of an adapter's configuration and weights; None where there are none."""
    folder = adapter_folder(path)
    files = [] if folder is None else [folder / name for name in _ADAPTER]
    files = [file for file in files if file.is_file()]
    return _digest_of(files, files[0].parent) if files else None


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between a manifest and the present: what it is, its old and new value."""

    what: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.was} -> {self.now}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """The comparison of two manifests: parts that are equal, differences, parts not recorded."""

    equal: list[str]
    different: list[Difference]
    unrecorded: list[str]


def compare(record: dict[str, Any], current: dict[str, Any]) -> Agreement:
    """Compare a run's manifest with the manifest that the same run would get now."""
    old, new = _compared(record), _compared(current)
    agreement = Agreement([], [], [])
    for kind, values in new.items():
        if not old[kind]:
            if values or kind not in _OPTIONAL:
                agreement.unrecorded.append(kind)
            continue
        # Packages that were not recorded were not installed, or not needed.
        names = old[kind] if kind == "packages" else dict.fromkeys([*old[kind], *values])
        changes = [_difference(name, old[kind].get(name), values.get(name)) for name in names]
        agreement.different.extend(change for change in changes if change is not None)
        if not any(changes):
            agreement.equal.append(f"{len(names)} packages" if kind == "packages" else kind)
    return agreement


def _code(recipe: Recipe) -> dict[str, str | None]:
    """Return the digest of the project's source, and of the user's environment module if any."""
    module = recipe.environment.env_class
    return {_OWN_CODE: machine.code_digest()} | (
        {module: machine.module_digest(module)} if "." in module else {}
    )


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """Return model, tokenizer, critic, data, and what training starts from, with their digests."""
    trainer = recipe.trainer
    model, critic, start = trainer.policy.model.path, trainer.critic.model.path, trainer.resume_mode
    adapter = trainer.policy.model.lora.adapter_path
    gae = trainer.algorithm.advantage_estimator is AdvantageEstimator["gae"]
    return {
        "model": _model(model),
        "tokenizer": {"path": model, "digest": _digest_tokenizer(model)},
        "critic": _model(critic) if gae and critic is not None else None,
        "adapter": None if adapter is None else _adapter(adapter),
        "data": {
            path: digest_path(path) for path in (*recipe.data.train_data, *recipe.data.val_data)
        },
        "checkpoint": {"path": start, "digest": digest_path(start)}
        if start not in (None, "latest", "none")
        else None,
    }


def _inputs_now(record: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a manifest that name inputs, with the digests that they have now."""
    inputs: dict[str, Any] = {}
    for kind in ("model", "critic"):
        part = record.get(kind)
        if isinstance(part, dict) and isinstance(part.get("path"), str):
            inputs[kind] = _model(part["path"])
    if "model" in inputs:
        path = inputs["model"]["path"]
        inputs["tokenizer"] = {"path": path, "digest": _digest_tokenizer(path)}
    adapter = record.get("adapter")
    if isinstance(adapter, dict) and isinstance(adapter.get("path"), str):
        inputs["adapter"] = _adapter(adapter["path"])
    if isinstance(data := record.get("data"), dict):
        inputs["data"] = {path: digest_path(path) for path in data}
    if isinstance(code := record.get("code"), dict):
        inputs["code"] = {
            name: digest if name == _OWN_CODE else machine.module_digest(name)
            for name, digest in code.items()
        }
    return inputs


def _adapter(path: str) -> dict[str, str | None]:
    return {"path": path, "digest": digest_adapter(path)}


def _model(path: str) -> dict[str, str | None]:
    """Return a model's path with its digest (local), or with its revision in the hub's cache."""
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
    folder = locate(path)
    if folder is None or not folder.is_dir():
        return None
    return _digest_of(
        {file for pattern in _TOKENIZER for file in folder.glob(pattern) if file.is_file()}, folder
    )


def _digest_of(files: Iterable[Path], root: Path) -> str:
    # Cached by inode, size and time, so that a file that changes during a sweep is read again.
    stats = [(file, file.stat()) for file in sorted(files)]
    return _digest(
        tuple((file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats), root
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
    """Return what results depend on: by part of the manifest, values by label."""

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
    # A number of threads in the recipe overrides the environment's.
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
            for kind in ("model", "tokenizer", "critic", "adapter", "checkpoint")
        },
        "data": {f"data {path}": digest for path, digest in part("data").items()},
    }


def _labelled(kind: str, part: dict[str, Any]) -> dict[str, Any]:
    version = part.get("digest") or part.get("revision")
    return {f"{kind} {part.get('path')}": version} if version else {}


def _difference(what: str, was: Any, now: Any) -> Difference | None:
    return None if was == now else Difference(what, _shown(was), _shown(now))


def _shown(value: Any) -> str:
    """Return a value as text: the first digits of a digest, "absent" for nothing."""
    if value is None or value == []:
        return ABSENT
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    digest = _DIGEST.fullmatch(text)
    return f"{digest[1] or ''}{digest[2][:SHOWN_DIGITS]}" if digest else text
