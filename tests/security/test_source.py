"""Search the source for code that unpickles, evaluates or unpacks untrusted data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.paths import PROJECT

SOURCES = sorted(
    file
    for name in ("harness", "rltrain", "sweeps", "analysis")
    for file in (PROJECT / name).rglob("*.py")
)
# Modules that exist to run or unpickle their input.
MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "code",
    "runpy",
    "jsonpickle",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "os.execv",
    "subprocess.getoutput",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.Loader",
    "yaml.UnsafeLoader",
    "pd.read_pickle",
    "pandas.read_pickle",
    "tempfile.mktemp",
    "shutil.unpack_archive",
    "hydra.utils.instantiate",
    "torch.hub.load",
    "sympify",
    "sympy.sympify",
    "parse_expr",
}
# Functions among these that are as harmless as `yaml.safe_load`.
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
METHODS = {"extractall", "extract", "to_pickle", "read_pickle"}
# Keywords that are unsafe unless they are False.
KEYWORDS = ("shell", "allow_pickle", "trust_remote_code")


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of code that no source file may contain."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            yield from (
                (node.lineno, f"import {name}") for name in names if name.split(".")[0] in MODULES
            )
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {
            keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg
        }
        safe = called == "yaml.load" and options.get("Loader") in SAFE_LOADERS
        if (called in CALLS and not safe) or (
            isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
        ):
            yield node.lineno, called
        yield from (
            (node.lineno, f"{name}=") for name in KEYWORDS if options.get(name, "False") != "False"
        )
        if called == "torch.load" and options.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if (
            called.startswith("Auto")
            and called.endswith(".from_pretrained")
            and not _refuses_code(node)
        ):
            yield node.lineno, "from_pretrained without NO_CODE"


def _refuses_code(call: ast.Call) -> bool:
    return any(
        keyword.arg is None and ast.unparse(keyword.value) == "NO_CODE" for keyword in call.keywords
    )


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PROJECT)))
@pytest.mark.claim("Nothing is unpickled")
def test_no_source_runs_or_unpickles_untrusted_data(file: Path) -> None:
    assert list(faults(ast.parse(file.read_text()))) == []


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "joblib = __import__('joblib')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "archive.extractall(folder)",
        "pd.read_pickle(path)",
        "AutoModelForCausalLM.from_pretrained(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_finds_unsafe_code(snippet: str) -> None:
    assert list(faults(ast.parse(snippet)))


@pytest.mark.claim("A model's own code is not run")
def test_code_is_refused_where_models_are_loaded() -> None:
    from rltrain.models.loading import NO_CODE

    assert NO_CODE == {"trust_remote_code": False}
