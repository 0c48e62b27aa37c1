"""Plant faults in the code, one at a time, and list which of them the tests notice.

    python -m tests.planted [--tier fast|standard] [--only NAME ...] [--output FILE]

Each fault of `planted_faults.yaml` is planted in a copy of the working tree. There the tests that
are likely to notice it run first, then, if these pass, all others; the first failure ends the run.
A failure counts only if the same test file passes without the fault. Results are kept in
`runs/planted.json` and reused while source and tests do not change, so that a stopped run can be
resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from harness.config.metrics import duration
from harness.core.cli import Parser, run_command
from harness.core.errors import UserError, nearest
from harness.core.paths import PROJECT
from harness.records.files import write_json, write_text

DATA = Path(__file__).with_name("planted_faults.yaml")
PACKAGES = ("harness", "rltrain", "sweeps", "analysis")
RESULTS = PROJECT / "runs" / "planted.json"
# Files that determine a result, besides the fault.
INPUTS = (*PACKAGES, "recipes", "tests", "pyproject.toml", ":!tests/planted*")
FAST = "tests/unit"
# The tests that each tier adds to the one before it.
TIERS = {"fast": [FAST], "standard": ["tests", f"--ignore={FAST}"]}
COMMANDS = {"fast": "make test-fast", "standard": "make test"}
# The share of the faults that the tests up to a tier must notice.
WANTED = {"fast": 2 / 3, "standard": 1.0}
# Seconds for one call of pytest, whose own limit per test is much lower.
LIMIT = 3600
# Every process that a planted fault's tests start has this variable, to find it later.
MARK = "NOREGRET_PLANTED"


@dataclass(frozen=True, slots=True)
class Fault:
    """Source text that stands exactly once, and what it becomes.

    `tests`: the test files to run first, wherever they are: `losses` is `test_losses.py`.
    """

    name: str
    find: str
    replace: str
    tests: tuple[str, ...] = ()

    def file(self, sources: Mapping[str, str]) -> str:
        """Return the path whose text holds the fault's; raise UserError unless it stands once."""
        matches = [path for path, text in sources.items() for _ in range(text.count(self.find))]
        if len(matches) != 1:
            times = f"{len(matches)} times, in {', '.join(matches)}" if matches else "not at all"
            raise UserError(
                f"the text of the fault {self.name!r} must stand once in {', '.join(PACKAGES)}",
                got=f"{times}: {self.find}",
                fix=f"change its find and replace in tests/{DATA.name} to the code as it is now",
            )
        return matches[0]


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a fault: the tier and the test file that noticed it, None where none did.

    `hung`: a call of pytest did not end within `LIMIT`.
    """

    file: str
    tier: str | None
    area: str | None
    seconds: float
    hung: bool = False

    @property
    def outcome(self) -> str:
        """Return the result in words, without the test file."""
        return COMMANDS[self.tier] if self.tier else "hung" if self.hung else "NOT NOTICED"


def load_faults() -> list[Fault]:
    """Return the faults of `planted_faults.yaml`."""
    entries = yaml.safe_load(DATA.read_text())
    return [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def read_sources(root: Path = PROJECT) -> dict[str, str]:
    """Return the text of each source file by its path relative to `root`."""
    files = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
    return {str(file.relative_to(root)): file.read_text() for file in files}


@contextlib.contextmanager
def copied(root: Path) -> Iterator[Path]:
    """Copy a working tree, without what git ignores, to a repository of its own."""
    with tempfile.TemporaryDirectory(prefix="planted-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder) / "tree"
        for name in _git(root, "ls-files", "-coz", "--exclude-standard").split("\0"):
            if name and (root / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, tree / name)
        _git(tree, "init", "--quiet")
        _git(tree, "add", "--all")
        author = ["-c", "user.name=planted", "-c", "user.email="]
        _git(tree, *author, "commit", "--quiet", "--message", "Copy")
        yield tree


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def failing_area(tree: Path, tests: Sequence[str]) -> str | None:
    """Run tests in a copy up to the first failure; return the file that failed, None for none.

    Raises TimeoutError after `LIMIT` seconds and RuntimeError where pytest itself goes wrong.
    """
    # The faults' own test would notice each of them.
    options = ["-x", "-q", "-p", "no:cacheprovider", "--ignore-glob=*/test_planted_faults.py"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "-m", "not slow", *tests],
        cwd=tree,
        env=_environment(tree),
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    finally:
        _end_processes(tree)
        process.wait()
    failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+?\.py)", output, re.MULTILINE)
    if failed:
        return failed[1]
    # 5: every test named is of another tier.
    if process.returncode not in (0, 5):
        end = output[-4000:]
        raise RuntimeError(f"pytest ended with {process.returncode} and names no test:\n{end}")
    return None


def _environment(tree: Path) -> dict[str, str]:
    """Return an environment in which the copy's packages come before installed ones."""
    gsm8k = PROJECT.parent / "shared" / "data" / "gsm8k"
    defaults = {"NOREGRET_GSM8K": str(gsm8k), "OMP_NUM_THREADS": "1"}
    return {**defaults, **os.environ, "PYTHONPATH": str(tree), MARK: str(tree)}


def _end_processes(tree: Path) -> None:
    """Kill what a run of tests has left, including daemons in other sessions."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(tree):
                # Ray's workers write over their environment; their parents do not.
                for one in (*process.children(recursive=True), process):
                    one.kill()


def check_imports(tree: Path) -> None:
    """Raise RuntimeError unless a process that the tests start imports the copy's packages."""
    names = ", ".join(PACKAGES)
    command = [sys.executable, "-c", f"import {names}; print(*(m.__file__ for m in ({names})))"]
    output = subprocess.check_output(command, cwd=tree.parent, env=_environment(tree), text=True)
    outside = [file for file in output.split() if not Path(file).is_relative_to(tree)]
    if outside:
        raise RuntimeError(f"installed packages come before the copy's: {', '.join(outside)}")


class Planting:
    """Plants faults, and keeps the results while source and tests do not change."""

    def __init__(self, clean: Path, workers: int) -> None:
        """Plant in copies of `clean`; `workers` test files run at a time in a whole tier."""
        self._clean = clean
        self._workers = ["-n", str(workers), "--dist", "loadfile"]
        self._sound: set[str | None] = set()
        total = hashlib.sha256()
        for name in _git(clean, "ls-files", "-z", *INPUTS).rstrip("\0").split("\0"):
            total.update(name.encode() + (clean / name).read_bytes())
        self._inputs = total.hexdigest()
        self._kept: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._kept = json.loads(RESULTS.read_text())

    def result(self, fault: Fault, tiers: Sequence[str]) -> Result:
        """Return the result of a fault under these tiers, from an earlier run if it is known."""
        key = [self._inputs, fault.find, fault.replace]
        kept = self._kept.get(fault.name, {})
        # A fault that the fast tier does not notice is open until the other tiers have run.
        if kept.get("key") == key and (kept["result"]["tier"] or kept["tiers"] == list(tiers)):
            return Result(**kept["result"])
        result = self._plant(fault, tiers)
        self._kept[fault.name] = {"key": key, "tiers": list(tiers), "result": asdict(result)}
        write_json(RESULTS, self._kept)
        return result

    def _plant(self, fault: Fault, tiers: Sequence[str]) -> Result:
        start, tier, area, hung = time.monotonic(), None, None, False
        with copied(self._clean) as tree:
            sources = read_sources(tree)
            file = fault.file(sources)
            (tree / file).write_text(sources[file].replace(fault.find, fault.replace))
            try:
                tier, area = self._first_failure(tree, fault, tiers)
            except TimeoutError:
                hung = True
        seconds = round(time.monotonic() - start, 1)
        if area and area not in self._sound and failing_area(self._clean, [area]):
            what = "tests fail without a fault, so they cannot show that they notice one"
            raise UserError(what, got=area, fix="fix them, then run the same command again")
        self._sound.add(area)
        return Result(file, tier, area, seconds, hung)

    def _first_failure(
        self, tree: Path, fault: Fault, tiers: Sequence[str]
    ) -> tuple[str | None, str | None]:
        """Return the tier and the test file that first notice a planted fault."""
        for tier, tests in self.calls(fault, tiers):
            area = failing_area(tree, tests)
            if area is not None:
                return tier, area
        return None, None

    def calls(self, fault: Fault, tiers: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield the calls of pytest for a fault.

        The first calls run its listed tests, tier by tier, and then all tests.
        """
        tests = self._clean / "tests"
        test_files = [file for word in fault.tests for file in tests.rglob(f"test_{word}.py")]
        hinted = [str(file.relative_to(self._clean)) for file in test_files]
        for tier in tiers:
            selected = [file for file in hinted if file.startswith(f"{FAST}/") == (tier == "fast")]
            if selected:
                yield tier, selected
        for tier in tiers:
            yield tier, [*TIERS[tier], *self._workers]


def table(results: Mapping[str, Result]) -> str:
    """Return the results as a Markdown page."""
    by_fast = sum(result.tier == "fast" for result in results.values())
    by_any = sum(result.tier is not None for result in results.values())
    rows = [
        f"| {name} | `{one.file}` | {one.outcome} | {one.area or ''} | {one.seconds:.0f} |\n"
        for name, one in results.items()
    ]
    return f"""# Planted faults

Each fault below was planted in the code, alone, and tests ran until the first failure: first the
tests likely to notice it, from `make test-fast` and then from `make test`; where these passed, all
tests of either. The seconds are the time to the first failure. Of {len(results)} faults
`make test-fast` notices at least {by_fast}, and `make test` {by_any}.

The faults are in `tests/planted_faults.yaml`; `python -m tests.planted --output docs/planted.md`
plants them and writes this page.

| fault | in | noticed by | first failure in | seconds |
|---|---|---|---|---|
{"".join(rows)}"""


def main(argv: list[str]) -> int:
    """Plant faults, run tests and print the results.

    Returns 1 where the tests notice fewer faults than they must.
    """
    parser = Parser(prog="python -m tests.planted", description="List which faults tests notice.")
    add = parser.add_argument
    add("--tier", choices=list(TIERS), default="standard", help="the last tier to run")
    add("--only", nargs="+", metavar="NAME", help="faults whose names begin so")
    add("--output", metavar="FILE", type=Path, help="where the table goes; default: print it")
    add("--workers", type=int, default=2, metavar="N", help="test files at a time; default: 2")
    options = parser.parse_args(argv)
    # As for Ctrl-C: no started process is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    faults = _chosen(load_faults(), options.only)
    sources = read_sources()
    for fault in faults:
        fault.file(sources)
    tiers = list(TIERS)[: list(TIERS).index(options.tier) + 1]
    with copied(PROJECT) as clean:
        check_imports(clean)
        planting, start = Planting(clean, options.workers), time.monotonic()
        results: dict[str, Result] = {}
        for number, fault in enumerate(faults, start=1):
            one = results[fault.name] = planting.result(fault, tiers)
            left = duration((time.monotonic() - start) / number * (len(faults) - number))
            line = f"{fault.name}: {one.outcome} {one.area or ''} ({one.seconds:.0f} s)"
            print(f"[{number}/{len(faults)}, {left} left] {line}", file=sys.stderr, flush=True)
    if options.output:
        write_text(options.output, table(results))
    else:
        print(table(results))
    noticed = sum(result.tier is not None for result in results.values())
    return 0 if noticed >= WANTED[options.tier] * len(results) else 1


def _chosen(faults: list[Fault], names: Sequence[str] | None) -> list[Fault]:
    """Return the faults whose names begin with one of `names`, all for None."""
    if names is None:
        return faults
    for name in names:
        if not any(fault.name.startswith(name) for fault in faults):
            guess = nearest(name, [fault.name for fault in faults])
            fix = f"did you mean {guess!r}?" if guess else f"tests/{DATA.name} has them all"
            raise UserError("no such fault", got=name, fix=fix)
    return [fault for fault in faults if fault.name.startswith(tuple(names))]


if __name__ == "__main__":
    run_command(main)
