from __future__ import annotations

import pytest

from analysis.data import labels
from tests.unit.analysis.synthetic import ALPHA, LR, RANK, TARGETS


@pytest.mark.parametrize(
    ("rate", "text"), [(3e-4, "3e-4"), (1e-5, "1e-5"), (0.00123, "1.2e-3"), (0.1, "1e-1")]
)
def test_learning_rates(rate: float, text: str) -> None:
    assert labels.lr(rate) == text


@pytest.mark.parametrize(
    ("key", "given", "text"),
    [
        (RANK, 8, "8"),
        (RANK, 0, "0 (full)"),
        (ALPHA, 32.0, "32"),
        (LR, 0.0003, "3e-4"),
        ("trainer.critic.optimizer_config.lr", 0.0003, "3e-4"),
        (TARGETS, "mlp", "mlp"),
        (TARGETS, '["q_proj", "v_proj"]', "q_proj, v_proj"),
        (TARGETS, ["q_proj"], "q_proj"),
        (ALPHA, None, "–"),
        (ALPHA, float("nan"), "–"),
    ],
)
def test_values(key: str, given: object, text: str) -> None:
    assert labels.value(key, given) == text


def test_an_unknown_key_is_its_last_part_in_words() -> None:
    assert labels.setting("trainer.train_batch_size", 16) == "train batch size 16"


def test_scores_by_unit() -> None:
    assert labels.score("eval/accuracy", 0.91015) == "0.910"
    assert labels.score("completions/mean_length", 40.123) == "40.12"
    assert labels.score("eval/accuracy", float("nan")) == "–"


def test_differences_have_their_sign() -> None:
    assert [labels.signed("eval/accuracy", given) for given in (0.0123, -0.5)] == [
        "+0.012",
        "-0.500",
    ]
    assert labels.signed("loss", 0.123456) == "+0.1235"
    assert labels.signed("eval/accuracy", -1e-9) == "+0.000"


def test_words_in_a_row() -> None:
    assert labels.listed(["a"]) == "a"
    assert labels.listed(["a", "b", "c"]) == "a, b and c"
    assert (labels.plural(1, "seed"), labels.plural(2, "seed")) == ("1 seed", "2 seeds")
