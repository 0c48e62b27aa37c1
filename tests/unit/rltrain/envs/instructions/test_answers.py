"""Ordinary writing is an answer; what a policy finds out to win without answering is none."""

from __future__ import annotations

import pytest

from rltrain.envs.instructions.answers import FORMS, LONGEST, content, faults, stem

TOPIC = ("winter", "snow", "cold", "ice", "frost", "coat")
PROMPT = "Write one short sentence about winter in all lowercase letters."

ANSWERS = [
    ("short sentence", "Winter is cold."),
    ("short sentence", "snow falls on the roof."),
    ("short sentence", "THE COLD WIND BLOWS ALL NIGHT!"),
    ("short sentence", "I love the snow, and my dog does too."),
    ("short sentence", "Anna and Omar wore warm coats in Norway."),
    ("short sentence", "It's snowing in New York, isn't it?"),
    ("short sentence", "The ice-covered lake was 3 miles wide."),
    ("short sentence", "On a cold, dark, and windy day we stayed in."),
    ("short sentence", "“Put on your coat,” said my mother."),
    ("short sentence", "Snow fell for 12 days in 1978..."),
    ("sentence", "In the frosty morning, the children built a snowman near the old barn."),
    ("sentence", "The sun (when it comes) melts the *snow*."),
    ("sentence", "On a cold day, a man in a coat can buy a cup of tea or a hat."),
    ("two sentences", "Winter is here. The lake is full of ice."),
    ("sentence", "There is love in the snow."),
    ("sentence", "why is the snow so white?"),
    ("headline", "Snow Closes Schools"),
    ("headline", "Cold Days Ahead for the North"),
    ("note", "Please bring a coat. It is cold here.\n\nP.S. The snow is deep."),
    ("lines", "Snow upon the hill\nAnd all the world is still"),
    ("list", "snow, ice, frost"),
    ("list", "- Snow is white.\n- Ice is cold.\n- Frost looks like glass."),
    ("list", "1. Snow\n2. Ice"),
    ("json", '{"text": "Snow is cold."}'),
]

# Form, text, what must be said of it.
NO_ANSWERS = [
    ("short sentence", "", "empty"),
    ("short sentence", " \n\t", "empty"),
    ("short sentence", "?!...", "empty"),
    ("short sentence", "42.", "empty"),
    ("short sentence", "winter", "too few words"),
    ("short sentence", "Winter!", "too few words"),
    ("short sentence", "ADEEPYESTER!", "unknown words"),
    ("short sentence", "ADEEPYESTER!", "too few words"),
    ("short sentence", "winteriscoldandsnowyanditisnice.", "too few words"),
    ("short sentence", "thewinter iscold andthe snowfalls.", "unknown words"),
    ("short sentence", "The winter blorfs the grintle in zarp.", "unknown words"),
    ("short sentence", "The Blorf and the Grintle met Zarp in winter.", "unknown words"),
    ("short sentence", "зима очень холодная.", "unknown words"),
    ("short sentence", "winter winter winter winter.", "repetition"),
    ("short sentence", "snow and snow and snow and snow.", "repetition"),
    ("short sentence", "the snow the snow the snow is cold.", "repetition"),
    ("short sentence", "it is very very cold.", "repetition"),
    ("sentence", "winter is winter as winter was winter in winter.", "repetition"),
    ("short sentence", PROMPT, "copy of the prompt"),
    ("short sentence", PROMPT.lower(), "copy of the prompt"),
    ("short sentence", "write one short sentence about winter.", "copy of the prompt"),
    ("short sentence", "this is a sentence about winter.", "speaks of the request"),
    ("short sentence", "Here is winter in lowercase for you.", "speaks of the request"),
    ("short sentence", "My dog likes to sleep.", "not about the topic"),
    ("short sentence", "The coal was in the office.", "not about the topic"),
    ("short sentence", "Winter is a time of cold and", "unfinished"),
    ("short sentence", "Winter is cold, and the", "unfinished"),
    ("short sentence", "impossible, because of the snow.", "small first letter"),
    ("two sentences", "snow is white. Ice is cold.", "small first letter"),
    ("short sentence", "Winter is the.", "no sentence"),
    ("short sentence", "winter snow cold ice frost.", "no sentence"),
    ("short sentence", "winter, snow, cold, ice, and frost.", "no sentence"),
    ("short sentence", "it is of the to a in winter.", "no sentence"),
    ("short sentence", "The of winter is and cold.", "no sentence"),
    ("short sentence", "Winter is cold. Snow is white.", "sentences"),
    ("two sentences", "Winter is cold and white.", "sentences"),
    ("short sentence", "print('winter is cold.')", "code"),
    ("short sentence", "def winter(): return 'snow is cold.'", "code"),
    ("short sentence", "<b>winter</b> is cold.", "code"),
    ("short sentence", "winter = cold + snow.", "code"),
    ("short sentence", "Winter is cold at https://snow.com.", "code"),
    (
        "short sentence",
        "The snow is cold and " + "so very nice and good and kind " * 5 + ".",
        "too many",
    ),
    ("list", "winter", "too few words"),
    ("list", "snow, snow, snow, snow", "repetition"),
    ("list", "blorf, grintle, zarp", "unknown words"),
    ("json", "Snow is cold.", "empty"),
    ("json", '["Snow is cold."]', "empty"),
    ("json", '{"text": "..."}', "empty"),
    ("json", '{"text": "winter winter winter winter"}', "repetition"),
    ("sentence", "Snow is cold. " * 1000, "too long"),
    ("sentence", "s" * 10_000, "too long"),
]


@pytest.mark.parametrize(("form", "text"), ANSWERS)
def test_ordinary_writing_is_an_answer(form: str, text: str) -> None:
    small = text.islower()  # as where small letters were asked for
    assert faults(content(text, form), form, TOPIC, PROMPT, lowercase=small) == []


@pytest.mark.parametrize(("form", "text", "told"), NO_ANSWERS)
def test_what_is_no_answer(form: str, text: str, told: str) -> None:
    assert any(told in why for why in faults(content(text, form), form, TOPIC, PROMPT))


def test_every_form_has_an_answer() -> None:
    assert {form for form, _ in ANSWERS} == set(FORMS)
    assert all(len(text) < LONGEST for _, text in ANSWERS)


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [
        ("sentence", '"Snow is cold."', "Snow is cold."),
        ("sentence", "[Snow is *very* cold.]", "Snow is very cold."),
        ("sentence", "<<My Title>>\nSnow is cold.", "Snow is cold."),
        ("sentence", "<<My Title>> Snow is cold.", "Snow is cold."),
        ("list", "- Snow\n* Ice\n3. Fog", "Snow\nIce\nFog"),
        ("json", '{"text": "Snow", "n": 1, "more": "Ice"}', "Snow Ice"),
        ("json", "no JSON", ""),
    ],
)
def test_content_is_what_is_said_without_marks(form: str, text: str, said: str) -> None:
    assert content(text, form) == said


def test_a_repeated_request_is_no_part_of_the_answer() -> None:
    text = "write about winter.\n\nSnow is cold."
    assert content(text, "sentence", "Write about winter.") == "Snow is cold."
    assert content(text, "sentence", "Write about snow.") == text


@pytest.mark.parametrize(
    "words",
    [
        ("snow", "snows", "snowy", "snowing", "Snow", "snow's"),
        ("bake", "bakes", "baking", "baked", "baker"),
        ("puppy", "puppies"),
        ("run", "runs", "running", "runner"),
        ("library", "libraries"),
        ("movie", "movies"),
        ("bus", "buses"),
    ],
)
def test_forms_of_a_word_have_one_stem(words: tuple[str, ...]) -> None:
    assert len({stem(word) for word in words}) == 1


@pytest.mark.parametrize(
    ("one", "other"), [("snow", "snowman"), ("cold", "coal"), ("ice", "office"), ("sea", "season")]
)
def test_other_words_have_other_stems(one: str, other: str) -> None:
    assert stem(one) != stem(other)
