"""Problems: examples with tokenised prompts, and the rewards of their completions."""

from __future__ import annotations

import errno
import inspect
import numbers
import reprlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError

from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.data.files import Chat, Example, is_chat, load_examples
from rltrain.distributed.process import is_rays_exit
from rltrain.envs import Env, get_env, offers

LARGEST_REWARD = 1e9
"""The squares of rewards of this size, summed over a batch, fit float32."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """An example, its prompt's token ids, and the environment that scores its completions."""

    example: Example
    prompt_ids: tuple[int, ...]
    env: Env


def reward_of(env: Env, example: Example, completion: str) -> float:
    """Return the environment's reward of a completion.

    Raises UserError, with the module, problem, completion and result, for an exception in the
    reward and for anything but a number from -`LARGEST_REWARD` to `LARGEST_REWARD`.
    """
    try:
        reward = env.reward(completion, example.ground_truth)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too, which would end the run with status 0
        full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full_disk or is_rays_exit(error):  # not the reward's fault
            raise
        raise UserError(
            f"the reward of {_name(env)} raised {type(error).__name__}: {error}",
            got=f"{_case(example, completion)}{_line(env, error)}",
            allowed="a number for every completion: 0.0 for one that cannot be read",
        ) from error
    # A scalar of NumPy or PyTorch.
    if getattr(reward, "shape", None) == () and hasattr(reward, "item"):
        reward = reward.item()
    if isinstance(reward, numbers.Real) and abs(reward) <= LARGEST_REWARD:
        return float(reward)
    if inspect.iscoroutine(reward):
        reward.close()
    raise UserError(
        f"the reward of {_name(env)} returned {_SHORT.repr(reward)} ({type(reward).__name__})",
        got=_case(example, completion),
        allowed=f"a number from -{LARGEST_REWARD:g} to {LARGEST_REWARD:g}",
        fix="write `def reward`, without async" if inspect.iscoroutine(reward) else None,
    )


def _name(env: Env) -> str:
    return str(getattr(env, "__name__", type(env).__name__))


def _case(example: Example, completion: str) -> str:
    return (
        f"completion {_SHORT.repr(completion)} for problem {example.index} ({example.where}), "
        f"ground truth {_SHORT.repr(example.ground_truth)}"
    )


def _line(env: Env, error: BaseException) -> str:
    """Return the line of the environment's module that raised an exception, if it did."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == getattr(env, "__file__", "")
    ]
    return f"; {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def messages(env: Env, example: Example) -> Chat:
    """Return an example's chat, which its environment makes where the file has only a question.

    Raises UserError for an environment's `prompt` that raises or returns no chat.
    """
    if example.prompt:
        return example.prompt
    if not offers(env, "prompt"):
        return [{"role": "user", "content": example.question}]
    chat = _call(env, "prompt", example.question, example)
    if not is_chat(chat):
        raise UserError(
            f"the prompt function of {_name(env)} returned no chat",
            got=f"{_SHORT.repr(chat)} for the question of {example.where}",
            allowed='[{"role": "user", "content": "..."}]',
        )
    return cast(Chat, chat)


def check_truth(env: Env, example: Example) -> None:
    """Raise UserError for a ground truth that no completion can score against."""
    if offers(env, "can_score") and not _call(env, "can_score", example.ground_truth, example):
        raise UserError(
            f"no completion can score against this ground truth in the environment {_name(env)}",
            got=f"{example.where}: {_SHORT.repr(example.ground_truth)}",
            fix="correct the row, or name another environment: environment.env_class, or "
            "env_class in the row",
        )


def _call(env: Env, part: str, text: str, example: Example) -> object:
    """Call an environment's optional function; raise UserError where it raises."""
    try:
        return getattr(env, part)(text)
    except (Exception, SystemExit) as error:  # a user's module can raise anything
        raise UserError(
            f"the {part} function of {_name(env)} raised {type(error).__name__}: {error}",
            got=f"{_SHORT.repr(text)} of {example.where}{_line(env, error)}",
        ) from error


def load_problems(
    recipe: Recipe, paths: Sequence[str], tokenizer: Any
) -> tuple[list[Problem], int]:
    """Return the problems whose prompts fit `generator.max_input_length`, and how many do not.

    Raises UserError where none fits, and for a prompt that the tokenizer's chat template refuses.
    """
    limit = recipe.generator.max_input_length
    examples = load_examples(paths, recipe.data)
    problems = []
    for example in examples:
        env = get_env(example.env_class or recipe.environment.env_class)
        ids = _prompt_ids(example, messages(env, example), tokenizer)
        if len(ids) <= limit:
            problems.append(Problem(example, tuple(ids), env))
    if not problems:
        raise UserError(
            "every prompt is longer than generator.max_input_length",
            got=f"{len(examples)} prompts in {', '.join(paths)}",
            allowed=f"<= {limit} tokens",
            fix="raise generator.max_input_length",
        )
    return problems, len(examples) - len(problems)


def _prompt_ids(example: Example, chat: Chat, tokenizer: Any) -> list[int]:
    """Return a chat's token ids under the tokenizer's template, with an open assistant turn."""
    try:
        # verbose=False: prompts that are too long are dropped and counted, without a warning.
        ids: list[int] = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except Exception as error:  # a template can raise anything
        roles = ", ".join(message["role"] for message in chat)
        why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise UserError(
            "the model's chat template refuses a prompt",
            got=f"{why}: problem {example.index} of the data, with messages of {roles}",
            fix="change the data's messages: many templates know no system role, or want "
            "user and assistant in turn",
        ) from None
    return ids
