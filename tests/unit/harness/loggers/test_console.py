"""What a run shows on the console."""

from __future__ import annotations

import pytest

from harness.loggers.console import Console
from tests.integration.logged import sample

ESCAPE = "\x1b"


def test_console_shows_progress_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.log({"step": 0, "eval/accuracy": 0.25, "eval/num_problems": 12}, [], 10)
    console.log({"step": 4, "reward": 0.5, "step_time": 2.0}, [], 10)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step  0/10  held-out 0.250  of 12 problems"
    assert "ETA 12 s" in second


def test_console_shows_a_completion_and_one_rewarded_otherwise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = [
        sample(completion="first\n\n#### 18"),
        sample(completion="as good"),
        sample(completion="so\nlong\n" * 40 + "#### 5", reward=0, finish_reason="length"),
    ]
    Console().log({"step": 16}, samples, 20)
    assert capsys.readouterr().out.splitlines() == [
        "  sample at step 16: reward 1, wanted 18, 5 tokens, stopped",
        "    question    How many?",
        "    completion  first",
        "                #### 18",
        "  sample at step 16: reward 0, wanted 18, 5 tokens, cut at the limit",
        "    question    How many?",
        "    completion  so",
        "                long",
        "                so",
        "                …",
        "                #### 5",
        "step 16/20",
    ]


@pytest.mark.claim("A terminal shows control characters as escapes")
def test_console_shows_control_characters_as_escapes_and_long_lines_in_parts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = f"{ESCAPE}[31mred\rover\x07 \u202eback\u2028 ten\xa0dollars {'word ' * 200}"
    Console().log({"step": 4}, [sample(completion=hostile, question="")], 8)
    out = capsys.readouterr().out
    assert r"\x1b[31mred\rover\x07 \u202eback\u2028 ten dollars" in out
    assert not set(out) & set(f"{ESCAPE}\r\x07\u202e\u2028")
    assert "(empty)" in out
    assert max(map(len, out.splitlines())) <= 120
    assert len(out.splitlines()) == 8
