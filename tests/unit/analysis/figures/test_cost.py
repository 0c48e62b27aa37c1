"""Cost: a pack's time is counted once, and what packing gained is said as far as it was seen."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from analysis.figures import cost
from analysis.figures.drawing.theme import Look
from tests.unit.analysis.figures.made import made, svg_of


def trials(count: int = 4) -> list[dict[str, Any]]:
    """Two at a time, 100 seconds each."""
    return [
        {
            "rank": number + 1,
            "score": 0.9,
            "started": 1e9 + 100 * (number // 2),
            "ended": 1e9 + 100 * (number // 2 + 1),
        }
        for number in range(count)
    ]


def steps(number: int, members: float, each: float) -> list[dict[str, Any]]:
    """Two steps that `members` took together, `each` seconds a member, and an evaluation of the
    member's own.
    """
    shared = {"timing_s/rollout": 0.5, "timing_s/update": 0.25, "timing_s/sync": 0.05}
    whole = {name: share * each * members for name, share in shared.items()}
    return [
        {"number": number, "step": 0, "timing_s/eval": 3.0},
        *(
            {
                "number": number,
                "step": step,
                **whole,
                "step_time": each * members,
                "perf/members": members,
            }
            for step in (1, 2)
        ),
    ]


PACKED = [
    row for number in range(4) for row in (*steps(number, 2.0, 5.0), *steps(number, 1.0, 10.0)[1:])
]


def test_a_packs_time_is_counted_once_and_an_evaluation_is_ones_own() -> None:
    rows = [row for number in range(4) for row in steps(number, 2.0, 5.0)]
    found: cost.CostData = cost.data(made(trials(), rows))[0].data
    assert found.phases.to_dict() == pytest.approx(
        {"rollout": 20.0, "update": 10.0, "sync": 2.0, "evaluation": 12.0, "other": 8.0}
    )


def test_makespan_and_how_many_ran_at_a_time() -> None:
    plot = cost.data(made(trials(), PACKED))[0]
    assert plot.data.makespan == 200.0
    assert "4 trials took 3 min 20 s, 2.0 at a time on average." in plot.reading


def test_what_packing_gained_is_a_ratio_of_medians() -> None:
    plot = cost.data(made(trials(), PACKED))[0]
    assert plot.data.packing.to_dict("list") == {
        "members": [1, 2],
        "steps": [8, 4],
        "seconds": [10.0, 5.0],
    }
    assert (
        "5 s for each of 2 members, and 10 s for one alone: 2.0 times. This is rough"
        in plot.reading
    )
    together = [row for number in range(4) for row in steps(number, 2.0, 5.0)]
    assert "so the gain of packing is not known" in cost.data(made(trials(), together))[0].reading
    alone = [row for number in range(4) for row in steps(number, 1.0, 5.0)]
    assert "members" not in cost.data(made(trials(), alone))[0].reading


def test_a_trial_without_an_end_is_not_in_the_makespan() -> None:
    rows = [*trials(), {"rank": 64, "score": None, "status": "RUNNING", "started": 1e9}]
    assert len(cost.data(made(rows, PACKED))[0].data.spans) == 4


def test_a_single_run_has_phases_alone() -> None:
    rows = [{**row, "number": None} for row in steps(0, 1.0, 5.0)]
    plot = cost.data(made([{"score": 0.9}], rows, sweep=False))[0]
    assert plot.data.spans.empty
    assert plot.reading == "The trainers' 13 s went 38% into rollout and 23% into evaluation."


def test_no_times_are_no_figure() -> None:
    assert cost.data(made(trials())) == []
    assert cost.data(made(trials(), [{"number": 0, "step": 1, "reward": 0.5}])) == []


def test_many_trials_are_counted_not_drawn_one_by_one() -> None:
    svg = svg_of(partial(cost.draw, cost.data(made(trials(100), PACKED))[0].data), Look())
    assert "trials at a time" in svg
    assert "in the order they began" not in svg


@pytest.mark.parametrize("look", [Look(), Look(dark=True, narrow=True)], ids=str)
def test_draws_trials_phases_and_members(look: Look) -> None:
    rows = [
        *trials(),
        {"rank": 64, "score": None, "status": "FAILED", "started": 1e9, "ended": 1e9 + 50},
    ]
    svg = svg_of(partial(cost.draw, cost.data(made(rows, PACKED))[0].data), look)
    for text in (
        "minutes since the first began",
        "rollout",
        "members that take a step together",
        "not complete",
    ):
        assert text in svg
