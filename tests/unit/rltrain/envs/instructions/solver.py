"""Ideal answers: what a person who follows every instruction would write for a sampled row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rltrain.envs.instructions.scoring import Task
from rltrain.envs.instructions.text import words as split

FILLERS = split(
    "so much all year long here now and also with every new day of their life in this town"
)
# With none of the letters that may be forbidden.
OTHER_FILLERS = split("in here at all hours in rain or heat")
MARKS = {
    "startend:question_mark": "?",
    "startend:exclamation_mark": "!",
    "startend:ellipsis": "...",
}
BY_LETTER = {"a": "all", "t": "these", "i": "in", "s": "some", "w": "we", "m": "most"}
BY_LETTER |= {"o": "our", "e": "every"}
# Six of the letter in each.
OFTEN = {
    "s": "and its sisters miss us less",
    "r": "where her brother ran over for another",
    "o": "and so too do our good old dogs",
    "l": "and all of us will still tell",
    "a": "and that has always had a place at a table",
    "t": "that start to taste better tonight",
}
VERBS = ("People love", "We see", "Children know", "Nobody hates")
PLACES = ("every town", "our dreams", "the morning", "this house")
# Answers that are no sentences: what is said about words `w` of the topic.
LISTS: dict[str, Callable[..., str]] = {
    "length:lines": lambda w, num_lines: "\n".join(
        f"{verb} {x} in {place}"
        for verb, x, place in zip(VERBS, w[:num_lines], PLACES, strict=False)
    ),
    "detectable_format:number_bullet_lists": lambda w, num_bullets: "\n".join(
        f"- {verb} {x}." for verb, x in zip(VERBS, w[:num_bullets], strict=False)
    ),
    "format:numbered_list": lambda w, num_items: "\n".join(
        f"{n}. {VERBS[n - 1]} {x}." for n, x in enumerate(w[:num_items], start=1)
    ),
    "format:comma_list": lambda w, num_items: ", ".join(w[:num_items]),
    "format:json_key": lambda w, key: json.dumps({key: f"People love {w[0]}."}),
}
WRAPPERS: dict[str, Callable[..., str]] = {
    "change_case:english_lowercase": lambda t: t.lower(),
    "change_case:english_capital": lambda t: t.upper(),
    "change_case:title_case": lambda t: t.title(),
    "change_case:capital_word": lambda t: t.replace(" love", " LOVE"),
    "startend:quotation": lambda t: f'"{t}"',
    "format:brackets": lambda t: f"[{t}]",
    "format:asterisks": lambda t: f"*{t}*",
    "format:parentheses": lambda t: t.replace(" love", " (and animals) love"),
    "detectable_format:number_highlighted_sections": lambda t, **_: t.replace(
        "We love", "*We* *love*"
    ),
    "detectable_format:title": lambda t: f"<<What We Like>>\n{t}",
    "detectable_content:postscript": lambda t, **_: f"{t}\n\nP.S. It was good to see you.",
    "detectable_content:number_placeholders": lambda t, **_: t.replace("love", "love [name] and"),
    "startend:end_checker": lambda t, end_phrase: f"{t} {end_phrase}",
    "combination:repeat_prompt": lambda t, prompt_to_repeat: f"{prompt_to_repeat}\n\n{t}",
}


def solve(task: Task) -> str:
    """Return an answer that keeps a task's constraints."""
    topic = [word for word in dict.fromkeys(task.topic) if len(word) > 2]
    for kind, kwargs in task.constraints:
        if kind in LISTS:
            return LISTS[kind](topic, **kwargs)
    text = _sentences(task, dict(task.constraints), topic)
    for kind, kwargs in task.constraints:
        if kind in WRAPPERS:
            text = WRAPPERS[kind](text, **kwargs)
    return text


def _sentences(task: Task, wanted: dict[str, dict[str, Any]], topic: list[str]) -> str:
    """Return the sentences of a form, with the constraints on their words, length and end."""
    words = _words(wanted, topic)
    mark = next((MARKS[kind] for kind in wanted if kind in MARKS), ".")
    count = wanted.get("length:exactly_sentences", {}).get("num_sentences", 0)
    count = count or (2 if task.form == "two sentences" else 1)
    others = [word for word in topic if word not in words][: count - 1]
    sentences = [" ".join(words), *(f"we see {word} here too" for word in others)]
    sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    return ". ".join(sentences) + mark


def _words(wanted: dict[str, dict[str, Any]], topic: list[str]) -> list[str]:
    """Return the words of the first sentence."""
    arguments: dict[str, Any] = {}
    for kwargs in wanted.values():
        arguments |= kwargs
    absent = wanted.get("keywords:letter_absent", {}).get("letter", "\n")
    repeated = [arguments["keyword"]] * arguments["frequency"] if "keyword" in arguments else []
    last = [arguments["last_word"]] if "last_word" in arguments else []
    longest = wanted.get("length:short_words", {}).get("num_letters", 100)
    subject = next(
        word
        for word in topic
        if absent not in word and word not in repeated + last and len(word) <= longest
    )
    subjects = arguments.get("keywords", [subject])

    body = split("there is" if absent != "\n" else "we love")
    body += [*subjects[:1], *(word for other in subjects[1:] for word in ("and", other))]
    opening = split(
        wanted.get("startend:first_word", {}).get("first_word")
        or arguments.get("start_phrase")
        or ""
    )
    if "startend:first_letter" in wanted:
        opening = [BY_LETTER[arguments["letter"]]]
    if opening[-1:] != body[:1]:
        body = opening + body
    tail = split(OFTEN[arguments["letter"]]) if "let_frequency" in arguments else []
    tail += ["with", *" and ".join(repeated).split()] if repeated else []
    tail += ["7", "times"] if "content:digits" in wanted else []
    tail += ["near", "red", "hills"] if "keywords:color" in wanted else []
    tail += ["on", "continents"] if "length:long_word" in wanted else []
    tail += last
    commas = arguments.get("num_commas", 0)
    body = [f"{word}," for word in split("yes well oh")[:commas]] + body

    fill = 2
    if "num_words" in arguments:
        at_most = "length:at_most_words" in wanted
        fill = 0 if at_most else arguments["num_words"] - len(body) - len(tail)
    fillers = OTHER_FILLERS if absent != "\n" else FILLERS
    return body + fillers[: max(0, fill)] + tail
