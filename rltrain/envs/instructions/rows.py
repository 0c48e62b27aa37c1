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
PAIR_RATE = 0.55  # of the kinds that can be combined, which makes 15 to 20% of all rows
EXAMPLE_RATE = 0.7  # of the prompts, which then follow an example
COMMON_WORDS = ("the", "is", "and", "a", "in", "of", "to", "it", "are", "that", "with", "very")
_NUMBERS = texts.words("zero one two three four five six seven eight nine ten")

Kind = dict[str, Any]
Chat = list[dict[str, str]]


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
    sampled: dict[str, tuple[Chat, Task]] = {}
    while len(sampled) < size:
        turn = len(sampled) % len(kinds)
        if turn == 0:
            rng.shuffle(kinds)
        found = _sample(kinds[turn], kinds, rng.choice(topics), rng)
        if found is not None:
            sampled.setdefault(found[0][-1]["content"], found)
    split = f"{split}_unseen" if unseen else split
    return [
        row(chat, task.to_ground_truth(), split, index, data_source="instructions")
        for index, (chat, task) in enumerate(sampled.values())
    ]


def row(
    chat: Chat, ground_truth: str, split: str, index: int, *, data_source: str
) -> dict[str, Any]:
    """Return one row of a data file."""
    return {
        "data_source": data_source,
        "prompt": chat,
        "env_class": "instructions",
        "reward_spec": {"method": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "question": chat[-1]["content"]},
    }


def _sample(
    kind: Kind, kinds: Sequence[Kind], topic_and_words: tuple[str, str], rng: random.Random
) -> tuple[Chat, Task] | None:
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
    opening = rng.choice(vocabulary()["openings"])
    opening = opening.replace("{form}", rng.choice(vocabulary()["forms"].get(form, [""])))
    kwargs = [_draw(part.get("values", {}), words, f"{opening}.", rng) for part in chosen]
    if _contradict(kwargs, words):
        return None
    phrasings = _choose_phrasings(chosen, rng)
    in_words = rng.random() < 0.5
    chat = [_turn("user", _phrase(opening, phrasings, _about(kwargs, topic), topic, in_words))]
    if rng.random() < EXAMPLE_RATE:
        # The example of a kind alone keeps its constraint; others only show what is asked for.
        kept = [kind["example"]] if "example" in kind and len(chosen) == 1 else []
        plain = vocabulary()["examples"].get(form, {})
        about = kind["about"] if kept else rng.choice([*plain] or [""])
        shown = _about(kwargs, about)[: len(kept)]
        request = _phrase(opening, phrasings[: len(kept)], shown, about, in_words)
        answer = _example(kept[0], shown[0]) if kept else plain.get(about)
        if answer:
            chat = [_turn("user", request), _turn("assistant", answer), *chat]
    task = Task(
        tuple(zip((part["id"] for part in chosen), _about(kwargs, topic), strict=True)),
        form,
        tuple(texts.words(f"{topic.removeprefix('the ')} {related}")),
        "\n".join(message["content"] for message in chat),
    )
    return chat, task


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _draw(
    values: Mapping[str, Any], words: Sequence[str], request: str, rng: random.Random
) -> dict[str, Any]:
    """Draw the arguments of a kind of constraint; {topic} stands for the topic in them."""
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


def _about(kwargs: Sequence[Mapping[str, Any]], topic: str) -> list[dict[str, Any]]:
    """Return arguments with a topic in place of {topic}."""
    return [
        {
            name: value.replace("{topic}", topic) if isinstance(value, str) else value
            for name, value in part.items()
        }
        for part in kwargs
    ]


def _contradict(kwargs: Sequence[Mapping[str, Any]], words: Sequence[str]) -> bool:
    """Return whether a forbidden word or letter must be there, or leaves too few of the words."""
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
    if letter and (
        any(letter in text.lower() for text in required)
        or sum(letter not in word for word in words) < 3
    ):
        return True
    return bool(forbidden.intersection(required))


def _choose_phrasings(kinds: Sequence[Kind], rng: random.Random) -> list[str]:
    """Return a phrasing for each kind; at most one of them continues the opening."""
    phrasings: list[str] = []
    for kind in kinds:
        continued = any(phrasing[0].islower() for phrasing in phrasings)
        phrasings.append(
            rng.choice(
                [text for text in kind["phrasings"] if not (continued and text[0].islower())]
            )
        )
    return phrasings


def _phrase(
    opening: str,
    phrasings: Sequence[str],
    kwargs: Sequence[Mapping[str, Any]],
    topic: str,
    in_words: bool,
) -> str:
    """Return a request and its constraints as one prompt, small numbers in words or in digits."""
    continued, following = "", ""
    for phrasing, values in zip(phrasings, kwargs, strict=True):
        shown = {
            name: _NUMBERS[value] if in_words and value in range(len(_NUMBERS)) else value
            for name, value in values.items()
        }
        text = phrasing.format_map({**shown, "topic": topic})
        if "{topic}" in phrasing or "{prompt_to_repeat}" in phrasing:
            return text
        if phrasing[0].islower():
            continued = f" {text}"
        else:
            following += f" {text}"
    # No second point after one in quotes.
    end = "" if continued.endswith('."') else "."
    return f"{opening.format(topic=topic)}{continued}{end}{following}"


def _example(example: str | Mapping[Any, str], kwargs: Mapping[str, Any]) -> str:
    """Return the example of a kind for these arguments."""
    if isinstance(example, str):
        return example.format_map(kwargs) if kwargs else example
    return example[next(iter(kwargs.values()))]
