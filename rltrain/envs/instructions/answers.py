"""Whether a text is an answer at all: about its topic, in words of the language, of its form.

A reward for form alone is won within twenty steps by `ADEEPYESTER!`, by one word over and over, or
by the prompt itself. These tests are made so that ordinary writing passes and none of that does.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rltrain.envs.instructions import text as texts
from rltrain.envs.instructions.ifeval import parse_json


@dataclass(frozen=True, slots=True)
class Form:
    """Limits of a form: numbers of words and sentences (0: any), and how an answer may end."""

    least_words: int
    most_words: int
    sentences: int = 0
    end: tuple[str, ...] = (".", "!", "?", "…")


FORMS: Mapping[str, Form] = {
    "short sentence": Form(3, 25, 1),
    "sentence": Form(3, 45, 1),
    "two sentences": Form(6, 60, 2),
    "headline": Form(3, 20, end=()),
    "note": Form(3, 60),
    "lines": Form(6, 60, end=()),
    "list": Form(2, 60, end=()),
    "json": Form(3, 60, end=()),
}
LONGEST = 1000
"""Characters; a longer text is no answer to prompts that ask for a sentence or two."""

# Words of the request, which an answer about something else does not use. With them go answers
# such as "this is a sentence about winter" and introductions that nobody asked for.
_REQUEST_WORDS = frozenset(
    texts.words(
        "sentence sentences lowercase uppercase capitalized comma commas bullet bullets json "
        "asterisk asterisks hyphen hyphens hyphenated bracket brackets parentheses prompt "
        "placeholder headline placeholders postscript exclamation punctuation keyword keywords "
        "digits letter letters dots quotation"
    )
)
_FUNCTION_WORDS = frozenset(
    texts.words(
        "a an the this that these those my your his her its our their some any every each no "
        "all both many much more most few i you he she it we they me him us them who what which "
        "whose when where why how there here is are was were be been being am has have had do "
        "does did can could will would shall should may might must and or but nor so yet if "
        "because while as than of in on at by for with from to into onto over under about after "
        "before between through during without near around up down out off not very too also "
        "just only never always often let's it's i'm don't can't that's you're we're they're "
        "i've isn't doesn't didn't won't i'll"
    )
)
# So common that a short sentence without a function word has one of them.
_COMMON_VERBS = frozenset(
    texts.words(
        "make makes love loves like likes need needs help helps give gives bring brings come comes "
        "go goes keep keeps let lets see look looks feel feels"
    )
)
_ARTICLES = frozenset(texts.words("a an the my your our their"))
_NOT_AFTER_ARTICLES = frozenset(
    texts.words(
        "a an the my your our their and or of to with is are was were be has have had can will"
    )
)
_CODE = re.compile(r"[{}\\|=~^<>`]|\w\(|;\s*$|://|#")
_MARKER = re.compile(r"^\s*(?:[-*•]+|\d+[.)])\s+", re.MULTILINE)
_TITLE = re.compile(r"^.*<<.*>>[ \t]*", re.MULTILINE)
_INITIALS = re.compile(r"[^\W\d_](?:\.[^\W\d_])+")  # P.S, a.m
_SUFFIX = re.compile(r"(?:'s|’s|'|’|ing|ed|es|s|er|ers|y|ies|ie|e)$")


@functools.cache
def known_words() -> frozenset[str]:
    """Return the English words of pyspellchecker's list, which takes a moment to load.

    Its words of one or two letters are mostly abbreviations: only frequent ones are kept.
    """
    from spellchecker import SpellChecker

    counts = SpellChecker(distance=1).word_frequency.dictionary
    return frozenset(word for word in counts if len(word) > 2 or counts[word] > 10_000)


def content(text: str, form: str, repeated: str = "") -> str:
    """Return what a text says, without the marks that its form or a constraint may ask for.

    Those are a title, markers of list items, brackets, asterisks and quotes; of JSON the texts in
    it; and the request `repeated` at the start.
    """
    text = text.strip()
    if repeated and text.lower().startswith(repeated.lower()):
        text = text[len(repeated) :]
    if form == "json":
        value = parse_json(text)
        texts_inside = value.values() if isinstance(value, dict) else ()
        return " ".join(inside for inside in texts_inside if isinstance(inside, str))
    text = _MARKER.sub("", _TITLE.sub("", text))
    return text.translate({ord(mark): None for mark in '*[]"“”'}).strip()


def faults(
    text: str, form: str, topic: Collection[str], prompt: str, *, lowercase: bool = False
) -> list[str]:
    """Return what keeps the content of a text from being an answer; nothing for an answer.

    `form` is one of FORMS, `topic` are the words that an answer is about, in any of their forms,
    and `prompt` is what the text must not be a copy of. A sentence begins with a capital letter,
    unless small letters were asked for.
    """
    if len(text) > LONGEST:
        return ["too long"]
    shape, words = FORMS[form], [word.lower() for word in texts.words(text)]
    parts = [part for word in words for part in word.split("-") if part[0].isalpha()]
    if not parts:
        return ["empty"]
    tests = {
        "too few words": len(parts) < shape.least_words,
        "too many words": len(words) > shape.most_words,
        "not about the topic": not set(map(stem, parts)) & set(map(stem, topic)),
        "repetition": _repeats(words),
        "unknown words": _has_unknown_words(text),
        "copy of the prompt": _copies(words, [word.lower() for word in texts.words(prompt)]),
        "speaks of the request": bool(_REQUEST_WORDS.intersection(words) - set(topic)),
        "code": _CODE.search(text) is not None,
    }
    if shape.sentences:
        tests["sentences"] = len(texts.sentences(text)) != shape.sentences
    if shape.end:
        tests["unfinished"] = not text.rstrip(texts.CLOSERS).endswith(shape.end)
        tests["no sentence"] = not _reads_as_sentences(text, words)
        tests["small first letter"] = text[:1].islower() and not lowercase
    return [name for name, found in tests.items() if found]


def stem(word: str) -> str:
    """Return a word without its ending, so that `snow`, `snows` and `snowy` are the same."""
    shorter = word.lower()
    for _ in range(2):
        cut = _SUFFIX.sub("", shorter)
        if len(cut) < 3:
            break
        shorter = cut
    return shorter[:-1] if len(shorter) > 3 and shorter[-1] == shorter[-2] else shorter


def _repeats(words: Sequence[str]) -> bool:
    """Return whether a word or two words in a row come too often for so short a text."""
    most_of_long, most_of_short = 2 + len(words) // 10, 3 + len(words) // 6
    long_words = Counter(stem(word) for word in words if word not in _FUNCTION_WORDS)
    short_words = Counter(word for word in words if word in _FUNCTION_WORDS)
    pairs = Counter(itertools.pairwise(words))
    return (
        max(long_words.values(), default=0) > most_of_long
        or max(short_words.values(), default=0) > most_of_short
        or max(pairs.values(), default=0) > 2
        or any(one == two for one, two in pairs)
    )


def _has_unknown_words(text: str) -> bool:
    """Return whether more words are unknown than ordinary writing has.

    In ten words one may be unknown, two if both look like names: a capital, not at the start.
    """
    known, unknown, names, count = known_words(), 0, 0, 0
    for position, token in enumerate(texts.words(text)):
        if _INITIALS.fullmatch(token):
            continue
        for word in re.split(r"[-&.,]", token.replace("’", "'")):
            count += 1
            lower = word.lower()
            if lower in known or word.isdigit() or lower.removesuffix("'s") in known:
                continue
            if position and word.istitle():
                names += 1
            else:
                unknown += 1
    return unknown > count // 10 or unknown + names > 1 + count // 10


def _copies(words: Sequence[str], prompt: Sequence[str]) -> bool:
    """Return whether a third of the runs of three words are the prompt's."""
    in_prompt = set(zip(prompt, prompt[1:], prompt[2:], strict=False))
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return sum(run in in_prompt for run in runs) * 3 > len(runs)


def _reads_as_sentences(text: str, words: Sequence[str]) -> bool:
    """Return whether words are joined as sentences join them: no list, no words cut off."""
    short_words = sum(word in _FUNCTION_WORDS for word in words)
    joining = short_words + sum(word in _COMMON_VERBS or word.isdigit() for word in words)
    after = itertools.pairwise(words)
    return (
        joining >= max(1, len(words) // 6)
        and short_words <= 0.85 * len(words)
        and not any(one in _ARTICLES and two in _NOT_AFTER_ARTICLES for one, two in after)
        and words[-1] not in _ARTICLES
        and len(words) >= 2 * (text.count(",") + 1)
    )
