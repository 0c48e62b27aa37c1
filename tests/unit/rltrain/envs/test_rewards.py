"""Rewards and prompts of a user's module: what is not a number, or is not returned at all, is one
message.
"""

from __future__ import annotations

import errno
import gc
import json
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from rltrain.data.files import Example
from rltrain.distributed.process import exits_are_failures
from rltrain.envs import Env, get_env
from rltrain.envs.problems import LARGEST_REWARD, check_truth, messages, reward_of
from rltrain.tools.preflight import check_run
from tests.recipes import quickstart

EXAMPLE = Example(
    [{"role": "user", "content": "6 * 7?"}], "", "42", 3, "6 * 7?", "sums.jsonl, row 4"
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Rewards and prompts of a user's module: every invalid result is one clear error."""
    package = f"rewards{abs(hash(request.node.name))}"
    (tmp_path / package).mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str) -> str:
        (tmp_path / package / "env.py").write_text(text)
        return f"{package}.env"

    return make


def reward(body: str, *, before: str = "def") -> str:
    return (
        f"import asyncio, errno, numpy, sys, torch\n{before} reward(completion, "
        f"ground_truth):\n    {body}\n"
    )


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("pass", "returned None (NoneType)"),
        ("return '1.0'", "returned '1.0' (str)"),
        ("return [1.0]", "returned [1.0] (list)"),
        ("return numpy.ones(1)", "returned array([1.]) (ndarray)"),
        ("return 1j", "returned 1j (complex)"),
        ("return float('nan')", "returned nan (float)"),
        ("return -float('inf')", "returned -inf (float)"),
        ("return 3e38", "returned 3e+38 (float)"),
        ("return 10 ** 400", "(int)"),
        ("raise ValueError(completion)", "raised ValueError: it is 41"),
        (
            "raise PermissionError(errno.EACCES, 'denied', '/judge')",
            "raised PermissionError: [Errno 13] denied: '/judge'",
        ),
        ("raise BrokenPipeError(errno.EPIPE, 'gone')", "raised BrokenPipeError"),
        ("sys.exit(0)", "raised SystemExit: 0"),
        ("raise asyncio.CancelledError", "raised CancelledError"),
        ("return reward(completion)", "raised TypeError"),
    ],
)
def test_what_is_no_number_is_one_message(module: Any, body: str, told: str) -> None:
    name = module(reward(body))
    with pytest.raises(UserError) as raised:
        reward_of(get_env(name), EXAMPLE, "it is 41")
    text = str(raised.value)
    assert f"the reward of {name} " in text
    assert told in text
    assert "completion 'it is 41' for problem 3 (sums.jsonl, row 4), ground truth '42'" in text
    assert ("env.py, line 3" in text) == ("raised" in told)


def test_a_coroutine_is_named_and_closed(module: Any, recwarn: pytest.WarningsRecorder) -> None:
    env = get_env(module(reward("return 1.0", before="async def")))
    with pytest.raises(UserError, match="without async"):
        reward_of(env, EXAMPLE, "")
    gc.collect()
    assert not recwarn.list  # a coroutine that nobody awaits warns when it is freed


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("return True", 1.0),
        ("return 0", 0.0),
        ("return -0.5", -0.5),
        ("return numpy.float32(0.5)", 0.5),
        ("return numpy.bool_(True)", 1.0),
        ("return torch.tensor(0.25)", 0.25),
        (f"return {LARGEST_REWARD}", LARGEST_REWARD),
    ],
)
def test_numbers_of_any_kind_are_rewards(module: Any, body: str, value: float) -> None:
    given = reward_of(get_env(module(reward(body))), EXAMPLE, "it is 41")
    assert given == value
    assert type(given) is float


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_the_rewards_doing(module: Any, number: int) -> None:
    with pytest.raises(OSError, match="full") as raised:
        reward_of(get_env(module(reward(f"raise OSError({number}, 'full')"))), EXAMPLE, "")
    assert raised.value.errno == number


def test_an_interrupt_and_rays_exit_are_not_the_rewards_doing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        reward_of(get_env(module(reward("raise KeyboardInterrupt"))), EXAMPLE, "")
    # As Ray's SIGTERM handler does, which runs wherever the main thread is.
    handler: dict[str, Any] = {"__name__": "ray._private.worker"}
    exec("import sys\ndef sigterm_handler(*_): sys.exit(15)", handler)

    class Interrupted:
        def reward(self, completion: str, ground_truth: str) -> float:
            handler["sigterm_handler"]()
            return 1.0

    with pytest.raises(SystemExit):
        reward_of(Interrupted(), EXAMPLE, "")
    with pytest.raises(SystemExit), exits_are_failures():
        handler["sigterm_handler"]()


def test_without_a_prompt_function_a_question_is_one_message(module: Any) -> None:
    asked = Example([], "", "42", 0, "6 * 7?")
    assert messages(get_env(module(reward("return 1.0"))), asked) == [
        {"role": "user", "content": "6 * 7?"}
    ]
    assert messages(get_env("gsm8k"), asked)[0]["content"].startswith("6 * 7? Let's think")
    assert messages(get_env("gsm8k"), EXAMPLE) == EXAMPLE.prompt


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return question", "returned no chat\n  got:     '6 * 7?'"),
        ("return question[99]", "raised IndexError"),
    ],
)
def test_a_prompt_function_that_makes_no_chat_is_named(module: Any, body: str, told: str) -> None:
    name = module(f"{reward('return 1.0')}\ndef prompt(question):\n    {body}\n")
    with pytest.raises(UserError) as raised:
        messages(get_env(name), Example([], "", "42", 0, "6 * 7?"))
    assert f"the prompt function of {name} {told}" in str(raised.value)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_of(name: str, rows: list[dict[str, Any]], folder: Path, *overrides: str) -> Any:
    data = write(folder / "data.jsonl", rows)
    sizes = ["trainer.train_batch_size=2", "trainer.policy_mini_batch_size=2"]
    return quickstart(
        [
            f"data.train_data=[{data}]",
            f"data.val_data=[{data}]",
            f"environment.env_class={name}",
            *sizes,
            *overrides,
        ]
    )


def test_each_environment_is_asked_once_before_the_model_loads(
    module: Any, tmp_path: Path, tiny_model_dir: Path
) -> None:
    calls = tmp_path / "calls.txt"
    name = module(f"""
def reward(completion, ground_truth):
    with open({str(calls)!r}, 'a') as file:
        print(completion, ground_truth, file=file)
    return 1.0
""")
    row = {"prompt": EXAMPLE.prompt, "reward_spec": {"ground_truth": "42"}}
    check_run(recipe_of(name, [row, {**row, "env_class": "gsm8k"}, row], tmp_path))
    assert calls.read_text() == "42 42\n"


def test_a_reward_that_fails_is_refused_before_the_model_loads(
    module: Any, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = module(reward("sys.exit()"))
    recipe = recipe_of(name, [{"question": "6 * 7?", "answer": 42}] * 2, tmp_path)
    with pytest.raises(UserError, match=r"completion '42' for problem 0 \(.*data\.jsonl, row 1\)"):
        check_run(recipe)
    assert "prompts from the column question, ground truths from answer" in capsys.readouterr().out


def test_a_can_score_function_that_raises_is_named(module: Any) -> None:
    name = module(f"{reward('return 1.0')}\ndef can_score(truth):\n    return truth[99]\n")
    with pytest.raises(UserError, match=f"the can_score function of {name} raised IndexError"):
        check_truth(get_env(name), EXAMPLE)


@pytest.mark.parametrize(
    ("name", "truth"),
    [("gsm8k", "Paris"), ("gsm8k", "#### Paris"), ("tiny_gsm", "18/2"), ("math", "$$.")],
)
def test_a_truth_that_nothing_can_score_against_is_refused(
    name: str, truth: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    good = {"question": "q", "answer": "42"}
    recipe = recipe_of(name, [good, {"question": "Capital of France?", "answer": truth}], tmp_path)
    with pytest.raises(UserError, match="no completion can score") as raised:
        check_run(recipe)
    assert "data.jsonl, row 2" in str(raised.value)


def scored(name: str, completion: str, truth: str) -> float:
    env: Env = get_env(name)
    return env.reward(completion, truth)


def test_a_worked_solution_is_a_ground_truth_of_the_built_in_environments() -> None:
    assert (
        scored("gsm8k", "#### 72", "In April 48/2 = <<48/2=24>>24, and 24+48 = 72.\n#### 72") == 1.0
    )
    assert (
        scored("gsm8k", "#### 48", "In April 48/2 = <<48/2=24>>24, and 24+48 = 72.\n#### 72") == 0.0
    )
    assert scored("math", "\\boxed{7}", "So $x = 3$ and the sum is $\\boxed{7}$.") == 1.0
    assert scored("math", "\\boxed{3}", "So $x = 3$ and the sum is $\\boxed{7}$.") == 0.0
