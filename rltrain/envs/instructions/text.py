"""Words, sentences and lines of a text, as a person counts them."""

from __future__ import annotations

import re

CLOSERS = "\"'”’»)]}*_"
"""Characters that may follow the last punctuation mark of a sentence."""

_WORD = re.compile(
    r"[^\W_]+(?:(?:['’&-]|(?<=\d)[.,](?=\d)|(?<=\b[A-Za-z])\.(?=[A-Za-z]\b))[^\W_]+)*"
)
_ABBREVIATION = re.compile(
    r"(?:mrs?|ms|dr|prof|st|[js]r|vs|e\.g|i\.e|u\.[sk]|[ap]\.m|p\.s|(?-i:[A-HJ-Z]))\.",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """Return the words in order; `snow-covered`, `don't`, `1,000` and `a.m` are one word each."""
    return _WORD.findall(text)


def lines(text: str) -> list[str]:
    """Return the lines that are not blank, without the spaces around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def sentences(text: str) -> list[str]:
    """Return the sentences in order, the last one whether or not it has ended.

    A sentence ends after `.`, `!`, `?` or `…` and closing quotes or brackets, before a space. An
    abbreviation, an initial, the number of a list item, and a quotation or dots before a small
    letter end none. Line breaks do not matter. nltk's Punkt model, which IFEval uses, has learned
    more abbreviations and ends no sentence at a point before a small letter; this one has to read
    texts that are in small letters throughout.
    """
    found: list[str] = []
    current: list[str] = []
    tokens = text.split()
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False):
        current.append(token)
        bare = token.rstrip(CLOSERS)
        goes_on = following[:1].islower() and (bare != token or bare.endswith(("...", "…")))
        if goes_on or not bare.endswith((".", "!", "?", "…")):
            continue
        numbers_an_item = len(current) == 1 and bare[:-1].isdigit()
        if following and (numbers_an_item or _ABBREVIATION.fullmatch(bare)):
            continue
        found.append(" ".join(current))
        current = []
    if current:
        found.append(" ".join(current))
    return [sentence for sentence in found if _WORD.search(sentence)]


def contains(text: str, phrase: str) -> int:
    """Return how often a word or phrase is in a text, as whole words and in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))
