"""The score of a completion, and why it is what it is."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from rltrain.envs.instructions import answers
from rltrain.envs.instructions.constraints import CONSTRAINTS, fault, present


@dataclass(frozen=True, slots=True)
class Task:
    """The constraints, form and topic that a completion is scored by.

    `form` is empty for IFEval's rows: these ask for constraints alone. Otherwise the completion
    must also be an answer of this form about the words `topic`, and no copy of `prompt`.
    """

    constraints: tuple[tuple[str, dict[str, Any]], ...]
    form: str = ""
    topic: tuple[str, ...] = ()
    prompt: str = ""

    def to_ground_truth(self) -> str:
        """Return the JSON text of a data file's ground truth."""
        content: dict[str, Any] = {
            "instruction_id_list": [kind for kind, _ in self.constraints],
            "kwargs": [kwargs for _, kwargs in self.constraints],
        }
        if self.form:
            content |= {"form": self.form, "topic": self.topic, "prompt": self.prompt}
        return json.dumps(content, ensure_ascii=False)


def parse_task(content: object) -> Task:
    """Return the task of a row's content; raise ValueError(what is wrong, what is allowed)."""
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}", "an object")
    kinds, kwargs = content.get("instruction_id_list"), content.get("kwargs")
    if not isinstance(kinds, list) or not isinstance(kwargs, list) or not kinds:
        raise ValueError("no instruction_id_list or kwargs", "two lists that are not empty")
    if len(kinds) != len(kwargs):
        raise ValueError(
            f"{len(kinds)} instructions and {len(kwargs)} kwargs", "one kwargs for each instruction"
        )
    for kind, values in zip(kinds, kwargs, strict=True):
        wrong = fault(kind, values)
        if wrong:
            raise ValueError(*wrong)
    constraints = tuple((kind, present(values)) for kind, values in zip(kinds, kwargs, strict=True))
    form, topic, prompt = (content.get(name) for name in ("form", "topic", "prompt"))
    if form is None:
        return Task(constraints)
    if not isinstance(form, str) or form not in answers.FORMS:
        raise ValueError(f"form {form!r}", f"one of {', '.join(answers.FORMS)}")
    if not isinstance(topic, list) or not all(isinstance(word, str) for word in topic):
        raise ValueError(f"topic {topic!r}", "a list of words")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {prompt!r}", "text")
    return Task(constraints, form, tuple(topic), prompt)


@functools.lru_cache(maxsize=1 << 14)
def read_task(ground_truth: str) -> Task | None:
    """Return the task of a ground truth, None where it is none."""
    try:
        return parse_task(json.loads(ground_truth))
    except (ValueError, RecursionError):
        return None


def failures(completion: str, task: Task) -> list[str]:
    """Return the ids of the constraints that a completion breaks and what makes it no answer.

    An empty list is a score of 1.
    """
    if not completion.strip():
        return ["empty"]
    broken = [
        kind
        for kind, kwargs in task.constraints
        if not CONSTRAINTS[kind].holds(completion, **kwargs)
    ]
    if not task.form:
        return broken
    if len(completion) > 2 * answers.LONGEST:
        return [*broken, "too long"]
    repeated = next(
        (
            kwargs["prompt_to_repeat"]
            for _, kwargs in task.constraints
            if "prompt_to_repeat" in kwargs
        ),
        "",
    )
    said = answers.content(completion, task.form, repeated)
    lowercase = any(kind == "change_case:english_lowercase" for kind, _ in task.constraints)
    return broken + answers.faults(said, task.form, task.topic, task.prompt, lowercase=lowercase)


def reward(completion: str, ground_truth: str) -> float:
    """Return 1.0 if a completion is an answer and keeps every constraint, else 0.0.

    The mean over a data file is IFEval's strict prompt-level accuracy.
    """
    task = read_task(ground_truth)
    return float(task is not None and not failures(completion, task))


def can_score(ground_truth: str) -> bool:
    """Return whether the ground truth is JSON whose ids and arguments are all known."""
    return read_task(ground_truth) is not None
