"""Measure how the sources are built: `python -m tests.house` prints a table, `--check` fails on
what must not be.

Counts imports everywhere in a module: at the top, under TYPE_CHECKING, and inside functions.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
AREAS = ("harness", "rltrain", "sweeps", "analysis")
MOST_MODULES = 12
MOST_LEVELS = 10
MOST_FUNCTIONS = 56
MOST_LINES = 400
LONGEST_LINE = 100

Graph = Mapping[str, set[str]]


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its dotted name, package, syntax tree and text."""

    name: str
    package: str
    tree: ast.Module
    text: str

    @property
    def lines(self) -> int:
        """Lines of the file."""
        return self.text.count("\n")


def read_modules(root: Path = PROJECT) -> dict[str, Module]:
    """Return the modules of all areas by dotted name; packages' `__init__` are named as the
    package.
    """
    modules = {}
    for area in AREAS:
        for path in sorted((root / area).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            initial = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if initial else parts)
            text = path.read_text()
            package = name if initial else ".".join(parts[:-1])
            modules[name] = Module(name, package, ast.parse(text), text)
    return modules


def imported(module: Module, names: set[str]) -> Iterator[str]:
    """Yield the modules among `names` that a module imports, anywhere in it."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in names else node.module


def import_graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Return for each module those of ours that it imports."""
    names = set(modules)
    return {n: {i for i in imported(m, names) if i in names and i != n} for n, m in modules.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return sorted(found)


def mutual_packages(modules: Mapping[str, Module], graph: Graph) -> list[tuple[str, str]]:
    """Return the pairs of packages that import each other; a folder inside another is a package of
    its own.
    """
    edges = {
        (modules[name].package, modules[other].package)
        for name, others in graph.items()
        for other in others
        if modules[name].package != modules[other].package
    }
    return sorted((one, two) for one, two in edges if one < two and (two, one) in edges)


def levels(graph: Graph, area: str) -> int:
    """Return the longest chain of imports within an area; a circle counts once."""
    inside = {
        n: {o for o in others if _within(o, area)}
        for n, others in graph.items()
        if _within(n, area)
    }
    depths: dict[str, int] = {}

    def depth(name: str, above: frozenset[str]) -> int:
        if name not in depths:
            below = [depth(other, above | {name}) for other in inside[name] if other not in above]
            depths[name] = 1 + max(below, default=0)
        return depths[name]

    return max((depth(name, frozenset()) for name in inside), default=0)


def _within(name: str, area: str) -> bool:
    return name == area or name.startswith(f"{area}.")


def folder_sizes(modules: Mapping[str, Module]) -> Counter[str]:
    """Return the number of modules directly in each package, `__init__` aside."""
    return Counter(module.package for module in modules.values() if module.name != module.package)


def count_functions(modules: Mapping[str, Module]) -> int:
    """Return the number of functions and methods."""
    return sum(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for module in modules.values()
        for node in ast.walk(module.tree)
    )


def repeated_classes(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Return the class names that several modules define, with these modules."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module.name)
    return {name: found for name, found in places.items() if len(found) > 1}


def unused_private(modules: Mapping[str, Module]) -> list[str]:
    """Return the private functions and classes that their module does not use."""
    unused = []
    for name, module in modules.items():
        words = Counter(re.findall(r"\w+", module.text))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                private = node.name.startswith("_") and not node.name.endswith("__")
                if private and words[node.name] == 1:
                    unused.append(f"{name}.{node.name}")
    return unused


def measure(root: Path = PROJECT) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return the table (what, measured, wanted) and what must not be and is."""
    modules = read_modules(root)
    graph = import_graph(modules)
    around, mutual, classes = (
        circles(graph),
        mutual_packages(modules, graph),
        repeated_classes(modules),
    )
    folders, unused = folder_sizes(modules), unused_private(modules)
    count = count_functions(modules)
    functions = 1000 * count / max(1, sum(module.lines for module in modules.values()))
    skipped = sum(module.text.count("# fmt: " + "skip") for module in modules.values())
    long_lines = sum(
        len(line) > LONGEST_LINE for m in modules.values() for line in m.text.splitlines()
    )
    largest, size = folders.most_common(1)[0]
    lines = Counter[str]()
    for module in modules.values():
        lines[module.name.split(".")[0]] += module.lines
    longest = sum(module.lines > MOST_LINES for module in modules.values())
    rows = [
        ("modules in the largest folder", f"{size} ({largest})", f"<= {MOST_MODULES}"),
        *(
            (f"levels of imports in {area}", str(levels(graph, area)), f"<= {MOST_LEVELS}")
            for area in AREAS
        ),
        (f"modules of more than {MOST_LINES} lines", str(longest), "0"),
        ("functions per 1,000 lines", f"{functions:.0f}", "<= 55"),
        ("functions", f"{count:,}", ""),
        ("circles of imports", str(len(around)), "0"),
        ("packages that import each other", str(len(mutual)), "0"),
        ("class names defined twice", str(len(classes)), "0"),
        ("private functions without a caller", str(len(unused)), "0"),
        (f"lines longer than {LONGEST_LINE}", str(long_lines), "0"),
        ("`# fmt: skip`", str(skipped), "few"),
        *((f"lines of {area}", f"{lines[area]:,}", "") for area in AREAS),
        ("lines in all", f"{lines.total():,}", ""),
    ]
    faults = [f"modules import each other: {', '.join(circle)}" for circle in around]
    faults += [f"packages import each other: {one} and {two}" for one, two in mutual]
    faults += [f"class {name} is defined in {', '.join(found)}" for name, found in classes.items()]
    faults += [f"nothing calls {name}" for name in unused]
    faults += [
        f"{name} has {n} modules, more than {MOST_MODULES}"
        for name, n in folders.items()
        if n > MOST_MODULES
    ]
    faults += [
        f"{module.name} has {module.lines} lines, more than {MOST_LINES}"
        for module in modules.values()
        if module.lines > MOST_LINES
    ]
    for area in AREAS:
        if levels(graph, area) > MOST_LEVELS:
            faults.append(
                f"{area} has {levels(graph, area)} levels of imports, more than {MOST_LEVELS}"
            )
    if functions > MOST_FUNCTIONS:
        faults.append(f"{functions:.0f} functions per 1,000 lines, more than {MOST_FUNCTIONS}")
    return rows, faults


def main() -> int:
    """Print the table; with `--check`, what is wrong, and exit with 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="fail on circles, large folders, repeated class names"
    )
    parser.add_argument("--root", type=Path, default=PROJECT, help="another checkout to measure")
    options = parser.parse_args()
    rows, faults = measure(options.root)
    if not options.check:
        print("| | measured | wanted |\n|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(options.check and bool(faults))


if __name__ == "__main__":
    sys.exit(main())
