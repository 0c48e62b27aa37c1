"""Words, sentences and lines are counted as a person counts them."""

from __future__ import annotations

import pytest

from rltrain.envs.instructions.text import contains, lines, sentences, words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("-- ...", 0),
        ("Snow falls.", 2),
        ("Snow-covered hills don't melt.", 4),
        ("It's 1,000 or 3.5 miles at 5 a.m.", 8),
        ("one,two", 2),
        ("cold.Snow", 2),
        ("*bold* and _thin_", 3),
        ("salt & pepper", 2),
        ("un mañana más", 3),
    ],
)
def test_words(text: str, count: int) -> None:
    assert len(words(text)) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("!!! ...", 0),
        ("Snow falls", 1),
        ("Snow falls.", 1),
        ("Snow falls. It is cold!", 2),
        ("snow falls. it is cold.", 2),
        ("Is it cold? Yes! Very.", 3),
        ('He said "It is cold." Then he left.', 2),
        ('"It is cold," he said.', 1),
        ('"Is it cold?" he asked.', 1),
        ("Mr. Frost lives on St. John street.", 1),
        ("J. Smith and U.S. Grant met at 5 p.m. in town.", 1),
        ("Some animals, e.g. foxes, sleep.", 1),
        ("It costs 3.50 dollars.", 1),
        ("It was in 2020. Then it ended.", 2),
        ("1. Snow is cold. 2. Ice is too.", 2),
        ("Well... maybe it snows.", 1),
        ("Well... It snows.", 2),
        ("(It snows.) [It melts.]", 2),
        ("You and I. Then we left.", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def test_lines_are_those_that_are_not_blank() -> None:
    assert lines(" one \n\n\t\ntwo") == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "phrase", "count"),
    [
        ("Snow, snow and SNOW!", "snow", 3),
        ("snowy snowman", "snow", 0),
        ("winter's snow-covered hill", "snow", 1),
        ("an ice cream and ice", "ice cream", 1),
        ("a.b", "a.b", 1),
        ("axb", "a.b", 0),
    ],
)
def test_whole_words_are_counted(text: str, phrase: str, count: int) -> None:
    assert contains(text, phrase) == count
