"""Mutate recipes and command lines at random.

The outcome is a valid recipe or one message, never another error.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import export, prepare, report, reproduce, run, sweep
from harness.config import recipe as recipes
from harness.config.bounds import BOUNDS
from harness.config.digest import recipe_digest
from harness.config.recipe_keys import known_keys
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.core.paths import RECIPES
from rltrain.tools.preflight import check_run
from sweeps.study import plan as plans
from tests.faults.cases import (
    ANSWERED,
    MUTATIONS,
    OTHER_LINES,
    RECIPE_FILES,
    RECIPE_VALUES,
    RUN_LINES,
)

QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ValuePath = tuple[str | int, ...]
Results = list[tuple[str, str, int]]

TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        "",
        " ",
        "null",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-400",
        "0x10",
        "1_000",
        "true",
        "[1",
        "{a: 1",
        "???",
        "${seed}",
        "${",
        "${oc.env:HOME}",
        "${a.b}",
        "../../etc/passwd",
        "/dev/zero",
        "~nobody/x",
        "\x00",
        "\ud800",
        "\u202e",
        "é",
        "x" * 5000,
        "a\nb",
        "'",
        '"',
        "\\",
        "!!python/object:os.system",
        "*a",
        "&a",
        "%",
        "@",
        "eval/pass@0",
        "eval/mean@-1",
        "(",
        ".*(a",
    ]
)
NUMBERS = (
    st.sampled_from(
        [
            0,
            -0.0,
            1,
            -1,
            2**31,
            2**63,
            -(2**63),
            10**40,
            0.5,
            1e-308,
            1e308,
            math.nan,
            math.inf,
            -math.inf,
            True,
            False,
        ]
    )
    | st.integers()
    | st.floats()
)
SCALARS = TEXTS | NUMBERS | st.none() | st.dates() | st.binary(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Return quickstart's values with little data and a sweep that is cheap to plan."""
    return recipes.to_dict(recipes.load("quickstart"))


def value_paths(node: Any, path: ValuePath = ()) -> Iterator[ValuePath]:
    """Yield the paths of all values in nested values."""
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from value_paths(inner, (*path, key))


def parent(values: Any, path: ValuePath) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values


@st.composite
def mutated(draw: st.DrawFn, values: dict[str, Any]) -> dict[str, Any]:
    """Return values with one to three of them replaced, removed, renamed, moved or duplicated."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(value_paths(values), key=str)))
        node, key = parent(values, path), path[-1]
        what = draw(
            st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap", "copy"])
        )
        if what == "replace":
            node[key] = draw(VALUES)
        elif what == "remove":
            del node[key]
        elif what == "wrap":
            node[key] = [node[key]]
        elif what == "copy":
            other = draw(st.sampled_from(sorted(value_paths(values), key=str)))
            node[key] = copy.deepcopy(parent(values, other)[other[-1]])
        elif isinstance(node, dict):
            name = draw(
                TEXTS | st.just(f"{key}s") | st.just(str(key)[1:]) | st.just(str(key).upper())
            )
            node[name] = node.pop(key)
    return values


def assert_sound(recipe: Recipe) -> None:
    """Assert that a recipe is valid.

    Every number is finite and within its bounds, all text can be written, and the recipe reads back
    unchanged.
    """
    check_node(recipe)
    again = recipes.from_dict(yaml.safe_load(recipes.to_yaml(recipe)))
    assert recipes.to_dict(again) == recipes.to_dict(recipe)
    assert recipe_digest(again) == recipe_digest(recipe)


def check_node(node: Any) -> None:
    if dataclasses.is_dataclass(node):
        for item in dataclasses.fields(node):
            value = getattr(node, item.name)
            for name, limit in item.metadata.items():
                if name == "one_of":
                    allowed = [(type(other), other) for other in limit]
                    count = int in limit and type(value) is int and value >= 1
                    assert count or (type(value), value) in allowed, item.name
                else:
                    assert value is None or BOUNDS[name][0](value, limit), item.name
            check_node(value)
    elif isinstance(node, dict | list):
        for value in [*node, *node.values()] if isinstance(node, dict) else node:
            check_node(value)
    elif isinstance(node, float):
        assert math.isfinite(node)
    elif isinstance(node, str):
        node.encode()
        assert "\0" not in node


@contextlib.contextmanager
def only_user_errors() -> Iterator[None]:
    """Accept a UserError if it can be printed and has a `what`."""
    try:
        yield
    except UserError as error:
        check_message(error)


def check_message(error: UserError) -> None:
    assert error.what
    assert "\x1b" not in str(error)
    str(error).encode()


@pytest.mark.slow
@settings(QUICK, max_examples=MUTATIONS[RECIPE_VALUES])
@given(data=st.data())
def test_mutated_values(plain: dict[str, Any], results: Results, data: st.DataObject) -> None:
    values = data.draw(mutated(plain))
    with only_user_errors():
        recipe = recipes.from_dict(values)
        assert_sound(recipe)
        if recipe.sweep is not None and recipe.sweep.space:
            plan = plans.build(recipe)
            assert plan.num_runs >= 1
            for params in plans.preview(plan, 2):
                assert_sound(recipes.with_values(recipe, {"sweep": None, **params}))
        check_run(recipe)
    results.append((RECIPE_VALUES, ANSWERED, 0))


@pytest.mark.slow
@settings(QUICK, max_examples=MUTATIONS[RECIPE_FILES])
@given(data=st.data())
def test_mutated_files(
    tmp_path_factory: pytest.TempPathFactory, results: Results, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["cut", "line", "swap", "insert"]))
    text = data.draw(
        st.sampled_from(["quickstart.yaml", "gsm8k_ppo_lora.yaml"]).map(
            lambda n: (RECIPES / n).read_text()
        )
    )
    lines = text.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 1))
    if kind == "cut":
        text = text[: data.draw(st.integers(0, len(text)))]
    elif kind == "line":
        text = "".join([*lines[:at], *lines[at : at + 1] * 2, *lines[at + 1 :]])
    elif kind == "swap":
        text = "".join([*lines[:at], *reversed(lines[at : at + 3]), *lines[at + 3 :]])
    else:
        position = data.draw(st.integers(0, len(text)))
        text = text[:position] + data.draw(TEXTS) + text[position:]
    file = tmp_path_factory.mktemp("mutated") / "mutated.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with only_user_errors():
        assert_sound(recipes.load(file))
    results.append((RECIPE_FILES, ANSWERED, 0))


KEYS = st.sampled_from(known_keys())
SPACED = KEYS.flatmap(
    lambda key: st.sampled_from(
        [f"sweep.space.{key}", f"sweep.space.{key}.choices", f"sweep.space.{key}.low"]
    )
)
WRITTEN = st.sampled_from(
    [
        "1",
        "0",
        "-1",
        "0.5",
        "1e-5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "true",
        "null",
        "many",
        "'a b'",
        '"x',
        "[1,2",
        "[1,2]",
        "[]",
        "{}",
        "{a:1}",
        "{choices:[1,2]}",
        "{low:1,high:2}",
        "{low:1e-9,high:1e9,log:true}",
        "1,2",
        "choice(1,2)",
        "range(1,3)",
        "glob(*)",
        "float(nan)",
        "int(3)",
        "json_str('{}')",
        "[nan]",
        "${seed}",
        "${oc.env:HOME}",
        "../../x",
        "",
        "=",
        "a=b",
        "é",
        "99999999999999999999",
        "[[[]]]",
        "a:b",
        "~",
        "*",
        "\udcff",
        "\n",
        "\\",
    ]
)
OVERRIDES = st.builds(
    lambda mark, key, equals, value: f"{mark}{key}{equals}{value}",
    st.sampled_from([""] * 12 + ["+", "++", "~", "@", " "]),
    KEYS | KEYS | SPACED | KEYS.map(lambda key: key[:-1]),
    st.sampled_from(["="] * 12 + ["", " = ", "=="]),
    WRITTEN | st.text(max_size=6, alphabet=st.characters(exclude_characters="\0")),
)
FLAGS = st.sampled_from(
    [
        "--resume",
        "--resume=",
        "--from",
        "--check",
        "--output",
        "--",
        "-x",
        "--dry-run=1",
        "--help-me",
        "-",
    ]
)
WORDS = OVERRIDES | OVERRIDES | OVERRIDES | FLAGS | WRITTEN


@settings(QUICK, max_examples=MUTATIONS[RUN_LINES])
@given(
    command=st.sampled_from([run, sweep]),
    words=st.lists(WORDS, min_size=1, max_size=3),
    data=st.data(),
)
def test_mutated_command_lines(
    command: Any, words: list[str], results: Results, data: st.DataObject
) -> None:
    argv = data.draw(
        st.permutations(
            [data.draw(st.sampled_from(["quickstart"] * 9 + ["nope"])), "--dry-run", *words]
        )
    )
    with only_user_errors(), contextlib.redirect_stdout(io.StringIO()):
        assert command.main(list(argv)) == 0
    results.append((RUN_LINES, ANSWERED, 0))


@settings(QUICK, max_examples=MUTATIONS[OTHER_LINES])
@given(
    command=st.sampled_from([report, export, reproduce, prepare]),
    words=st.lists(
        WRITTEN
        | FLAGS
        | st.sampled_from(
            ["--which", "--merged", "--output-dir", "--source", "--steps", "--tolerance", "gsm8k"]
        ),
        max_size=4,
    ),
)
def test_mutated_arguments_of_the_other_commands(
    command: Any, words: list[str], tmp_path_factory: pytest.TempPathFactory, results: Results
) -> None:
    folder = tmp_path_factory.mktemp("words")
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        pytest.raises(UserError),
    ):
        command.main(words)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    results.append((OTHER_LINES, ANSWERED, 0))


@settings(QUICK, max_examples=80)
@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$"), max_size=12)
        | st.lists(
            st.sampled_from(["'", '"', "\\", " ", ",", "[", "}", "(", "\n", ":", "#", "="]),
            max_size=6,
        ).map("".join),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    )
)
def test_an_override_of_any_value_reads_back(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    written = recipes.override_for("trainer.target_modules", value)
    assert OverridesParser.create().parse_override(written).value() == value
