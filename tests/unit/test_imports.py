"""Sources import what pyproject.toml declares and its contracts allow."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.core.paths import PROJECT

PYPROJECT: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def imported_by(tree: ast.AST) -> set[str]:
    """Top-level names of the packages that a source imports, anywhere in it; relative imports left
    out.
    """
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    return {name.split(".")[0] for name in names}


def test_every_imported_package_is_a_declared_dependency() -> None:
    distributions = packages_distributions()
    project = PYPROJECT["project"]
    lines = [
        *project["dependencies"],
        *chain.from_iterable(project["optional-dependencies"].values()),
    ]
    allowed = {canonicalize_name(Requirement(line).name) for line in lines}
    ours = {"harness", "rltrain", "sweeps", "analysis", "tests", "requirements"}
    undeclared = {
        f"{path.relative_to(PROJECT)}: {name}"
        for folder in ours
        for path in (PROJECT / folder).rglob("*.py")
        for name in imported_by(ast.parse(path.read_text())) - sys.stdlib_module_names - ours
        if not allowed
        & {canonicalize_name(distribution) for distribution in distributions.get(name, [])}
    }
    assert not undeclared


def test_install_script_runs_on_the_oldest_python_it_starts_from() -> None:
    tree = ast.parse((PROJECT / "requirements" / "install.py").read_text(), feature_version=(3, 9))
    assert imported_by(tree) <= sys.stdlib_module_names
