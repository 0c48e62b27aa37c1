"""The prepare command: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.prepare import main
from rltrain.data.files import load_examples

PROJECT = Path(__file__).parents[3]
EXCERPT = PROJECT / "tests" / "data" / "gsm8k"


def test_gsm8k_from_local_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = [str(EXCERPT / "train.jsonl"), str(EXCERPT / "test.jsonl")]
    assert main(["gsm8k", "--output-dir", str(tmp_path / "out"), "--source", *source]) == 0
    assert "train.parquet: 6 problems" in capsys.readouterr().out
    assert (
        len(
            load_examples(
                [tmp_path / "out" / "train.parquet", tmp_path / "out" / "validation.parquet"]
            )
        )
        == 8
    )


def test_gsm8k_from_the_real_files(
    gsm8k_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [str(gsm8k_dir / "train.jsonl"), str(gsm8k_dir / "test.jsonl")]
    assert main(["gsm8k", "--output-dir", str(tmp_path), "--source", *source]) == 0
    out = capsys.readouterr().out
    assert "train.parquet: 7,473 problems" in out
    assert "validation.parquet: 1,319 problems" in out


def test_math_from_local_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text('{"problem": "p", "solution": "It is $\\\\boxed{2}$."}\n')
    (tmp_path / "test.jsonl").write_text('{"question": "q", "final_answer": "Yes"}\n' * 2)
    source = [str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")]
    assert main(["math", "--output-dir", str(tmp_path / "out"), "--source", *source]) == 0
    out = capsys.readouterr().out
    assert "train.parquet: 1 problems" in out
    assert "validation.parquet: 2 problems" in out
    examples = load_examples(
        [tmp_path / "out" / "train.parquet", tmp_path / "out" / "validation.parquet"]
    )
    assert [(example.env_class, example.ground_truth) for example in examples] == [
        ("math", "2"),
        ("math", "Yes"),
        ("math", "Yes"),
    ]


def test_instructions_are_made_here_and_ifeval_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["instructions", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "train.parquet: 2,048 problems" in out
    assert "test_unseen.parquet: 256 problems" in out
    examples = load_examples([tmp_path / "validation.parquet"])
    assert {example.env_class for example in examples} == {"instructions"}
    source = tmp_path / "input_data.jsonl"
    source.write_text(
        '{"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}\n'
    )
    assert main(["instructions", "--output-dir", str(tmp_path), "--source", str(source)]) == 0
    assert "ifeval.parquet: 1 problems" in capsys.readouterr().out


def test_a_module_of_ones_own_prepares_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prepares").mkdir()
    reward = "def reward(completion, ground_truth): return 1.0\n"
    (tmp_path / "prepares" / "nothing.py").write_text(reward)
    (tmp_path / "prepares" / "three.py").write_text(
        f"{reward}def prepare(source, output_dir): return {{'train': 3}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["prepares.three", "--output-dir", str(tmp_path / "out")]) == 0
    assert "train.parquet: 3 problems" in capsys.readouterr().out
    with pytest.raises(UserError, match="prepares no data"):
        main(["prepares.nothing", "--output-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("task", "repository"), [("gsm8k", "openai/gsm8k"), ("math", "EleutherAI/hendrycks_math")]
)
def test_without_the_hub_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, repository: str
) -> None:
    import huggingface_hub.constants as constants

    # The real client, told to stay offline and with an empty cache: the same error as with no
    # network, at once.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=f"cannot download {repository}") as raised:
        main([task, "--output-dir", str(tmp_path / "out")])
    assert "--source train.jsonl test.jsonl" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required"),
        (["gsm9k", "--output-dir", "x"], "gsm9k"),
        (["gsm8k"], "--output-dir"),
        (["tiny_gsm", "--output-dir", "x", "--steps", "0"], "whole number above 0"),
        (["tiny_gsm", "--output-dir", "x", "--threads", "two"], "whole number above 0"),
        (
            [
                "gsm8k",
                "--output-dir",
                "{tmp}/out",
                "--source",
                "{tmp}/train.jsonl",
                "{tmp}/test.jsonl",
            ],
            "not found",
        ),
        (
            ["gsm8k", "--output-dir", "{tmp}/file/out", "--source", "{tmp}/train.jsonl"],
            "output folder",
        ),
    ],
)
def test_bad_input_is_said(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=complaint):
        main([argument.format(tmp=tmp_path) for argument in arguments])


def test_bad_input_exits_2_without_traceback(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "no number"}\n')
    source = [str(tmp_path / "train.jsonl"), str(EXCERPT / "test.jsonl")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "harness.prepare",
            "gsm8k",
            "--output-dir",
            str(tmp_path / "out"),
            "--source",
            *source,
        ],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "an answer does not end in #### and a number" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "train.parquet").exists()
