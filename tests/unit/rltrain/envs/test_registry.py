"""Environments are found by name or by the dotted path of a user's module."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.errors import UserError
from rltrain.data.files import Example
from rltrain.envs import env_names, get_env
from rltrain.envs.problems import messages

COMPLETE = """
def reward(completion, ground_truth): return float(completion == ground_truth)
"""


def test_built_in_environments_register_themselves() -> None:
    assert env_names() == ("gsm8k", "instructions", "math", "tiny_gsm")


@pytest.mark.parametrize("name", env_names())
@given(question=st.text(), completion=st.text(), ground_truth=st.text())
def test_every_environment_keeps_the_contract(
    name: str, question: str, completion: str, ground_truth: str
) -> None:
    env = get_env(name)
    chat = messages(env, Example([], name, "1", 0, question))
    assert question in chat[-1]["content"]
    assert all(set(message) == {"role", "content"} for message in chat)
    assert 0.0 <= env.reward(completion, ground_truth) <= 1.0


def test_a_typo_gets_the_known_names_and_a_suggestion() -> None:
    with pytest.raises(UserError, match="unknown environment") as raised:
        get_env("gms8k")
    assert "gsm8k, instructions, math, tiny_gsm" in str(raised.value)
    assert "did you mean gsm8k?" in str(raised.value)


def test_a_users_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "my_env.py").write_text(COMPLETE)
    (package / "partial.py").write_text("def prompt(question): return []\n")
    (package / "broken.py").write_text("import a_package_that_is_not_there\n")
    (package / "script.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert get_env("my_package.my_env").reward("yes", "yes") == 1.0
    with pytest.raises(UserError, match="has no reward"):
        get_env("my_package.partial")
    with pytest.raises(UserError, match="a_package_that_is_not_there"):
        get_env("my_package.broken")
    with pytest.raises(UserError, match="SystemExit: 0"):
        get_env("my_package.script")
    with pytest.raises(UserError, match="cannot import"):
        get_env("my_package.absent")
