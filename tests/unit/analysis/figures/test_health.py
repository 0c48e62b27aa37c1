"""Health: what was logged of the leading configurations, how it went, and what stands out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from analysis.figures import health
from analysis.figures.drawing.theme import Look
from tests.unit.analysis.figures.made import made, svg_of

NAMES = {"gap": "sampling/sampling_logp_difference/mean"}


def trials(ranks: tuple[int, ...] = (1, 8)) -> list[dict[str, Any]]:
    """Two seeds a rank; the higher the rank, the better."""
    return [
        {"rank": rank, "seed": seed, "score": 0.5 + 0.01 * rank}
        for rank in ranks
        for seed in (0, 1)
    ]


def steps(number: int, count: int = 20, **ends: tuple[float, float]) -> list[dict[str, Any]]:
    """Metrics that go straight from one value to another over steps 1 to `count`, each seed's 0.01
    above the last.
    """
    rows: list[dict[str, Any]] = [{"number": number, "step": step + 1} for step in range(count)]
    for name, (low, high) in ends.items():
        for step, row in enumerate(rows):
            row[NAMES.get(name, name)] = (
                low + (high - low) * step / (count - 1) + 0.01 * (number % 2)
            )
    return rows


def healthy() -> list[dict[str, Any]]:
    return [
        row
        for number in range(4)
        for row in steps(number, entropy=(1.0, 0.6), frac_reward_zero_std=(0.1, 0.3))
    ]


def test_lines_are_means_over_seeds_and_what_was_not_logged_has_no_panel() -> None:
    found: health.HealthData = health.data(made(trials(), healthy()))[0].data
    assert found.metrics() == ["entropy", "frac_reward_zero_std"]
    assert list(found.names) == [1, 0]  # rank 8, the better, first
    assert found.names[1] == "configuration 1: rank 8"
    first = found.lines[
        (found.lines["configuration"] == 1) & (found.lines["metric"] == "entropy")
    ].iloc[0]
    assert first[["step", "mean", "low", "high"]].tolist() == pytest.approx([1, 1.005, 1.0, 1.01])


def test_the_reading_says_how_the_best_went() -> None:
    reading = health.data(made(trials(), healthy()))[0].reading
    assert (
        "configuration 1, the best, went: entropy (nats) 0.994 to 0.616 and groups "
        "without signal 11% to 30%" in reading
    )
    assert reading.endswith("Nothing stands out.")


def test_what_stands_out_is_named_with_its_configuration() -> None:
    rows = [
        row
        for number in (0, 1)
        for row in steps(number, entropy=(1.0, 0.0), frac_reward_zero_std=(0.1, 0.9))
    ]
    rows += [
        row for number in (2, 3) for row in steps(number, entropy=(1.0, 0.9), gap=(0.001, 0.05))
    ]
    reading = health.data(made(trials(), rows))[0].reading
    assert "entropy fell to as little as 3% of its first value (configuration 0)" in reading
    assert "up to 88% of the groups gave no signal at the end (configuration 0)" in reading
    assert "sampler and trainer were up to 0.06 nats a token apart (configuration 1)" in reading


def test_four_configurations_lead() -> None:
    ranks = (1, 2, 4, 8, 16, 32)
    rows = [row for number in range(12) for row in steps(number, entropy=(1.0, 0.6))]
    assert list(health.data(made(trials(ranks), rows))[0].data.names) == [5, 4, 3, 2]


def test_a_long_run_is_thinned_and_keeps_its_extremes() -> None:
    rows = [{**row, "number": None} for row in steps(0, 1000, entropy=(1.0, 0.6))]
    rows[500]["entropy"] = 9.0
    lines = health.data(made([{"score": 0.9}], rows, sweep=False))[0].data.lines
    assert 50 <= len(lines) <= 70
    assert lines["high"].max() == 9.0
    assert lines["step"].max() == 1000


def test_a_single_run_has_its_own_health() -> None:
    rows = [{**row, "number": None} for row in steps(0, entropy=(1.0, 0.6))]
    plot = health.data(made([{"score": 0.9}], rows, sweep=False))[0]
    assert plot.data.names == {-1: "the run"}
    assert "the run went: entropy" in plot.reading


def test_nothing_logged_is_no_figure() -> None:
    assert health.data(made(trials())) == []
    assert (
        health.data(
            made(trials(), [row for number in range(4) for row in steps(number, reward=(0.1, 0.9))])
        )
        == []
    )


@pytest.mark.parametrize("look", [Look(), Look(dark=True, narrow=True)], ids=str)
def test_draws_a_panel_for_each_metric_and_formulas_nowhere(look: Look) -> None:
    rows = [
        row for number in range(4) for row in steps(number, entropy=(1.0, 0.6), gap=(1e-7, 1e-3))
    ]
    svg = svg_of(partial(health.draw, health.data(made(trials(), rows))[0].data), look)
    for text in ("entropy (nats)", "sampler gap, mean", "configuration 1"):
        assert text in svg
    assert "mathdefault" not in svg
