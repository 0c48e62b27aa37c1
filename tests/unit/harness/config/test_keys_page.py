"""Check docs/reference/keys.md against base.yaml and the schema, and that tests use every key."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest
import yaml

from harness.config import keys_page as keys
from harness.config import recipe as recipes
from harness.config.recipe_keys import RENAMED, WITHOUT_EFFECT, known_keys
from harness.config.schema import Recipe, Sweep
from harness.core.paths import PROJECT, RECIPES

PAGE = PROJECT / "docs" / "reference" / "keys.md"


def cells(line: str) -> list[str]:
    """A Markdown table's row; an escaped bar is text."""
    return [
        cell.replace("\0", "|").strip() for cell in line.replace("\\|", "\0").strip("|").split("|")
    ]


@cache
def page_rows() -> dict[str, list[str]]:
    """The cells after the first of each row of the page, by the name in the first."""
    rows = [cells(line) for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_page_is_what_the_code_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "harness.config.keys_page"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert PAGE.read_text() == printed.stdout, (
        "make it again: python -m harness.config.keys_page > docs/reference/keys.md"
    )


def test_every_key_has_one_row_and_so_has_every_other_name() -> None:
    assert sorted(page_rows()) == sorted([*known_keys(), *WITHOUT_EFFECT, *RENAMED])


@pytest.mark.parametrize("key", known_keys())
def test_a_row_has_the_schemas_default_and_a_meaning(key: str) -> None:
    default, _, meaning, *_ = page_rows()[key]
    schema = recipes.to_dict(Recipe(sweep=Sweep()))
    for name in key.split("."):
        schema = schema[name]
    assert yaml.safe_load(default.strip("`")) == schema
    assert meaning


@pytest.mark.parametrize(
    ("key", "row"),
    [
        (
            "trainer.algorithm.clip_ratio_c",
            [
                "`3.0`",
                "numbers, > 1",
                "dual_clip: bound on the ratio where the advantage is negative",
                "",
            ],
        ),
        (
            "trainer.max_prompt_length",
            [
                "`null`",
                "whole numbers or null, >= 1",
                "the guide's name for generator.max_input_length",
                "512",
            ],
        ),
        ("sweep.sampler", ["`tpe`", "tpe, random, grid", "tpe | random | grid"]),
    ],
)
def test_a_row_says_what_schema_and_comment_say(key: str, row: list[str]) -> None:
    assert page_rows()[key] == row


def test_a_comment_goes_on_below_and_ends_at_the_next_key() -> None:
    text = """# Not about a key.
seed: 0  # the start.
         # SkyRL: 42
data:    # a group
  train_data: [a, "#"]
  val_data: []
  # below, alone

# Not about a key either.
sweep: null  # sweeps
# sweep:
#   seeds: [0]   # one
#                # after the other
#   space:       # axes
#     trainer.seed: {choices: [1]}
"""
    assert keys.entries(text) == {
        "seed": keys.Entry("0", "the start", "42"),
        "data": keys.Entry("{}", "a group", ""),
        "data.train_data": keys.Entry('[a, "#"]', "", ""),
        "data.val_data": keys.Entry("[]", "below, alone", ""),
        "sweep": keys.Entry("null", "sweeps", ""),
        "sweep.seeds": keys.Entry("[0]", "one after the other", ""),
        "sweep.space": keys.Entry("{}", "axes", ""),
    }


def test_no_comment_of_base_yaml_is_lost() -> None:
    text = (RECIPES / "base.yaml").read_text()
    _, _, after_header = text.partition("\n\n")
    base, _, sweep = after_header.partition("\n# sweep:\n")
    comments = [line.partition("#")[2] for line in base.splitlines()]
    comments += [line[1:].partition("#")[2] for line in sweep.splitlines()]
    entries = keys.entries(text).values()
    found = " ".join(f"{entry.meaning} {entry.skyrl}" for entry in entries)
    assert words(" ".join(comments)) == words(found)


def words(text: str) -> list[str]:
    """The words of a text, sorted; full stops and the mark of SkyRL's part left out."""
    return sorted(word.strip(".") for word in text.replace("SkyRL:", "").split())


# Where a key is set or read. Other tests go through all keys by `known_keys()`; that shows nothing
# of a single one, and does not count: what counts names the key.

TESTS = PROJECT / "tests"
SEARCHED = sorted(
    path
    for path in TESTS.rglob("*.py")
    if not {"benchmarks", "planted"} & {path.stem, *path.relative_to(TESTS).parts}
    and path.name != "test_keys_page.py"
)
HOLE = "\0"


def templates(tree: ast.AST) -> Iterator[str]:
    """The strings and attribute chains of some code; `HOLE` is what is filled in when it runs."""
    nodes = list(ast.walk(tree))
    texts = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def written(node: ast.AST | None, depth: int = 3) -> str:
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and depth:
            return written(texts.get(node.value.id), depth - 1)
        if isinstance(node, ast.JoinedStr):
            return "".join(written(part, depth) for part in node.values)
        return (
            node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else HOLE
        )

    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    docstrings = {
        id(node.value)
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in nodes:
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in parts | docstrings:
            yield written(node)


def used(source: str) -> set[str]:
    """The keys that some code sets or reads.

    It holds the dotted key: alone, before a `=`, or at the end of an attribute chain. Or it makes
    the key from parts, `f"trainer.{role}.optimizer_config.{setting}"`, and holds each part, alone
    or before a `=`. Or it gives a keyword argument whose name no other key ends with and no
    ordinary word is: `max_failures=2`.
    """
    tree = ast.parse(source)
    names = {text.partition("=")[0] for text in templates(tree)}
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    whole = {name for name in names if HOLE not in name}
    ends = {
        name[dot.end() :] for name in whole if " " not in name for dot in re.finditer(r"\.", name)
    }
    made = [re.compile("([^=]+)".join(map(re.escape, name.split(HOLE)))) for name in names - whole]
    last = [key.rsplit(".")[-1] for key in known_keys()]

    def is_used(key: str) -> bool:
        name = key.rsplit(".")[-1]
        if key in whole or ("." in key and key in ends):
            return True
        if "_" in name and last.count(name) == 1 and name in keywords:
            return True
        return any(
            whole.issuperset(parts.groups()) for form in made if (parts := form.fullmatch(key))
        )

    return {key for key in known_keys() if is_used(key)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "load('x', ['trainer.policy.optimizer_config.lr=1'])",
            {"trainer.policy.optimizer_config.lr"},
        ),
        ("assert recipe.trainer.policy.model.lora.rank == 8", {"trainer.policy.model.lora.rank"}),
        (
            "LORA = 'trainer.policy.model.lora'\nf'{LORA}.rank={rank}'",
            {"trainer.policy.model.lora.rank"},
        ),
        (
            "for s in ('lr=1',): f'trainer.critic.optimizer_config.{s}'",
            {"trainer.critic.optimizer_config.lr"},
        ),
        ("sweep(max_failures=2)", {"sweep.max_failures"}),
        ("# trainer.algorithm.tis", set()),
        ("'''trainer.algorithm.tis'''", set()),
        ("assert told == 'trainer.algorithm.tis is unknown'", set()),
        ("for key in known_keys(): f'{key}=1'", set()),
        ("f'trainer.{name}'", set()),
        ("f(lr=1, rank=8, type='filter', path='x')\nx = 'lr', 'rank', 'type', 'path'", set()),
        ("member.lora.rank, optimizer_config.lr, file.path", set()),
    ],
)
def test_the_search_finds_what_names_a_key_and_no_word_alone(
    source: str, expected: set[str]
) -> None:
    assert used(source) == expected


def test_every_key_is_set_or_read_by_a_test() -> None:
    found = {key for path in SEARCHED for key in used(path.read_text())}
    missing = [key for key in known_keys() if key not in found]
    assert not missing
