"""Test the evaluation of untrained members.

Members that would sample the same completions are evaluated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from harness.config.metrics import without_timings
from harness.config.schema import Recipe
from rltrain.engines.base import Request, Sample
from rltrain.evaluate import evaluate
from rltrain.pack import Pack
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun


def test_untrained_members_share_their_first_evaluation(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack.open(small_recipe(), slots=4)
    others = [
        (),
        (
            "trainer.policy.model.lora.rank=4",
            "trainer.policy.model.lora.alpha=8",
            "trainer.target_modules=mlp",
        ),
        ("seed=5",),
        ("generator.eval_sampling_params.temperature=0.5",),
    ]
    members = [
        pack.add(small_recipe(*overrides), new_run(small_recipe(*overrides), f"run{i}"))
        for i, overrides in enumerate(others)
    ]
    pack.publish(members)
    generate, asked = pack.engine.generate, []

    def watch(requests: Sequence[Request]) -> list[list[Sample]]:
        asked.append(requests[0].member)
        return generate(requests)

    monkeypatch.setattr(pack.engine, "generate", watch)
    rows, scored = zip(*(evaluate(pack, [member])[member] for member in members), strict=True)
    assert list(dict.fromkeys(asked)) == [members[i].name for i in (0, 2, 3)]
    assert without_timings(rows[1]) == without_timings(rows[0])
    # The second member reuses exactly what it would have sampled, to the bit.
    requests = [
        Request(
            problem.prompt_ids,
            1,
            seed,
            members[1].recipe.generator.eval_sampling_params,
            members[1].name,
        )
        for problem, seed in zip(
            members[1].held_out,
            _seeds(members[1].recipe.seed, len(members[1].held_out)),
            strict=True,
        )
    ]
    assert generate(requests) == scored[1].samples
    asked.clear()
    with torch.no_grad():
        next(p for name, p in members[0].policy.parameters.items() if "lora_B" in name).fill_(0.01)
    pack.publish(members[:1])
    _, trained = evaluate(pack, members[:1])[members[0]]
    assert asked
    assert set(asked) == {members[0].name}
    assert trained.samples != scored[0].samples
    pack.close()


def test_a_pack_of_eight_evaluates_with_one_engine_call(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [
        small_recipe(
            f"seed={i}", "trainer.max_steps=2", f"trainer.policy.model.lora.rank={2 ** (i % 4)}"
        )
        for i in range(8)
    ]
    calls: list[set[str | None]] = []
    together, alone = (
        _trained(packs, new_run, calls, monkeypatch)
        for packs in ([recipes], [[r] for r in recipes])
    )
    # The base's evaluation as each member joins, one rollout for each of two steps, and the
    # evaluation after the second step.
    assert [len(members) for members in calls[:11]] == [1] * 8 + [8, 8, 8]
    assert len(calls) == 11 + 8 * 4
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def _trained(
    packs: list[list[Recipe]],
    new_run: MakeRun,
    calls: list[set[str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> list[dict[str, float]]:
    """Return the last rows of runs trained in packs, and record the members of each engine call."""
    last = []
    for number, recipes in enumerate(packs):
        trainer = Trainer(recipes[0], slots=len(recipes))
        pack = trainer.pack
        generate = pack.engine.generate

        def watch(requests: Sequence[Request], generate: Any = generate) -> list[list[Sample]]:
            calls.append({one.member for one in requests})
            return list(generate(requests))

        monkeypatch.setattr(pack.engine, "generate", watch)
        runs = [new_run(r, f"{len(packs)}-{number}-{i}") for i, r in enumerate(recipes)]
        for recipe, run in zip(recipes, runs, strict=True):
            trainer.add(recipe, run)
        for _ in range(2):
            outcomes = list(trainer.step(runs).values())
        reports = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        assert len(reports) == len(runs)
        last += [without_timings(report.metrics) for report in reports]
        trainer.close()
    return last


def _seeds(seed: int, count: int) -> list[int]:
    from rltrain.data.seeding import stream_seed

    return [stream_seed(seed, "eval", index) for index in range(count)]
