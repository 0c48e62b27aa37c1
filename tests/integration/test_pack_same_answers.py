"""Test that a member of a pack computes what the run alone computes.

With the same samples, losses, gradients and weights are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from harness.config import metrics
from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.algorithms.policy import Policy
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.distributed.placement import pack_key, shares_base
from rltrain.engines.base import Request, Sample
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]

STEPS = 3
LORA, ALGORITHM = "trainer.policy.model.lora", "trainer.algorithm"
LR = "trainer.policy.optimizer_config.lr"
MEMBERS: list[list[str]] = [
    [f"{LORA}.rank=8", f"{LORA}.alpha=32", f"{LR}=1e-2"],
    [f"{LORA}.rank=8", f"{LORA}.alpha=32", f"{LR}=1e-2", "trainer.max_tokens_per_microbatch=150"],
    [
        f"{LORA}.rank=1",
        f"{LORA}.alpha=8",
        f"{LR}=3e-2",
        "trainer.target_modules=attention",
        "seed=3",
    ],
    [
        f"{LORA}.rank=4",
        "trainer.target_modules=mlp",
        f"{ALGORITHM}.policy_loss_type=gspo",
        f"{ALGORITHM}.tis=token",
        "trainer.policy_mini_batch_size=4",
        "trainer.policy.optimizer_config.scheduler=linear",
        "trainer.max_steps=9",
    ],
    [
        f"{LORA}.rank=16",
        f"{ALGORITHM}.use_kl_loss=true",
        f"{ALGORITHM}.kl_loss_coef=0.1",
        "trainer.train_batch_size=6",
        "trainer.exclude_modules=.*down_proj",
        "generator.n_samples_per_prompt=3",
        "trainer.update_epochs_per_batch=2",
    ],
    [
        f"{LORA}.rank=2",
        f"{ALGORITHM}.advantage_estimator=gae",
        "trainer.critic.optimizer_config.lr=1e-2",
    ],
]

Key = tuple[int, int, tuple[int, ...]]


class Replay:
    """Records the samples of each member's requests, and replays them from then on."""

    def __init__(self) -> None:
        self.samples: dict[Key, list[Sample]] = {}
        self.replayed = 0

    def watch(self, pack: Pack, labels: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        """Record or replay the samples of a pack's engine.

        `labels` maps the pack's member names to indices of MEMBERS.
        """
        generate = pack.engine.generate

        def replaying(requests: Sequence[Request]) -> list[list[Sample]]:
            keys = [
                (labels[str(one.member)], one.seed, tuple(one.prompt_token_ids)) for one in requests
            ]
            new = [one for one, key in zip(requests, keys, strict=True) if key not in self.samples]
            made = iter(generate(new) if new else [])
            self.replayed += len(requests) - len(new)
            for key in keys:
                if key not in self.samples:
                    self.samples[key] = next(made)
            return [self.samples[key] for key in keys]

        monkeypatch.setattr(pack.engine, "generate", replaying)


def _train(pack: Pack, members: Sequence[Member]) -> list[list[dict[str, float]]]:
    """Return rows of each member's steps without timings.

    The last row also has the weights and the optimizer's moments.
    """
    for member in members:
        pack.publish_member(member)
    rows: list[list[dict[str, float]]] = [[] for _ in members]
    for _ in range(STEPS):
        step_rows = train_step(pack, list(members))
        for member_rows, member in zip(rows, members, strict=True):
            member_rows.append(metrics.without_timings(step_rows[member]))
            member.step += 1
            for model in member.trained_models:
                model.scheduler.step()
    return rows


def _state(member: Member) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield a member's weights, and the means of its gradients and of their squares."""
    for model in member.trained_models:
        for name, parameter in model.parameters.items():
            yield name.replace(f".{model.adapter}.", "."), parameter.detach()
            for kind, value in model.optimizer.state[parameter].items():
                yield f"{name.replace(f'.{model.adapter}.', '.')}/{kind}", value


def test_members_of_a_pack_learn_what_a_run_alone_learns(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_room = "generator.max_lora_rank=16"
    chosen = [small_recipe(lora_room, *overrides) for overrides in MEMBERS]
    replay, alone, rows = Replay(), [], []
    for label, recipe in enumerate(chosen):
        pack = Pack.open(recipe)
        member = pack.add(recipe, new_run(recipe, f"alone{label}"))
        replay.watch(pack, {member.name: label}, monkeypatch)
        rows += _train(pack, [member])
        alone.append(dict(_state(member)))
        pack.close()
    assert replay.replayed == 0
    pack = Pack.open(chosen[0], slots=len(chosen))
    assert all(shares_base(recipe) and pack_key(recipe) == pack_key(chosen[0]) for recipe in chosen)
    # Joined in another order, so that names and slots differ.
    order = [4, 0, 5, 2, 1, 3]
    members = [pack.add(chosen[label], new_run(chosen[label], f"packed{label}")) for label in order]
    replay.watch(
        pack,
        {member.name: label for member, label in zip(members, order, strict=True)},
        monkeypatch,
    )
    made = len(replay.samples)
    together = _train(pack, members)
    assert len(replay.samples) == made == replay.replayed
    ignored = {"perf/members"}
    for member, member_rows, label in zip(members, together, order, strict=True):
        for step in range(STEPS):
            expected: dict[str, Any] = {
                k: v for k, v in rows[label][step].items() if k not in ignored
            }
            assert {k: v for k, v in member_rows[step].items() if k not in ignored} == expected, (
                label,
                step,
            )
        state = dict(_state(member))
        assert state.keys() == alone[label].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, alone[label][name]), (label, name)
        assert any(
            tensor.any() for name, tensor in state.items() if "lora_B" in name and "/" not in name
        )
    pack.close()


def test_skipping_unneeded_backward_passes_changes_no_result(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, results = Replay(), []
    for index in range(2):
        recipe = small_recipe("trainer.policy_mini_batch_size=4")
        pack = Pack.open(recipe)
        member = pack.add(recipe, new_run(recipe, f"run{index}"))
        replay.watch(pack, {member.name: 0}, monkeypatch)
        results.append((_train(pack, [member]), dict(_state(member))))
        pack.close()
        monkeypatch.setattr(Policy, "needs_grad", TrainedModel.needs_grad)
    ((one,), ours), ((other,), theirs) = results
    # Some groups were all right or all wrong, and some were mixed.
    assert any(0 < row["frac_reward_zero_std"] < 1 for row in one)
    for row, same in zip(one, other, strict=True):
        for name in (
            "loss",
            "entropy",
            "clip_ratio/region_mean",
            "sampling/sampling_logp_difference/mean",
        ):
            assert row[name] == pytest.approx(same[name], rel=1e-3, abs=1e-6), name
    for name, tensor in theirs.items():
        if name.endswith("/exp_avg"):
            assert (ours[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
