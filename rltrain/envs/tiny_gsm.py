"""Templated grade-school word problems for the gsm8k environment, with splits and data files."""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from rltrain.envs import gsm8k

# The same environment as the real GSM8K.
prompt = gsm8k.prompt
reward = gsm8k.reward
can_score = gsm8k.can_score

TEMPLATES = Path(__file__).parent.parent / "assets" / "tiny_gsm_templates.yaml"
DATA_SOURCE = "tiny_gsm"
DATA_SEED = 2024  # of the data files, whatever seed the model is trained with
SPLIT_SIZES = {"train": 2048, "validation": 512, "test": 1024}
LARGEST = 60  # the largest number that a model of 0.75 M parameters reasons with reliably

# Habits of the base's answers and their shares in pretraining. They do not depend on the problem,
# so reinforcement learning can shift the mixture.
HABITS = {"reasoned": 0.30, "guess": 0.25, "unmarked": 0.25, "bare": 0.20}

_CALCULATION = re.compile(r"\[(\w+)([-+*/])(\w+)\]")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class WordProblem:
    """A word problem: question, reasoning sentences, answer."""

    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        """The reasoning, one sentence a line, and `#### N` as in GSM8K."""
        return "\n".join((*self.steps, f"#### {self.answer}"))


def split_of(question: str, answer: int) -> str:
    """Return a problem's split, by a hash of its quantities in order and its answer.

    Problems that differ only in names, objects or phrasing share a split, so no split holds
    another's arithmetic. Train, validation and test get 80%, 10% and 10% of the hashes.
    """
    content = ",".join(_NUMBER.findall(question)) + f"={answer}"
    bucket = hashlib.sha256(content.encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def problems(split: str, seed: int) -> Iterator[WordProblem]:
    """Yield endless problems of a split; split and seed determine them."""
    rng = random.Random(f"tiny_gsm/{split}/{seed}")
    while True:
        problem = _sample(rng)
        if problem is not None and split_of(problem.question, problem.answer) == split:
            yield problem


def answer_with_habit(problem: WordProblem, habit: str, rng: random.Random) -> str:
    """Return an answer with one of HABITS; only `reasoned` and a lucky `guess` score."""
    if habit == "reasoned":
        return problem.solution
    if habit == "unmarked":
        return "\n".join((*problem.steps, f"The answer is {problem.answer}."))
    # Near the answer, seldom right.
    guess = min(LARGEST, max(1, problem.answer + rng.randint(-10, 10)))
    return f"#### {guess}" if habit == "guess" else str(guess)


def prepare(source: Sequence[Path] | None, output_dir: Path) -> dict[str, int]:
    """Write parquet files of distinct problems to `output_dir`; return the rows of each split.

    The problems are always the same. Raises UserError for a source: the problems are made here.
    """
    from rltrain.data.files import write_rows

    if source:
        raise UserError(
            "tiny_gsm makes its own problems", got=f"--source {source[0]}", fix="leave out --source"
        )
    for split, size in SPLIT_SIZES.items():
        distinct: dict[str, WordProblem] = {}
        for problem in problems(split, DATA_SEED):
            distinct.setdefault(problem.question, problem)
            if len(distinct) == size:
                break
        rows = [
            gsm8k.row(problem.question, problem.solution, split, index, data_source=DATA_SOURCE)
            for index, problem in enumerate(distinct.values())
        ]
        write_rows(rows, output_dir / f"{split}.parquet")
    return dict(SPLIT_SIZES)


@functools.cache
def _vocabulary() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The words and the templates, as the YAML file gives them."""
    import yaml

    content = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    return content["words"], content["templates"]


def _sample(rng: random.Random) -> WordProblem | None:
    """Sample a problem; None where the result is not a whole number from 1 to LARGEST."""
    words, templates = _vocabulary()
    template = rng.choice(templates)
    values = {name: rng.randint(low, high) for name, (low, high) in template["ranges"].items()}
    slots = _sample_words(words, rng) | {name: str(value) for name, value in values.items()}
    question = rng.choice(template["questions"])
    steps = []
    result: int | None = None
    for result_name, sentence in zip("xyz", template["steps"], strict=False):
        left, operator, right = _CALCULATION.findall(sentence)[0]
        # The right side may be a number in the template: twice, half, a week.
        left_value, right_value = values[left], values[right] if right in values else int(right)
        result = _calculate(left_value, operator, right_value)
        if result is None:
            return None
        values[result_name] = result
        shown = f"{left_value}{operator}{right_value}={result}"
        steps.append(_CALCULATION.sub(shown, sentence).format_map(slots))
    return None if result is None else WordProblem(question.format_map(slots), tuple(steps), result)


def _calculate(left: int, operator: str, right: int) -> int | None:
    """Return the result if it is a whole number from 1 to LARGEST, else None."""
    if operator == "/" and left % right:
        return None
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
    return result if 1 <= result <= LARGEST else None


def _sample_words(words: dict[str, Any], rng: random.Random) -> dict[str, str]:
    he = rng.random() < 0.5
    people = words["he"] + words["she"]
    name = rng.choice(words["he"] if he else words["she"])
    other, third = rng.sample([person for person in people if person != name], 2)
    box, boxes = rng.choice(words["containers"])
    item, item2 = rng.sample(words["food"] + words["thing"], 2)
    day = rng.randrange(len(words["day"]) - 1)
    return {
        "name": name,
        "other": other,
        "third": third,
        "he": "he" if he else "she",
        "He": "He" if he else "She",
        "his": "his" if he else "her",
        "item": item,
        "item2": item2,
        "box": box,
        "boxes": boxes,
        "day": words["day"][day],
        "day2": words["day"][day + 1],
        **{kind: rng.choice(words[kind]) for kind in ("food", "baked", "group", "animals")},
    }
