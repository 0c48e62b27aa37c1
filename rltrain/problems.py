"""Problems: examples with their prompts tokenised; prompts that are too long are dropped and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from harness.errors import UserError
from harness.schema import Recipe
from rltrain.data import Example, load_examples
from rltrain.envs import Env, get_env


@dataclass(frozen=True, slots=True)
class Problem:
    """One example with its prompt's token ids and the environment that scores its completions."""

    example: Example
    prompt_ids: tuple[int, ...]
    env: Env


def load_problems(recipe: Recipe, paths: Sequence[str], tokenizer: Any) -> tuple[list[Problem], int]:
    """The problems whose prompts fit `generator.max_input_length`, and how many did not.

    Raises UserError where none fits, and for a prompt that the tokenizer's chat template refuses.
    """
    limit = recipe.generator.max_input_length
    examples = load_examples(paths)
    problems = []
    for example in examples:
        ids = _prompt_ids(example, tokenizer)
        if len(ids) <= limit:
            env = get_env(example.env_class or recipe.environment.env_class)
            problems.append(Problem(example, tuple(ids), env))
    if not problems:
        raise UserError(
            "every prompt is longer than generator.max_input_length",
            got=f"{len(examples)} prompts in {', '.join(paths)}",
            allowed=f"<= {limit} tokens",
            fix="raise generator.max_input_length",
        )
    return problems, len(examples) - len(problems)


def _prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """The messages under the tokenizer's own chat template, the assistant's turn opened."""
    try:
        # verbose=False: a prompt that is too long is ours to drop and count, not the tokenizer's to warn of.
        ids: list[int] = tokenizer.apply_chat_template(
            example.prompt, add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except Exception as error:  # a template may go wrong in any way
        roles = ", ".join(message["role"] for message in example.prompt)
        why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise UserError(
            "the model's chat template refuses a prompt",
            got=f"{why}: problem {example.index} of the data, with messages of {roles}",
            fix="change the data's messages: many templates know no system role, or want user and assistant in turn",
        ) from None
    return ids
