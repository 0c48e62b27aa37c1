"""Problems: mixed tasks, long prompts dropped and counted, chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.data.files import write_rows
from rltrain.envs import get_env, gsm8k, math
from rltrain.envs.problems import load_problems
from tests.recipes import quickstart

OWN = """
def reward(completion, ground_truth): return 0.25 if completion == ground_truth else 0.0
"""
COMPLETIONS = ["#### 8", r"\boxed{8}", "8"]


def row(prompt: list[dict[str, str]], truth: str, env_class: str | None) -> dict[str, Any]:
    """A row of a data file; no env_class column where that is None."""
    values: dict[str, Any] = {
        "prompt": prompt,
        "reward_spec": {"method": "rule", "ground_truth": truth},
    }
    return values if env_class is None else {**values, "env_class": env_class}


def write_jsonl(rows: list[dict[str, Any]], path: Path) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def recipe_of(*overrides: str) -> Recipe:
    return quickstart(list(overrides))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_each_row_of_mixed_files_is_scored_by_its_own_environment(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mixed_tasks").mkdir()
    (tmp_path / "mixed_tasks" / "exact.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    ask = [{"role": "user", "content": "What is 3 + 5?"}]
    write_rows(
        [row(gsm8k.prompt("3 + 5?"), "8", "gsm8k"), row(math.prompt("3 + 5?"), "8", "math")],
        tmp_path / "a.parquet",
    )
    paths = [
        str(tmp_path / "a.parquet"),
        write_jsonl(
            [row(ask, "8", "mixed_tasks.exact"), row(ask, "8", None)], tmp_path / "b.jsonl"
        ),
        write_jsonl([row(ask, r"\frac{16}{2}", "math"), row(ask, "8", "")], tmp_path / "c.jsonl"),
    ]

    problems, dropped = load_problems(recipe_of("environment.env_class=math"), paths, tokenizer)

    assert dropped == 0
    assert [problem.example.index for problem in problems] == list(range(6))
    scores = [
        [problem.env.reward(text, problem.example.ground_truth) for text in COMPLETIONS]
        for problem in problems
    ]
    of_gsm8k, of_math, of_own = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.25]
    assert scores == [of_gsm8k, of_math, of_own, of_math, of_math, of_math]
    problems, _ = load_problems(recipe_of("environment.env_class=gsm8k"), paths, tokenizer)
    assert [problem.env for problem in problems][3::2] == [get_env("gsm8k")] * 2


def test_an_unknown_environment_in_the_data_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl([row(gsm8k.prompt("3 + 5?"), "8", "gsm9k")], tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="did you mean gsm8k"):
        load_problems(recipe_of(), [path], tokenizer)


def test_long_prompts_are_dropped_and_counted_never_cut(tokenizer: Any, tmp_path: Path) -> None:
    chats = [gsm8k.prompt("one and two, " * length) for length in (1, 9, 3, 7, 5)]
    whole = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)
        for c in chats
    ]
    limit = len(whole[4])
    paths = [
        write_jsonl([row(chat, "8", "gsm8k") for chat in chats[:2]], tmp_path / "a.jsonl"),
        write_jsonl([row(chat, "8", "gsm8k") for chat in chats[2:]], tmp_path / "b.jsonl"),
    ]

    problems, dropped = load_problems(
        recipe_of(f"generator.max_input_length={limit}"), paths, tokenizer
    )
    assert dropped == 2
    assert [problem.example.index for problem in problems] == [0, 2, 4]
    assert [list(problem.prompt_ids) for problem in problems] == [whole[0], whole[2], whole[4]]
    _, dropped = load_problems(
        recipe_of(f"generator.max_input_length={limit - 1}"), paths, tokenizer
    )
    assert dropped == 3
    with pytest.raises(UserError, match="every prompt is longer") as raised:
        load_problems(
            recipe_of(f"generator.max_input_length={len(whole[0]) - 1}"), paths, tokenizer
        )
    assert "5 prompts" in str(raised.value)


def test_a_prompt_beyond_the_tokenizers_own_limit_is_dropped_without_a_word(
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chats = [gsm8k.prompt("3 + 5?"), gsm8k.prompt("one and two, " * tokenizer.model_max_length)]
    path = write_jsonl([row(chat, "8", "gsm8k") for chat in chats], tmp_path / "a.jsonl")
    _, dropped = load_problems(recipe_of(), [path], tokenizer)
    assert dropped == 1
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def words_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts a BOS before every text, as Llama's does, with a chat
    template.
    """
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        "<sys>",
        "<user>",
        "<assistant>",
        "be",
        "brief",
        "what",
        "is",
        "this",
    ]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )


TURNS = (
    "{{ bos_token + ' ' }}"
    "{% if messages[0]['role'] != 'system' %}{{ '<sys> be brief ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('only user and assistant roles') }}{% endif %}"  # noqa: E501
    "{{ '<' + message['role'] + '> ' + message['content'] + ' </s> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_the_chat_template_is_used_as_it_comes(tmp_path: Path) -> None:
    tokenizer = words_tokenizer(TURNS)
    assert tokenizer("what")["input_ids"] == [1, 8]
    path = write_jsonl(
        [row([{"role": "user", "content": "what is this"}], "8", "gsm8k")], tmp_path / "a.jsonl"
    )
    (problem,), _ = load_problems(recipe_of(), [path], tokenizer)
    # One BOS, the template's; its own system message; the assistant's turn opened and nothing after
    # it.
    assert tokenizer.convert_ids_to_tokens(problem.prompt_ids) == [
        "<s>",
        "<sys>",
        "be",
        "brief",
        "<user>",
        "what",
        "is",
        "this",
        "</s>",
        "<assistant>",
    ]


def test_a_prompt_the_template_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "what"}, {"role": "tool", "content": "this"}]
    path = write_jsonl(
        [row([chat[0]], "8", "gsm8k"), row(chat, "8", "gsm8k")], tmp_path / "a.jsonl"
    )
    with pytest.raises(UserError, match="only user and assistant roles") as raised:
        load_problems(recipe_of(), [path], words_tokenizer(TURNS))
    assert "problem 1 of the data, with messages of user, tool" in str(raised.value)
