"""Score hostile completions.

No completion has a side effect or runs without end.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rltrain.envs import Env, env_names, get_env, math

pytestmark = pytest.mark.timeout(240)

# {canary} is a file that must not be created.
CODE = [
    "__import__('os').system('touch {canary}')",
    "open('{canary}','w').write('1')",
    "exec(\"open('{canary}','w')\")",
    (
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='Popen'][0]('touch "
        "{canary}',shell=1)"
    ),
    "Function(__import__('os').system('touch {canary}'))",
    'S(\'__import__("os").system("touch {canary}")\')',
    'f\'{{open("{canary}", "w")}}\'',
    "2; import os; os.system('touch {canary}')",
    "$(touch {canary})",
    "`touch {canary}`",
    "!touch {canary}",
    "{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
    "\\text{{__import__('os').system('touch {canary}')}}",
    "\\operatorname{{__import__('os').system('touch {canary}')}}(1)",
    "\\mathrm{{exec}}(\"open('{canary}','w')\")",
    "\\immediate\\write18{{touch {canary}}}",
    "\\input{{|touch {canary}}}",
    "\\openout1={canary}",
    "!!python/object/apply:os.system ['touch {canary}']",
    "\\directlua{{os.execute('touch {canary}')}}",
]
# Answers that keep a computer algebra system busy for ever, or need much memory.
ENDLESS = [
    "9^{9^{9^{9^{9}}}}",
    "10^{10^{10}}",
    "(10^{10})!",
    "9!!!!!!!!",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\prod_{i=1}^{10^9} i",
    "\\sum_{n=1}^{\\infty}\\frac{1}{n^{\\pi}}",
    "9**9**9**9",
    "3^{-10^{10^{10}}}",
    "\\int_0^1 x^{x^{x^{x}}}dx" * 5,
    "\\lim_{x\\to 0}\\frac{\\sin(x^{100})}{x^{100}}",
]
LONG = [
    "(" * 50_000 + ")" * 50_000,
    "{" * 100_000,
    "\\sqrt{" * 2_000 + "2" + "}" * 2_000,
    "\\frac{1}{" * 60 + "2" + "}" * 60,
    "9" * 200_000,
    "1," * 100_000,
    "-" * 200_000,
    "\\text{" * 50_000,
    "a " * 100_000,
    "a, b-" * 50_000,
    "$" * 200_000,
    "\\boxed{" * 50_000,
    "#### " * 50_000,
    "=" * 200_000,
    "[0,1]\\cup" * 50 + "[0,1]",
    " " * 300_000,
    "1/" * 100_000,
]
ODD = [
    "",
    "\x00",
    "\ud800",
    "\u202e12",
    "١٢",
    "∞",
    "nan",
    "inf",
    "-0",
    "1e999999999",
    "0x10",
    "1_000",
    "\\",
    "}",
    "{",
    "\n\n",
]
ENVS = env_names()
# A right and a wrong answer and their truth, where it is not a number.
KNOWN = {
    "instructions": (
        "snow is cold.",
        "Snow is cold.",
        (
            '{"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}], '
            '"form": "sentence", "topic": ["snow"], "prompt": ""}'
        ),
    )
}


def formatted(answer: str) -> Iterator[str]:
    """Yield an answer in the format of each environment, and bare."""
    yield from (f"#### {answer}", f"So it is $\\boxed{{{answer}}}$.", answer)


@pytest.fixture(autouse=True)
def _short_time_limit() -> Iterator[None]:
    """Set the time limit of a comparison to half a CPU second; the default is five."""
    verifier, math._VERIFIER = math._VERIFIER, math.Verifier(0.5)
    yield
    math._VERIFIER.close()
    math._VERIFIER = verifier


def scores(env: Env, answers: list[str], truths: tuple[str, ...]) -> list[float]:
    pairs = [(text, truth) for answer in answers for text in formatted(answer) for truth in truths]
    return [env.reward(text, truth) for text, truth in pairs]


@pytest.mark.parametrize("name", ENVS)
@pytest.mark.claim("Rewards score text and run none of it")
def test_code_in_a_completion_or_a_truth_is_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    answers = [text.format(canary=canary) for text in CODE]
    truths = ("2", "\\frac{1}{2}", *KNOWN.get(name, ())[2:])
    rewards = scores(get_env(name), answers, truths)
    assert set(rewards) <= {0.0, 1.0}
    rewards += [get_env(name).reward(text, truth) for truth in answers for text in formatted("2")]
    assert sorted(os.listdir(tmp_path)) == []
    assert len(rewards) > 100


def test_the_canary_works(tmp_path: Path) -> None:
    eval(CODE[0].format(canary=tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ENVS)
@pytest.mark.claim("No completion takes forever to score")
def test_no_completion_runs_without_end(name: str) -> None:
    env = get_env(name)
    assert set(scores(env, ENDLESS, ("2",))) == {0.0}
    assert set(scores(env, LONG, ("2", "yes"))) <= {0.0, 1.0}
    for answer, truth in itertools.product(ODD, ODD):
        assert env.reward(answer, truth) in (0.0, 1.0)
    # It can still tell right from wrong.
    right, wrong, truth = KNOWN.get(name, ("2", "3", "2"))
    assert set(scores(env, LONG, (truth,))) <= {0.0, 1.0}
    assert max(env.reward(text, truth) for text in formatted(right)) == 1.0
    assert max(env.reward(text, truth) for text in formatted(wrong)) == 0.0


@pytest.mark.claim("No completion takes forever to score")
def test_a_comparison_has_limits_of_memory_and_time() -> None:
    verifier = math.Verifier(0.5)
    assert verifier.equal("2", "\\frac{4}{2}")
    first = verifier._process
    assert first is not None
    assert not verifier.equal("2", "9^{9^{9^{9^{9}}}}")
    # The kernel ended the process: the next comparison has a new one.
    assert first.wait(timeout=60) != 0
    assert verifier.equal("2", "\\frac{4}{2}")
    verifier.close()
