"""The gsm8k reward scores as a person would; its data files hold what the trainer reads."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.errors import UserError
from rltrain.data.files import load_examples, read_rows
from rltrain.envs import gsm8k

EXCERPT = Path(__file__).parents[3] / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("completion", "truth"),
    [
        ("4*4=16 and 16+2=18.\n#### 18", "18"),
        ("####18", "18"),
        ("#### $18", "18"),
        ("#### 18.", "18"),
        ("#### 18.00", "18"),
        ("#### 18 dollars", "18"),
        ("#### 18%", "18"),
        ("#### **18**", "18"),
        ("####\n18", "18"),
        ("#### 16+2=18", "18"),
        ("#### 5, no: #### 18", "18"),
        ("#### 1,080", "1080"),
        ("#### 1080", "1,080"),
        ("#### $1,080.00.", "1,080"),
        ("#### -7", "-7"),
        ("#### -$7", "-7"),
        ("#### $-7.0", "-7"),
        ("#### −7", "-7"),
        ("#### .5", "0.5"),
        ("#### 18\n\nAnother question: 3 apples", "18"),
    ],
)
def test_right_answers_score(completion: str, truth: str) -> None:
    assert gsm8k.reward(completion, truth) == 1.0


@pytest.mark.parametrize(
    ("completion", "truth"),
    [
        ("The answer is 18.", "18"),
        ("18", "18"),
        ("### 18", "18"),
        ("", "18"),
        ("####", "18"),
        ("#### eighteen", "18"),
        ("#### 18, no: #### 5", "18"),
        ("#### 18, no: ####", "18"),
        ("#### 1.8", "18"),
        ("#### 180", "18"),
        ("#### 7", "-7"),
        ("#### -7", "7"),
        ("#### 18/2", "18"),
        ("#### 18", "not a number"),
    ],
)
def test_wrong_answers_do_not_score(completion: str, truth: str) -> None:
    assert gsm8k.reward(completion, truth) == 0.0


@given(st.text(), st.text())
def test_garbage_never_crashes(completion: str, truth: str) -> None:
    assert gsm8k.reward(completion, truth) in (0.0, 1.0)


@given(st.text(alphabet="# $-−.,0123456789/=\n"), st.text(alphabet="$-.,0123456789"))
def test_near_answers_never_crash(tail: str, truth: str) -> None:
    assert gsm8k.reward(f"#### {tail}", truth) in (0.0, 1.0)


@given(
    st.integers(-(10**9), 10**9),
    st.text(alphabet="ab 0123456789#$.\n"),
    st.sampled_from(["", ".", ".0", ".00", " eggs"]),
)
def test_any_whole_number_scores_after_any_reasoning(
    number: int, reasoning: str, ending: str
) -> None:
    assert gsm8k.reward(f"{reasoning}\n#### {number:,}{ending}", str(number)) == 1.0
    assert gsm8k.reward(f"{reasoning}\n#### {number + 1}{ending}", str(number)) == 0.0


def test_a_very_long_number_is_a_number() -> None:
    assert gsm8k.final_number("#### " + "9" * 10_000) == Decimal("9" * 10_000)


def test_prompt_is_the_question_a_space_and_the_instruction() -> None:
    assert gsm8k.prompt("How many?") == [
        {
            "role": "user",
            "content": "How many? Let's think step by step and output the final answer "
            'after "####".',
        }
    ]


def assert_reference_answers_score(folder: Path) -> int:
    rows = [
        json.loads(line)
        for name in ("train", "test")
        for line in (folder / f"{name}.jsonl").open(encoding="utf-8")
    ]
    for row in rows:
        truth = row["answer"].split("#### ")[1]
        assert gsm8k.reward(row["answer"], truth) == 1.0, row
        assert gsm8k.reward(row["answer"], str(Decimal(truth.replace(",", "")) + 1)) == 0.0, row
    return len(rows)


def test_reference_answers_of_the_excerpt_score() -> None:
    assert assert_reference_answers_score(EXCERPT) == 8


def test_all_reference_answers_score(gsm8k_dir: Path) -> None:
    assert assert_reference_answers_score(gsm8k_dir) == 8792


def test_prepared_files_hold_the_documented_columns(tmp_path: Path) -> None:
    rows = gsm8k.prepare([EXCERPT / "train.jsonl", EXCERPT / "test.jsonl"], tmp_path)

    assert rows == {"train": 6, "validation": 2}
    written = read_rows(tmp_path / "train.parquet")
    source = read_rows(EXCERPT / "train.jsonl")
    assert [row["extra_info"]["question"] for row in written] == [row["question"] for row in source]
    assert written[4] == {
        "data_source": "openai/gsm8k",
        "prompt": gsm8k.prompt(source[4]["question"]),
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": "1,080"},
        "extra_info": {
            "split": "train",
            "index": 4,
            "answer": source[4]["answer"],
            "question": source[4]["question"],
        },
    }
    assert [example.ground_truth for example in load_examples([tmp_path / "train.parquet"])][
        5
    ] == "-7"
    assert read_rows(tmp_path / "validation.parquet")[1]["extra_info"]["split"] == "validation"


def test_prepare_reads_what_the_hub_serves_parquet(tmp_path: Path) -> None:
    from rltrain.data.files import write_rows

    for name in ("train", "test"):
        write_rows(
            read_rows(EXCERPT / f"{name}.jsonl"), tmp_path / f"{name}-00000-of-00001.parquet"
        )
    assert gsm8k.prepare(sorted(tmp_path.glob("*.parquet")), tmp_path / "out") == {
        "train": 6,
        "validation": 2,
    }


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ('{"question": "q", "answer": "a"}\n', "#### and a number"),
        ('{"question": "q", "answer": "#### none"}\n', "#### and a number"),
        ('{"question": "q"}\n', "column answer"),
        ('{"question": 3, "answer": "#### 3"}\n', "must be text"),
        ('{"question": "q", "answer": "#### 3"}\n{"question": \n', "line 2"),
        ("[1]\n", "not a JSON object"),
        ("\n", "no rows"),
    ],
)
def test_bad_source_files_are_named_and_nothing_is_written(
    tmp_path: Path, train: str, complaint: str
) -> None:
    (tmp_path / "train.jsonl").write_text(train)
    with pytest.raises(UserError, match=complaint) as raised:
        gsm8k.prepare([tmp_path / "train.jsonl", EXCERPT / "test.jsonl"], tmp_path / "out")
    assert "train.jsonl" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_split_and_an_unclear_name_are_said() -> None:
    with pytest.raises(UserError, match="no source file for the validation split"):
        gsm8k.prepare([EXCERPT / "train.jsonl"], Path("unused"))
    with pytest.raises(UserError, match="cannot tell the split"):
        gsm8k.prepare([EXCERPT / "LICENSE"], Path("unused"))


def test_reward_is_all_another_program_needs() -> None:
    program = (
        "import sys\n"
        "from rltrain.envs.gsm8k import reward\n"
        "assert reward('#### 18', '18') == 1.0\n"
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
