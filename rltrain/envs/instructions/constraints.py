"""Every kind of constraint by its id: IFEval's, and ours, scored as a person would score them.

The generator uses IFEval's kinds where a person agrees with its rule. The others have ids of their
own: a keyword is a whole word, in any case, and a word with hyphens is one word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rltrain.envs.instructions import text as texts
from rltrain.envs.instructions.ifeval import (
    CHARACTER,
    COUNT,
    IFEVAL,
    TEXT,
    WORDS,
    Constraint,
    parse_json,
)

_QUOTES = "\"'“”‘’*_([ \n"
_NUMBERED = re.compile(r"(\d+)[.)]\s+\S")
_PARENTHESES = re.compile(r"\(([^()\n]*)\)")
_COLORS = texts.words(
    "red blue green yellow orange purple pink brown black white gray grey golden silver violet"
)
MOST_WORDS_OF_ITEM = 4


def _title_case(text: str) -> bool:
    return all(word[0].isupper() or not word[0].isalpha() for word in texts.words(text))


def _capital_word(text: str) -> bool:
    """Return whether a word is in capitals; `I` and `A` are no such words."""
    return any(len(word) > 1 and word.isupper() for word in texts.words(text))


def _in_order(text: str, keywords: list[str]) -> bool:
    """Return whether the keywords appear in their order; other mentions do not matter."""
    start = 0
    for keyword in keywords:
        found = re.compile(rf"(?<!\w){re.escape(keyword)}(?!\w)", re.IGNORECASE).search(text, start)
        if found is None:
            return False
        start = found.end()
    return True


def _first_word(text: str, first_word: str) -> bool:
    return [word.lower() for word in texts.words(text)[:1]] == [first_word.lower()]


def _last_word(text: str, last_word: str) -> bool:
    return [word.lower() for word in texts.words(text)[-1:]] == [last_word.lower()]


def _first_letter(text: str, letter: str) -> bool:
    return text.lstrip(_QUOTES)[:1].lower() == letter.lower()


def _start_phrase(text: str, start_phrase: str) -> bool:
    start = text.lstrip(_QUOTES)[: len(start_phrase) + 1].lower()
    return start.startswith(start_phrase.lower()) and not (
        start_phrase[-1:].isalnum() and start[len(start_phrase) :].isalnum()
    )


def _ends_with(text: str, *marks: str) -> bool:
    return text.rstrip().rstrip(texts.CLOSERS).endswith(marks)


def _longest_word(text: str) -> int:
    """Return the letters of the longest word; a word with a hyphen is one, its hyphens aside."""
    return max((sum(map(str.isalpha, word)) for word in texts.words(text)), default=0)


def _numbered(text: str, num_items: int) -> bool:
    """Return whether lines are numbered from 1 to `num_items`; a line of introduction may be."""
    matches = [_NUMBERED.match(line) for line in texts.lines(text)]
    numbers = [match[1] for match in matches if match]
    return numbers == [str(number) for number in range(1, num_items + 1)]


def _comma_list(text: str, num_items: int) -> bool:
    """Return whether a line is a list of short items: `a, b, and c` and `a, b and c` have three."""
    *items, last = text.strip().rstrip(".").split(",")
    if items:
        last = re.sub(r"^\s*(?:and|or)\s", "", last)
        items += re.split(r"\s(?:and|or)\s", last, maxsplit=1)
    short = all(1 <= len(texts.words(item)) <= MOST_WORDS_OF_ITEM for item in items)
    return short and len(texts.lines(text)) == 1 and len(items) == num_items


def _json_key(text: str, key: str) -> bool:
    value = parse_json(text)
    return isinstance(value, dict) and isinstance(value.get(key), str) and bool(value[key].strip())


def _wrapped(text: str, opening: str, closing: str) -> bool:
    """Return whether one pair of marks is around the whole text, a final point aside."""
    text = text.strip()
    text = text[:-1] if text.endswith((".", "!")) else text
    inside = text[len(opening) : -len(closing)]
    return (
        text.startswith(opening)
        and text.endswith(closing)
        and bool(inside.strip())
        and opening not in inside
        and closing not in inside
    )


def _parentheses(text: str) -> bool:
    return any(texts.words(inside) for inside in _PARENTHESES.findall(text))


OWN: Mapping[str, Constraint] = {
    "change_case:title_case": Constraint(_title_case),
    "change_case:capital_word": Constraint(_capital_word),
    "punctuation:exactly_commas": Constraint(
        lambda text, num_commas: text.count(",") == num_commas, {"num_commas": COUNT}
    ),
    "keywords:include": Constraint(
        lambda text, keywords: all(texts.contains(text, word) for word in keywords),
        {"keywords": WORDS},
    ),
    "keywords:color": Constraint(
        lambda text: any(texts.contains(text, color) for color in _COLORS)
    ),
    "keywords:in_order": Constraint(_in_order, {"keywords": WORDS}),
    "keywords:exactly": Constraint(
        lambda text, keyword, frequency: texts.contains(text, keyword) == frequency,
        {"keyword": TEXT, "frequency": COUNT},
    ),
    "keywords:letter_absent": Constraint(
        lambda text, letter: letter.lower() not in text.lower(), {"letter": CHARACTER}
    ),
    "startend:first_word": Constraint(_first_word, {"first_word": TEXT}),
    "startend:not_first_word": Constraint(
        lambda text, first_word: not _first_word(text, first_word), {"first_word": TEXT}
    ),
    "startend:last_word": Constraint(_last_word, {"last_word": TEXT}),
    "startend:first_letter": Constraint(_first_letter, {"letter": CHARACTER}),
    "startend:start_phrase": Constraint(_start_phrase, {"start_phrase": TEXT}),
    "startend:question_mark": Constraint(lambda text: _ends_with(text, "?")),
    "startend:exclamation_mark": Constraint(lambda text: _ends_with(text, "!")),
    "startend:ellipsis": Constraint(lambda text: _ends_with(text, "...", "…")),
    "length:exactly_words": Constraint(
        lambda text, num_words: len(texts.words(text)) == num_words, {"num_words": COUNT}
    ),
    "length:at_most_words": Constraint(
        lambda text, num_words: len(texts.words(text)) <= num_words, {"num_words": COUNT}
    ),
    "length:at_least_words": Constraint(
        lambda text, num_words: len(texts.words(text)) >= num_words, {"num_words": COUNT}
    ),
    "length:long_word": Constraint(
        lambda text, num_letters: _longest_word(text) >= num_letters, {"num_letters": COUNT}
    ),
    "length:short_words": Constraint(
        lambda text, num_letters: _longest_word(text) <= num_letters, {"num_letters": COUNT}
    ),
    "length:exactly_sentences": Constraint(
        lambda text, num_sentences: len(texts.sentences(text)) == num_sentences,
        {"num_sentences": COUNT},
    ),
    "length:lines": Constraint(
        lambda text, num_lines: len(texts.lines(text)) == num_lines, {"num_lines": COUNT}
    ),
    "format:numbered_list": Constraint(_numbered, {"num_items": COUNT}),
    "format:comma_list": Constraint(_comma_list, {"num_items": COUNT}),
    "format:json_key": Constraint(_json_key, {"key": TEXT}),
    "format:brackets": Constraint(lambda text: _wrapped(text, "[", "]")),
    "format:asterisks": Constraint(
        lambda text: _wrapped(text, "*", "*") or _wrapped(text, "**", "**")
    ),
    "format:parentheses": Constraint(_parentheses),
    "content:digits": Constraint(lambda text: re.search(r"\d", text) is not None),
}
CONSTRAINTS: Mapping[str, Constraint] = {**IFEVAL, **OWN}


def fault(kind: object, kwargs: object) -> tuple[str, str] | None:
    """Return what is wrong with a constraint's id or arguments and what is allowed, else None.

    Arguments that are None are absent ones, as in IFEval's files on the hub.
    """
    if not isinstance(kind, str) or kind not in CONSTRAINTS:
        return f"instruction {kind!r}", f"one of {', '.join(sorted(CONSTRAINTS))}"
    if not isinstance(kwargs, dict):
        return f"kwargs {kwargs!r} of {kind}", "a mapping"
    wanted = CONSTRAINTS[kind].kwargs
    given = present(kwargs)
    if given.keys() != wanted.keys():
        names = ", ".join(wanted) or "none"
        return f"kwargs {', '.join(map(str, given)) or 'none'} of {kind}", names
    for name, (allowed, accepts) in wanted.items():
        if not accepts(given[name]):
            return f"{name}={given[name]!r} of {kind}", allowed
    return None


def present(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not None."""
    return {name: value for name, value in kwargs.items() if value is not None}
