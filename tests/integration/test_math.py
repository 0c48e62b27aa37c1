"""Test the math reward on answers of many forms, and the data files of the math environment."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.core.errors import UserError
from harness.core.paths import PROJECT
from rltrain.data.files import load_examples, read_rows, write_rows
from rltrain.envs import math


def box(answer: str) -> str:
    return f"Thus it is \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        # numbers
        ("18", "18"),
        ("18.", "18"),
        ("0.5", r"\frac{1}{2}"),
        (r"\frac12", r"\dfrac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        (r"\frac{-1}{2}", r"-\frac{1}{2}"),
        ("−1", "-1"),
        ("1080", "1,080"),
        (r"10,\!000", "10000"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\pi/2", r"\dfrac{\pi}{2}"),
        (r"+\infty", r"\infty"),
        ("6 - 5i", "-5i + 6"),
        ("720", "6!"),
        ("10", r"\binom{5}{2}"),
        ("3", r"\log_2 8"),
        ("52_{8}", "52_8"),
        # units, money, percent
        ("5", r"5 \text{ cm}"),
        (r"5\text{ cm}", "5"),
        ("90", r"90^\circ"),
        (r"\$32,\!348", r"\$32,348"),
        ("50", r"50\%"),
        (r"50\%", "50"),
        (r"50\%", "0.5"),
        ("12.5%", r"\frac18"),
        # expressions and equations
        ("(x+1)^2", "x^2 + 2x + 1"),
        ("-q + p", "p - q"),
        ("5", "x=5"),
        ("x = 5", "5"),
        ("2x + 1", "y = 2x + 1"),
        # intervals, sets, points, matrices
        ("[0, 1)", "[0,1)"),
        (r"\left[0, 1\right)", "[0,1)"),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
        (r"1 \le x \le 2", "[1,2]"),
        (r"x \in [1,2]", "[1,2]"),
        (r"\{3, 1, 2\}", r"\{1,2,3\}"),
        ("-2,1", "1,-2"),
        (r"\pm 1", "1, -1"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\tfrac\pi2)"),
        (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        # words
        ("Yes", "Yes"),
        (r"\text{yes}", "Yes"),
        ("no", "No"),
        (r"\textbf{True}", "true"),
        ("Evelyn", r"\text{Evelyn}"),
        ("does not exist", r"\text{Does not exist}"),
        ("A", r"\text{(A)}"),
        (r"\text{June 20}", r"\text{June } 20"),
        # What math-verify cannot read must look the same.
        (r"\mathbb{Z}/2\mathbb{Z}", r"$\mathbb{Z} / 2\mathbb{Z}$"),
    ],
)
def test_right_answers_score(answer: str, truth: str) -> None:
    assert math.reward(box(answer), truth) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("19", "18"),
        ("-18", "18"),
        ("", "18"),
        ("0.33", r"\frac13"),
        ("3.14", r"\pi"),
        (r"-\infty", r"\infty"),
        ("5", r"50\%"),
        (r"5\%", "0.5"),
        ("[0,1]", "[0,1)"),
        ("(0,1)", "[0,1)"),
        ("(3,2)", "(2,3)"),
        (r"\{1,2\}", r"\{1,2,3\}"),
        ("1,2,3,4", "1,2,3"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        ("x=6", "5"),
        ("p + q", "p - q"),
        ("No", "Yes"),
        ("1", "Yes"),
        ("sey", "Yes"),  # "sey" equals "Yes" as a product of letters
        ("Yes", "1"),
        (r"\text{Briana}", r"\text{Evelyn}"),
        ("B", r"\text{(A)}"),
        ("1+", "1"),
        (r"\frac{1}{", "1"),
        (r"\mathbb{Z}_3", r"\mathbb{Z}/2\mathbb{Z}"),
        ("", ""),
        (" ", "$$"),
    ],
)
def test_wrong_answers_do_not_score(answer: str, truth: str) -> None:
    assert math.reward(box(answer), truth) == 0.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("no box, 18", None),
        ("", None),
        ("\\boxed{}", None),
        ("\\boxed", None),
        ("\\boxed{18", None),
        ("\\boxedness{18}", None),
        ("\\boxed{5}, no: \\boxed{18}", "18"),
        ("\\boxed{5}, no: \\boxed{", None),
        ("\\boxed{5}, no: \\boxed{}", None),
        ("\\boxed{\\frac{1}{2}} then {more} }", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("$\\boxed 5$.", "5"),
        ("\\fbox{7}", "7"),
        ("\\boxed {7}", "7"),
        ("$$\\boxed{\n  $a$ +\n  b.\n}$$", "a + b"),
        ("\\boxed{\\$5}", "5"),
    ],
)
def test_the_last_box_is_the_answer(completion: str, answer: str | None) -> None:
    assert math.final_answer(completion) == answer


BOMBS = ["9^{9^{9^9}}", "1000000000!", r"\int_0^1 e^{x^2}\sin(x^3)\,dx"]


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_endless_comparison_does_not_score(monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    verifier = math.Verifier(cpu_seconds=0.7)
    monkeypatch.setattr(math, "_VERIFIER", verifier)
    assert verifier.equal("0.125", r"\frac{6}{48}")
    process = verifier._process
    assert process is not None
    assert math.reward(box(bomb), "5") == 0.0
    assert process.returncode == -signal.SIGPROF  # the timer ended it, not an exception of sympy
    assert verifier.equal("0.125", r"\frac{6}{48}")
    verifier.close()


@pytest.mark.parametrize(
    "answer",
    ["(" * 20 + "1" + ")" * 20, r"\frac{1}{" * 20 + "1" + "}" * 20, "9" * 499, "1," * 249 + "1"],
)
def test_deep_or_long_answers_are_compared(answer: str) -> None:
    assert math.reward(box(answer), "5") == 0.0


def test_very_long_answers_are_compared_only_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "_VERIFIER", None)  # must not be called
    long = "x+" * 50_000 + "x"
    assert math.reward(box(long), long) == 1.0
    assert math.reward(box(long), "50001x") == 0.0
    assert math.reward(box("50001x"), long) == 0.0
    assert math.reward("\\boxed{" * 50_000 + "1" + "}" * 50_000, "1") == 1.0
    assert math.reward("\\text{" * 50_000 + box("\\text{" * 10_000), "1") == 0.0


@given(st.text(), st.text())
def test_garbage_never_crashes(completion: str, truth: str) -> None:
    assert math.reward(completion, truth) in (0.0, 1.0)


@settings(deadline=None, max_examples=60)
@given(
    st.text(alphabet="\\{}$^_%&(),.[]+-=/!|<>0123xyeinf \n\ud800é"),
    st.sampled_from(["1", "x^2", "[0,1)"]),
)
def test_garbage_in_the_box_never_crashes(answer: str, truth: str) -> None:
    assert math.reward(box(answer), truth) in (0.0, 1.0)


@settings(deadline=None, max_examples=30)
@given(st.integers(-999, 999), st.integers(2, 99), st.text(alphabet="ab 019$\n"))
def test_any_fraction_scores_after_any_reasoning(
    numerator: int, denominator: int, reasoning: str
) -> None:
    truth = rf"\frac{{{numerator}}}{{{denominator}}}"
    assert (
        math.reward(rf"{reasoning}\boxed{{{3 * numerator}/{3 * denominator}}}{reasoning}", truth)
        == 1.0
    )
    assert (
        math.reward(
            rf"{reasoning}\boxed{{{3 * numerator + 1}/{3 * denominator}}}{reasoning}", truth
        )
        == 0.0
    )


def test_rewards_are_the_same_in_other_threads(capfd: pytest.CaptureFixture[str]) -> None:
    cases = [
        (f"{i}/8", rf"\frac{{{i}}}{{8}}" if i % 2 else rf"\frac{{{i + 1}}}{{8}}") for i in range(20)
    ]
    rewards: dict[int, list[float]] = {}

    def work(name: int) -> None:
        rewards[name] = [
            math.reward(box(f"{answer} + {name} - {name}"), truth) for answer, truth in cases
        ]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == dict.fromkeys(range(4), [0.0, 1.0] * 10)
    assert capfd.readouterr() == ("", "")  # neither math-verify nor its parser prints anything


def test_a_forked_child_starts_a_new_comparison_process() -> None:
    assert math.reward(box("0.25 + 0.5"), r"\frac{3}{4}") == 1.0
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        theirs = [
            pool.apply_async(math.reward, (box(f"{i}/7"), rf"\frac{{{i}}}{{7}}")) for i in range(8)
        ]
        fractions = [math.reward(box(f"{i}/7"), rf"\frac{{{i + 1}}}{{7}}") for i in range(8)]
        assert [one.get(60) for one in theirs] == [1.0] * 8
    assert fractions == [0.0] * 8


def test_an_interrupted_comparison_does_not_affect_the_next() -> None:
    verifier = math.Verifier()
    assert verifier.equal("0.5", "1/2")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            verifier.equal("5", BOMBS[0])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert verifier._process is None
    assert verifier.equal("0.5", "2/4")
    verifier.close()


def test_a_process_that_cannot_start_is_an_error_not_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(math, "_VERIFIER", math.Verifier())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="status 1 while it started"):
        math.reward(box("355/113"), r"\frac{355}{114}")


def test_the_comparison_process_ends_when_its_parent_is_killed() -> None:
    program = (
        "from rltrain.envs import math\n"
        "assert math.reward(r'\\boxed{0.5}', r'\\frac12') == 1.0\n"
        "print(math._VERIFIER._process.pid, flush=True)\n"
        "input()\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    child = int(run.stdout.readline())
    os.kill(child, 0)
    run.kill()
    run.communicate()
    for _ in range(200):
        if not _alive(child):
            break
        time.sleep(0.05)
    else:
        pytest.fail("math-verify's process outlived the program")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_prompt_is_the_question_a_space_and_the_instruction() -> None:
    assert math.prompt("What is $1+1$?") == [
        {
            "role": "user",
            "content": "What is $1+1$? Let's think step by step and put the final answer "
            "in \\boxed{}.",
        }
    ]


MATH_ROWS: list[dict[str, Any]] = [
    {
        "problem": "p0",
        "level": "Level 1",
        "solution": r"First \boxed{3}, so $\boxed{\frac{1}{2}}$.",
    },
    {"problem": "p1", "solution": r"It is $\boxed 2$.", "answer": None},
    {"problem": "p2", "solution": r"It is $\boxed{2}$.", "answer": r"\text{two}"},
    {"problem": "p3", "answer": "9"},
]
DEEPMATH_ROWS: list[dict[str, Any]] = [
    {
        "question": "q0",
        "final_answer": r"\dfrac{\pi}{2}",
        "difficulty": 5.0,
        "r1_solution_1": "...",
    },
    {"question": "q1", "final_answer": "Yes"},
]


def write_jsonl(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prepared_files_hold_the_documented_columns(tmp_path: Path) -> None:
    sources = [
        write_jsonl(MATH_ROWS, tmp_path / "math_train.jsonl"),
        write_jsonl(DEEPMATH_ROWS, tmp_path / "deepmath_train.jsonl"),
        write_jsonl(DEEPMATH_ROWS[1:], tmp_path / "test.jsonl"),
    ]
    assert math.prepare(sources, tmp_path / "out") == {"train": 6, "validation": 1}
    rows = read_rows(tmp_path / "out" / "train.parquet")
    assert rows[0] == {
        "data_source": "EleutherAI/hendrycks_math",
        "prompt": math.prompt("p0"),
        "env_class": "math",
        "reward_spec": {"method": "rule", "ground_truth": r"\frac{1}{2}"},
        "extra_info": {
            "split": "train",
            "index": 0,
            "answer": MATH_ROWS[0]["solution"],
            "question": "p0",
        },
    }
    assert rows[4] == {
        "data_source": "zwhe99/DeepMath-103K",
        "prompt": math.prompt("q0"),
        "env_class": "math",
        "reward_spec": {"method": "rule", "ground_truth": r"\dfrac{\pi}{2}"},
        "extra_info": {"split": "train", "index": 4, "answer": r"\dfrac{\pi}{2}", "question": "q0"},
    }
    truths = [
        example.ground_truth for example in load_examples([tmp_path / "out" / "train.parquet"])
    ]
    assert truths == [r"\frac{1}{2}", "2", r"\text{two}", "9", r"\dfrac{\pi}{2}", "Yes"]
    assert (
        read_rows(tmp_path / "out" / "validation.parquet")[0]["extra_info"]["split"] == "validation"
    )


def test_one_split_is_enough_and_parquet_is_read(tmp_path: Path) -> None:
    write_rows(DEEPMATH_ROWS, tmp_path / "train-00000-of-00010.parquet")
    assert math.prepare([tmp_path / "train-00000-of-00010.parquet"], tmp_path / "out") == {
        "train": 2
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"problem": "p", "solution": "no box"}], "no final answer"),
        ([{"problem": "p"}], "no final answer"),
        ([{"problem": "p", "answer": ""}], "no final answer"),
        ([{"problem": "p", "answer": 3}], "no final answer"),
        ([{"problem": "p", "answer": "3"}, {"problem": "p", "solution": "\\boxed{}"}], "row 2"),
        ([{"question": 3, "final_answer": "3"}], "no final answer"),
        ([{"question": "q", "final_answer": "$$"}], "no final answer"),
        ([{"question": "q", "answer": "3"}], "column final_answer"),
        ([{"text": "q"}], "columns question, final_answer"),
        (
            [{"problem": "p", "answer": "3"}, {"question": "q", "final_answer": "3"}],
            "column problem",
        ),
    ],
)
def test_bad_source_files_are_named_and_nothing_is_written(
    tmp_path: Path, rows: list[dict[str, Any]], complaint: str
) -> None:
    good, bad = (
        write_jsonl(MATH_ROWS, tmp_path / "train.jsonl"),
        write_jsonl(rows, tmp_path / "test.jsonl"),
    )
    with pytest.raises(UserError, match=complaint) as raised:
        math.prepare([good, bad], tmp_path / "out")
    assert "test.jsonl" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_ambiguous_column_name_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot tell the split"):
        math.prepare([write_jsonl(MATH_ROWS, tmp_path / "problems.jsonl")], tmp_path / "out")


def test_another_program_needs_only_the_reward_function() -> None:
    program = (
        "import sys\n"
        "from rltrain.envs.math import reward\n"
        "assert reward(r'\\boxed{0.5}', r'\\frac{1}{2}') == 1.0\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'pandas', 'pyarrow', 'sympy'} & "
        "set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
