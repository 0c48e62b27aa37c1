"""The 25 constraints of IFEval, scored as its authors' published code scores them.

Zhou et al. 2023, arXiv:2311.07911. Their ids, arguments and rules are kept, so that accuracies can
be compared: a keyword counts inside a longer word too, a hyphenated word is two words, and titles,
highlights and sections are at least as many as asked for. It departs from their code in three
places: sentences are split by `text.sentences` instead of nltk, words in capitals are found between
spaces instead of by nltk, and languages are detected by py3langid instead of langdetect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rltrain.envs.instructions import text as texts

FENCES = ("```json", "```Json", "```JSON", "```")
_LANGUAGES = (
    "en es pt ar hi fr ru de ja it bn uk th ur ta te bg ko pl he fa vi ne sw kn mr gu pa ml fi"
)
_FIRST_WORD_ENDS = re.compile(r"[.,?!'\"]")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

# What an argument may be: in words, and the test of it.
COUNT = ("a whole number above 0", lambda value: type(value) is int and value > 0)
TEXT = ("text that is not blank", lambda value: isinstance(value, str) and bool(value.strip()))
WORDS = (
    "a list of texts that are not blank",
    lambda value: isinstance(value, list) and len(value) > 0 and all(map(TEXT[1], value)),
)
CHARACTER = ("one character", lambda value: isinstance(value, str) and len(value) == 1)
RELATION = ("at least or less than", lambda value: value in ("at least", "less than"))
LANGUAGE = (
    f"one of {_LANGUAGES}",
    lambda value: isinstance(value, str) and value in _LANGUAGES.split(),
)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A kind of constraint: the test of an answer, and what its keyword arguments may be.

    `holds(text, **kwargs)` says whether a text keeps it; it is pure and takes time linear in the
    text. `kwargs` has for each argument a description of its values and their test.
    """

    holds: Callable[..., bool]
    kwargs: Mapping[str, tuple[str, Callable[[Any], bool]]] = field(default_factory=dict)


def detect_language(text: str) -> str:
    """Return the code of the language that py3langid finds most likely for a text."""
    from py3langid import classify  # loads its model at the first call, in most of a second

    return str(classify(text.lower())[0])


def _related(count: int, relation: str, wanted: int) -> bool:
    return count >= wanted if relation == "at least" else count < wanted


def parse_json(text: str) -> Any:
    """Return what a text is as JSON, with or without a Markdown fence; None where it is none."""
    text = text.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        return json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return None


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\s?\*\*\*\s?", text)]
    # A divider may stand before the first and after the last paragraph.
    return all(paragraphs[1:-1]) and sum(map(bool, paragraphs)) == num_paragraphs


def _paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    paragraphs = text.split("\n\n")
    if sum(bool(paragraph.strip()) for paragraph in paragraphs) != num_paragraphs:
        return False
    # Blank paragraphs count for the number of a paragraph, as in IFEval's code.
    tokens = paragraphs[nth_paragraph - 1].split() if nth_paragraph <= num_paragraphs else []
    first = tokens[0].lstrip("'").lstrip('"').lower() if tokens else ""
    return _FIRST_WORD_ENDS.split(first)[0] == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(
        postscript_marker, re.escape(postscript_marker.lower())
    )
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    starts = [line[:2] for line in texts.lines(text)]
    bullets = sum(start[0] == "-" or (start[0] == "*" and start != "**") for start in starts)
    return bullets == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(inside.strip()) for inside in single + double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    heads = re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)
    return len(heads) >= num_sections


def _title(text: str) -> bool:
    """Return whether a line has text between `<<` and `>>`."""
    spans = (line[line.find("<<") : line.rfind(">>") + 2] for line in text.split("\n"))
    return any(span.endswith(">>") and span.strip("<>").strip() for span in spans)


def _two_responses(text: str) -> bool:
    answers = [answer.strip() for answer in text.split("******")]
    filled = [answer for answer in answers if answer]
    return all(answers[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(token.isupper() for token in text.split())
    return _related(count, capital_relation, capital_frequency)


IFEVAL: Mapping[str, Constraint] = {
    "keywords:existence": Constraint(
        lambda text, keywords: all(word.lower() in text.lower() for word in keywords),
        {"keywords": WORDS},
    ),
    "keywords:frequency": Constraint(
        lambda text, keyword, frequency, relation: _related(
            text.lower().count(keyword.lower()), relation, frequency
        ),
        {"keyword": TEXT, "frequency": COUNT, "relation": RELATION},
    ),
    "keywords:forbidden_words": Constraint(
        lambda text, forbidden_words: not any(texts.contains(text, w) for w in forbidden_words),
        {"forbidden_words": WORDS},
    ),
    "keywords:letter_frequency": Constraint(
        lambda text, letter, let_frequency, let_relation: _related(
            text.lower().count(letter.lower()), let_relation, let_frequency
        ),
        {"letter": CHARACTER, "let_frequency": COUNT, "let_relation": RELATION},
    ),
    "language:response_language": Constraint(
        lambda text, language: detect_language(text) == language, {"language": LANGUAGE}
    ),
    "length_constraints:number_sentences": Constraint(
        lambda text, num_sentences, relation: _related(
            len(texts.sentences(text)), relation, num_sentences
        ),
        {"num_sentences": COUNT, "relation": RELATION},
    ),
    "length_constraints:number_paragraphs": Constraint(_paragraphs, {"num_paragraphs": COUNT}),
    "length_constraints:number_words": Constraint(
        lambda text, num_words, relation: _related(
            len(re.findall(r"\w+", text)), relation, num_words
        ),
        {"num_words": COUNT, "relation": RELATION},
    ),
    "length_constraints:nth_paragraph_first_word": Constraint(
        _paragraph_first_word,
        {"num_paragraphs": COUNT, "nth_paragraph": COUNT, "first_word": TEXT},
    ),
    "detectable_content:number_placeholders": Constraint(
        # Without brackets inside, so that a text of brackets takes no quadratic time.
        lambda text, num_placeholders: len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders,
        {"num_placeholders": COUNT},
    ),
    "detectable_content:postscript": Constraint(_postscript, {"postscript_marker": TEXT}),
    "detectable_format:number_bullet_lists": Constraint(_bullets, {"num_bullets": COUNT}),
    "detectable_format:constrained_response": Constraint(
        lambda text: any(answer in text for answer in _ANSWERS)
    ),
    "detectable_format:number_highlighted_sections": Constraint(
        _highlights, {"num_highlights": COUNT}
    ),
    "detectable_format:multiple_sections": Constraint(
        _sections, {"section_spliter": TEXT, "num_sections": COUNT}
    ),
    "detectable_format:json_format": Constraint(lambda text: parse_json(text) is not None),
    "detectable_format:title": Constraint(_title),
    "combination:two_responses": Constraint(_two_responses),
    "combination:repeat_prompt": Constraint(
        lambda text, prompt_to_repeat: (
            text.strip().lower().startswith(prompt_to_repeat.strip().lower())
        ),
        {"prompt_to_repeat": TEXT},
    ),
    "startend:end_checker": Constraint(
        lambda text, end_phrase: (
            text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
        ),
        {"end_phrase": TEXT},
    ),
    "startend:quotation": Constraint(_quoted),
    "change_case:capital_word_frequency": Constraint(
        _capital_words, {"capital_frequency": COUNT, "capital_relation": RELATION}
    ),
    "change_case:english_capital": Constraint(
        lambda text: text.isupper() and detect_language(text) == "en"
    ),
    "change_case:english_lowercase": Constraint(
        lambda text: text.islower() and detect_language(text) == "en"
    ),
    "punctuation:no_comma": Constraint(lambda text: "," not in text),
}
