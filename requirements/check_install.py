"""Checks that this environment holds what requirements/cpu.txt pins and that torch, its CPU build, computes.

Exits with status 1 and says what differs and what to do when it does not.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

LOCK = Path(__file__).resolve().parent / "cpu.txt"
CPU_TORCH_ADVICE = """\
error: torch {version} is a CUDA build; requirements/cpu.txt needs the CPU build of the same version
  fix: let pip find it, then run make again. PyTorch's installation page names the index of CPU builds:
         export PIP_EXTRA_INDEX_URL=<that index>    or, for a wheel already downloaded:
         export PIP_FIND_LINKS=<its folder>
         rm -r .venv"""


def differences(lock: Path) -> list[str]:
    """Packages missing or of another version than the lock says, one line each; +cpu and the like are ignored."""
    found = []
    for line in lock.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            installed = metadata.version(pin.name)
        except metadata.PackageNotFoundError:
            found.append(f"{line}: not installed")
            continue
        if not pin.specifier.contains(Version(installed).public):
            found.append(f"{line}: {installed} is installed")
    return found


def main() -> int:
    differing = differences(LOCK)
    if differing:
        print("error: this environment differs from requirements/cpu.txt", *differing, sep="\n  ", file=sys.stderr)
        print("  fix: rm -r .venv, then run make again", file=sys.stderr)
        return 1
    import torch  # only now: a missing torch is reported above

    if torch.version.cuda or torch.version.hip:
        print(CPU_TORCH_ADVICE.format(version=torch.__version__), file=sys.stderr)
        return 1
    if (torch.ones(2, 3) @ torch.ones(3, 2)).sum().item() != 12.0:
        print(f"error: torch {torch.__version__} computes wrong results on this machine", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
