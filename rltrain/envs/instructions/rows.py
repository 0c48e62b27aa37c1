"""Prompts with constraints, sampled from the topics, forms and phrasings of a YAML file."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rltrain.envs.instructions import text as texts
from rltrain.envs.instructions.scoring import Task

PROMPTS = Path(__file__).parents[2] / "assets" / "instructions" / "prompts.yaml"
DATA_SEED = 2025  # of the data files, whatever seed the model is trained with
PAIR_RATE = 0.35  # of the kinds that can be combined, which makes 15 to 20% of all rows
COMMON_WORDS = ("the", "is", "and", "a", "in", "of", "to", "it", "are", "that", "with", "very")
_NUMBERS = texts.words("zero one two three four five six seven eight nine ten")

Kind = dict[str, Any]


@functools.cache
def vocabulary() -> dict[str, Any]:
    """Return the content of the YAML file: topics, forms, openings and kinds."""
    import yaml

    content: dict[str, Any] = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    return content


def sample(split: str, size: int, *, unseen: bool = False) -> list[dict[str, Any]]:
    """Return rows of a data file with distinct prompts about the topics of a split.

    Each kind comes equally often. `unseen` samples from the kinds that are never trained on, one
    to a prompt. The rows are the same at every call.
    """
    rng = random.Random(f"instructions/{split}/{unseen}/{DATA_SEED}")
    kinds = [kind for kind in vocabulary()["kinds"] if kind.get("unseen", False) == unseen]
    topics = list(vocabulary()["topics"][split].items())
    tasks: dict[str, Task] = {}
    turn = 0
    while len(tasks) < size:
        if turn % len(kinds) == 0:
            rng.shuffle(kinds)
        task = _task(kinds[turn % len(kinds)], kinds, rng.choice(topics), rng)
        if task is not None and task.prompt not in tasks:
            tasks[task.prompt] = task
            turn += 1
    split = f"{split}_unseen" if unseen else split
    return [
        row(task.prompt, task.to_ground_truth(), split, index, data_source="instructions")
        for index, task in enumerate(tasks.values())
    ]


def row(
    prompt: str, ground_truth: str, split: str, index: int, *, data_source: str
) -> dict[str, Any]:
    """Return one row of a data file."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "env_class": "instructions",
        "reward_spec": {"method": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "question": prompt},
    }


def _task(
    kind: Kind, kinds: Sequence[Kind], topic_and_words: tuple[str, str], rng: random.Random
) -> Task | None:
    """Sample a prompt with a kind of constraint; None where its parts contradict each other."""
    topic, related = topic_and_words
    words = related.split("/")[0].split()
    form = rng.choice(kind["forms"])
    partners = [
        other
        for other in kinds
        if {"aspect"} <= kind.keys() & other.keys()
        and other["aspect"] != kind["aspect"]
        and form in other["forms"]
    ]
    chosen = [kind]
    if partners and rng.random() < PAIR_RATE:
        chosen.append(rng.choice(partners))
    form_text = rng.choice(vocabulary()["forms"].get(form, [""]))
    request = rng.choice(vocabulary()["openings"]).format(form=form_text, topic=topic)
    kwargs = [_draw(part.get("values", {}), words, f"{request}.", rng) for part in chosen]
    topic_words = tuple(texts.words(f"{topic.removeprefix('the ')} {related}"))
    if _contradict(kwargs, words):
        return None
    constraints = tuple(zip((part["id"] for part in chosen), kwargs, strict=True))
    prompt = _phrase(request, chosen, kwargs, topic, rng)
    return Task(constraints, form, topic_words, prompt)


def _draw(
    values: Mapping[str, Any], words: Sequence[str], request: str, rng: random.Random
) -> dict[str, Any]:
    """Draw the arguments of a kind of constraint."""
    draws = {
        "related": lambda: rng.choice(words),
        "single": lambda: rng.sample(words, 1),
        "pair": lambda: rng.sample(words, 2),
        "common": lambda: rng.sample(COMMON_WORDS, 2),
        "request": lambda: request,
    }
    return {
        name: draws[value]() if isinstance(value, str) else rng.choice(value)
        for name, value in values.items()
    }


def _contradict(kwargs: Sequence[Mapping[str, Any]], topic_words: Sequence[str]) -> bool:
    """Return whether a forbidden word or letter must be there, or leaves little to say."""
    letter = next((part["letter"] for part in kwargs if part.keys() == {"letter"}), "")
    forbidden = {word for part in kwargs for word in part.get("forbidden_words", ())}
    required = [
        text
        for part in kwargs
        for name, value in part.items()
        if name not in ("letter", "forbidden_words")
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    ]
    if letter and any(letter in text.lower() for text in required):
        return True
    return bool(forbidden.intersection(required)) or (
        bool(letter) and sum(letter not in word for word in topic_words) < 3
    )


def _phrase(
    request: str,
    kinds: Sequence[Kind],
    kwargs: Sequence[Mapping[str, Any]],
    topic: str,
    rng: random.Random,
) -> str:
    """Return a request and the phrasings of its constraints as one prompt."""
    whole, continued, following = "", "", ""
    for kind, values in zip(kinds, kwargs, strict=True):
        # The second constraint has a sentence of its own.
        phrasing = rng.choice(
            [text for text in kind["phrasings"] if not continued or text[0].isupper()]
        )
        in_words = rng.random() < 0.5
        shown = {
            name: _NUMBERS[value] if in_words and value in range(len(_NUMBERS)) else value
            for name, value in values.items()
        }
        text = phrasing.format_map({**shown, "topic": topic})
        if "{topic}" in phrasing or "{prompt_to_repeat}" in phrasing:
            whole = text
        elif phrasing[0].islower():
            continued = f" {text}"
        else:
            following += f" {text}"
    return whole or f"{request}{continued}.{following}"
