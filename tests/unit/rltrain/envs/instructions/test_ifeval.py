"""IFEval's 25 constraints score as its authors' code: what keeps each, and what nearly does."""

from __future__ import annotations

from typing import Any

import pytest

from rltrain.envs.instructions.ifeval import IFEVAL, detect_language, parse_json
from tests.security.test_rewards import LONG

# Kind, arguments, texts that keep it, texts that nearly do.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["rock", "sea"]},
        ["Rocks by the SEA.", "Seasons of rock"],
        ["Rocks alone.", "the sea", ""],
    ),
    (
        "keywords:frequency",
        {"keyword": "rock", "frequency": 2, "relation": "at least"},
        ["rock and Rocks", "rock rock rock"],
        ["rock", "rook rook"],
    ),
    (
        "keywords:frequency",
        {"keyword": "rock", "frequency": 2, "relation": "less than"},
        ["rock", "none"],
        ["rock, rocks"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["rock", "sea"]},
        ["Rocks in season.", "nothing"],
        ["A rock.", "the SEA!"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "s", "let_frequency": 3, "let_relation": "at least"},
        ["Sisters", "S, s and s"],
        ["sees", ""],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 1, "let_relation": "less than"},
        ["no mark"],
        ["a mark!"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Der Winter ist kalt und die Kinder spielen im Schnee."],
        ["The winter is cold and the children play in the snow."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One is here. Two is here.", "Yes! No? Maybe."],
        ["One sentence only.", "Mr. Smith is one."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n***\ntwo\n***", "one *** two"],
        ["one\n\ntwo", "one", "one\n***\n\n***\ntwo", "one\n***\ntwo\n***\nthree"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["one two three four", "a well-known thing"],
        ["one two three", ""],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        ["one two three"],
        ["one two three four", "a well-known thing"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Snow"},
        ["one\n\nsnow falls", 'one\n\n"Snow, it falls', "one\n\nSnow's here"],
        ["snow\n\none", "one\nsnow", "one\n\nthe snow", "one\n\nsnow\n\nthree", "one\n\nsnowy"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] and [date]", "[a][b][c]"],
        ["[name]", "name, date", "[name and [date"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Hello.\nP.S. Bye.", "p. s. more", "text p.s. here"],
        ["Hello. PS Bye.", "P.P. S", "ps"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Hello.\nP.P.S. Bye.", "p. p. s more"],
        ["Hello.\nP.S. Bye."],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n* two", "- one\n  - two", "Here:\n*one\n\n-two"],
        ["* one", "* one\n* two\n* three", "**one**\n**two**", "one\ntwo", "1. one\n2. two"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe."],
        ["yes", "my answer is yes.", "My answer is yes"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*", "*one* *two* *three*"],
        ["*one*", "* one\n* two", "** **  **", "*one\ntwo*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 a SECTION2 b"],
        ["SECTION 1 a", "Section 1 a Section 2 b", "SECTION a SECTION b"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": 1}\n```', "[1, 2]", "```\n3\n```"],
        ["{'a': 1}", "a", '{"a": 1} and more', "[" * 5000, ""],
    ),
    (
        "detectable_format:title",
        {},
        ["<<My title>>\ntext", "text <<t>>"],
        ["<My title>", "<<>>", "<< >>", "<<My\ntitle>>", ">>title<<"],
    ),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******one******two"],
        ["one", "one\n******\none", "one******two******three", "one************two", "******one"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say it. "},
        ["Say it. It.", "say it.\nIt."],
        ["It. Say it.", '"Say it." It.', "Say"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "The end."},
        ["It is. The end.", 'It is. the end."', "THE END. "],
        ["The end. Is it?", "The end"],
    ),
    (
        "startend:quotation",
        {},
        ['"It is."', ' "It is." \n'],
        ["It is.", '"It is.', '"', "“It is.”", "'It is.'"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["It IS so COLD.", "I AM here"],
        ["It IS so.", "It Is Cold"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["It IS so.", "it is"],
        ["It IS so COLD."],
    ),
    (
        "change_case:english_capital",
        {},
        ["IT IS VERY COLD IN THE WINTER."],
        ["IT IS VERY COLD IN THE wINTER.", "DER WINTER IST SEHR KALT UND LANG.", "123", ""],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["it is very cold in the winter."],
        ["It is very cold in the winter.", "der winter ist sehr kalt und lang.", "123", ""],
    ),
    (
        "punctuation:no_comma",
        {},
        ["It is cold; it snows.", ""],
        ["It is cold, it snows.", "1,000"],
    ),
]


@pytest.mark.parametrize(
    ("kind", "kwargs", "text"),
    [(kind, kwargs, text) for kind, kwargs, hits, _ in CASES for text in hits],
)
def test_what_keeps_a_constraint(kind: str, kwargs: dict[str, Any], text: str) -> None:
    assert IFEVAL[kind].holds(text, **kwargs)


@pytest.mark.parametrize(
    ("kind", "kwargs", "text"),
    [(kind, kwargs, text) for kind, kwargs, _, misses in CASES for text in misses],
)
def test_what_nearly_keeps_a_constraint(kind: str, kwargs: dict[str, Any], text: str) -> None:
    assert not IFEVAL[kind].holds(text, **kwargs)


def test_there_are_ifevals_25_kinds_and_each_has_cases() -> None:
    assert len(IFEVAL) == 25
    assert {kind for kind, *_ in CASES} == set(IFEVAL)
    for kind, kwargs, _, _ in CASES:
        assert all(IFEVAL[kind].kwargs[name][1](value) for name, value in kwargs.items())
        assert kwargs.keys() == IFEVAL[kind].kwargs.keys()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Bees make honey in the summer.", "en"),
        ("THE CAT IS ASLEEP ON THE CHAIR.", "en"),
        ("Il fait froid en hiver et il neige souvent.", "fr"),
        ("हम आज बाज़ार जा रहे हैं।", "hi"),
        ("今日はとても寒いです。", "ja"),
    ],
)
def test_languages_are_told_apart(text: str, language: str) -> None:
    assert detect_language(text) == language


def test_json_of_any_size_is_read_or_is_none() -> None:
    assert parse_json("9" * 100_000) is None
    assert parse_json('{"a": ' * 50_000) is None
    assert parse_json('```json\n{"a": 1}') == {"a": 1}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "kwargs"), [(kind, kwargs) for kind, kwargs, *_ in CASES])
def test_no_text_takes_forever(kind: str, kwargs: dict[str, Any]) -> None:
    hostile = [*LONG, "[" * 200_000, "*" * 200_000, "<<" * 100_000, "\n" * 200_000, "p. " * 70_000]
    hostile += [
        "a***" * 50_000,
        " \n" * 100_000 + "-",
        "[a\n" * 70_000,
        '"' * 200_000,
        "1. " * 70_000,
    ]
    for text in hostile:
        assert IFEVAL[kind].holds(text, **kwargs) in (True, False)
