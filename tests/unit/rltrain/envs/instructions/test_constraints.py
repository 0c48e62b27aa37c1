"""Each of our kinds of constraint: what keeps it, and what nearly does."""

from __future__ import annotations

from typing import Any

import pytest

from rltrain.envs.instructions.constraints import CONSTRAINTS, OWN, fault

# Kind, arguments, texts that keep it, texts that nearly do.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "change_case:title_case",
        {},
        ["Snow On The Hill", "A Well-known Place.", "The 3 Best Days"],
        ["Snow on the Hill", "snow On The Hill", "Snow On The hill!"],
    ),
    (
        "change_case:capital_word",
        {},
        ["It is VERY cold.", "THE END", "I saw the U.S. team."],
        ["A cat sat here.", "I am cold.", "Very Cold Days", "it is very cold"],
    ),
    (
        "punctuation:exactly_commas",
        {"num_commas": 1},
        ["Yes, it snows.", "It snows, I think."],
        ["It snows.", "Yes, well, it snows.", "It snows; it melts."],
    ),
    (
        "keywords:include",
        {"keywords": ["snow", "ice"]},
        ["Snow and ice.", "ICE! The snow's gone.", "Ice comes before snow"],
        ["Snow alone.", "Snowy ice.", "Snow is nice.", ""],
    ),
    (
        "keywords:color",
        {},
        ["The snow is white.", "RED leaves", "A blue-green sea", "golden"],
        ["The snow is cold.", "A bored man", "reddish", "colorful", ""],
    ),
    (
        "keywords:in_order",
        {"keywords": ["snow", "ice"]},
        ["Snow and ice.", "Ice, then snow, then ice.", "SNOW turns to Ice"],
        ["Ice and snow.", "Snow is nice.", "Only snow."],
    ),
    (
        "keywords:exactly",
        {"keyword": "snow", "frequency": 2},
        ["Snow on snow.", "snow, SNOW and snowman"],
        ["Snow.", "Snow, snow, snow.", "Snow and snowmen."],
    ),
    (
        "keywords:letter_absent",
        {"letter": "e"},
        ["Snow is cold.", "I can do it"],
        ["Snow melts.", "Everybody", "ELK"],
    ),
    (
        "startend:first_word",
        {"first_word": "the"},
        ["The snow", "the snow.", '"The snow" is cold', "**The** snow"],
        ["Then snow", "In the snow", "", "There", "The-snow"],
    ),
    (
        "startend:not_first_word",
        {"first_word": "the"},
        ["Snow is the thing.", "Then it snows.", '"In the snow"'],
        ["The snow", '"the" snow', "THE"],
    ),
    (
        "startend:last_word",
        {"last_word": "snow"},
        ["I like snow", "I like snow.", 'I like "snow!"', "I like SNOW..."],
        ["I like snowmen.", "Snow is nice.", "I like the snow here.", ""],
    ),
    (
        "startend:first_letter",
        {"letter": "s"},
        ["Snow", "so it is", '"Some" of it', "(Sun)"],
        ["The snow", "", "7 suns", "asleep"],
    ),
    (
        "startend:start_phrase",
        {"start_phrase": "I think"},
        ["I think it snows.", '"I think so', "i THINK."],
        ["I thinks", "I know", "Well, I think", "Ithink"],
    ),
    (
        "startend:question_mark",
        {},
        ["Is it cold?", "Is it cold? \n", '"Is it cold?"', "*Cold?*"],
        ["Is it cold", "Is it? No.", "Is it cold?!", ""],
    ),
    (
        "startend:exclamation_mark",
        {},
        ["It is cold!", "Cold!!", '"Cold!" '],
        ["Cold.", "Cold! Yes.", "!Cold", ""],
    ),
    (
        "startend:ellipsis",
        {},
        ["It is cold...", "It is cold…", '"Cold..." '],
        ["It is cold.", "It... is cold.", "Cold..", "Cold...!"],
    ),
    (
        "length:exactly_words",
        {"num_words": 4},
        ["Snow is very cold.", "Don't touch snow-covered hills", "I have 1,000 hats."],
        ["Snow is cold.", "Snow is very, very cold.", ""],
    ),
    (
        "length:at_most_words",
        {"num_words": 3},
        ["Snow is cold.", "Snow.", "Snow-white fur -- soft"],
        ["Snow is very cold.", "one two three four"],
    ),
    (
        "length:at_least_words",
        {"num_words": 3},
        ["Snow is cold.", "Snow is very cold."],
        ["Snow-covered hills", "It's cold.", ""],
    ),
    (
        "length:long_word",
        {"num_letters": 8},
        ["The children see it.", "A snow-hill", "MOUNTAIN!"],
        ["Snow is cold.", "It is 123456789.", "one-two", ""],
    ),
    (
        "length:short_words",
        {"num_letters": 4},
        ["Snow is cold.", "It's 123456 here", ""],
        ["Winter is cold.", "It is snowy", "ice-cold"],
    ),
    (
        "length:exactly_sentences",
        {"num_sentences": 2},
        ["It snows. It melts.", "It snows! \n\n it melts", "Mr. Frost came. He left."],
        ["It snows.", "It snows. It melts. It rains.", "Mr. Frost came."],
    ),
    (
        "length:lines",
        {"num_lines": 2},
        ["Snow falls\nIce melts", "Snow falls\n\nIce melts\n"],
        ["Snow falls, ice melts", "a\nb\nc", ""],
    ),
    (
        "format:numbered_list",
        {"num_items": 2},
        ["1. Snow\n2. Ice", "Here you are:\n\n1) Snow\n2) Ice"],
        ["1. Snow", "1. Snow\n3. Ice", "1. Snow\n2. Ice\n3. Fog", "1. Snow 2. Ice", "1.\n2."],
    ),
    (
        "format:comma_list",
        {"num_items": 3},
        ["snow, ice, fog", "Snow, ice, and fog.", "snow, ice and fog", "snow,ice,hot fog"],
        [
            "snow, ice",
            "snow, ice, fog, rain",
            "snow ice fog",
            "snow, ice, ",
            "snow,\nice,\nfog",
            "Snow is what we see in winter, ice, fog",
        ],
    ),
    (
        "format:json_key",
        {"key": "fact"},
        ['{"fact": "Snow is cold."}', '```json\n{"fact": "Snow", "n": 1}\n```'],
        ['{"Fact": "Snow"}', '{"fact": ""}', '{"fact": 1}', "{'fact': 'Snow'}", '["fact"]', "fact"],
    ),
    (
        "format:brackets",
        {},
        ["[Snow is cold.]", " [Snow is cold] ", "[Snow is cold]."],
        ["Snow [is] cold.", "[Snow] is [cold]", "[]", "[Snow is cold", "(Snow is cold)"],
    ),
    (
        "format:asterisks",
        {},
        ["*Snow is cold.*", "**Snow is cold.**", "*Snow is cold*."],
        ["*Snow* is *cold*", "* Snow is cold", "**", "Snow is *cold*", "****"],
    ),
    (
        "format:parentheses",
        {},
        ["Snow (the white one) is cold.", "(Snow)"],
        ["Snow is cold.", "Snow () is cold", "Snow (is cold", "Snow is cold :)", "[Snow]", "( )"],
    ),
    (
        "content:digits",
        {},
        ["I have 7 hats.", "In 2020", "3.5"],
        ["I have seven hats.", "", "VII"],
    ),
]


@pytest.mark.parametrize(
    ("kind", "kwargs", "text"),
    [(kind, kwargs, text) for kind, kwargs, hits, _ in CASES for text in hits],
)
def test_what_keeps_a_constraint(kind: str, kwargs: dict[str, Any], text: str) -> None:
    assert CONSTRAINTS[kind].holds(text, **kwargs)


@pytest.mark.parametrize(
    ("kind", "kwargs", "text"),
    [(kind, kwargs, text) for kind, kwargs, _, misses in CASES for text in misses],
)
def test_what_nearly_keeps_a_constraint(kind: str, kwargs: dict[str, Any], text: str) -> None:
    assert not CONSTRAINTS[kind].holds(text, **kwargs)


def test_every_kind_has_cases_and_arguments_that_are_accepted() -> None:
    assert {kind for kind, *_ in CASES} == set(OWN)
    for kind, kwargs, _, _ in CASES:
        assert fault(kind, kwargs) is None


@pytest.mark.parametrize(
    ("kind", "kwargs", "told", "allowed"),
    [
        ("keywords:exist", {}, "instruction 'keywords:exist'", "keywords:existence"),
        (["a"], {}, "instruction ['a']", "keywords:include"),
        ("content:digits", None, "kwargs None", "a mapping"),
        ("content:digits", {"n": 1}, "kwargs n of content:digits", "none"),
        ("length:lines", {}, "kwargs none of length:lines", "num_lines"),
        ("length:lines", {"num_lines": 0}, "num_lines=0", "a whole number above 0"),
        ("length:lines", {"num_lines": True}, "num_lines=True", "a whole number above 0"),
        ("length:lines", {"num_lines": "2"}, "num_lines='2'", "a whole number above 0"),
        ("keywords:include", {"keywords": []}, "keywords=[]", "a list of texts"),
        ("keywords:include", {"keywords": ["a", " "]}, "keywords=['a', ' ']", "a list of texts"),
        ("keywords:include", {"keywords": "snow"}, "keywords='snow'", "a list of texts"),
        ("keywords:letter_absent", {"letter": "ee"}, "letter='ee'", "one character"),
        ("startend:last_word", {"last_word": ""}, "last_word=''", "text that is not blank"),
        (
            "length_constraints:number_words",
            {"num_words": 5, "relation": "more than"},
            "relation='more than'",
            "at least or less than",
        ),
        ("language:response_language", {"language": "xx"}, "language='xx'", "one of en"),
    ],
)
def test_faults_say_what_is_wrong_and_what_is_allowed(
    kind: Any, kwargs: Any, told: str, allowed: str
) -> None:
    found = fault(kind, kwargs)
    assert found is not None
    assert told in found[0]
    assert allowed in found[1]


def test_arguments_that_are_none_are_absent() -> None:
    assert fault("length:lines", {"num_lines": 2, "keyword": None}) is None
