"""N members in one pack in one process, for `bench_pack`.

Measured are start-up, steps, memory, and the gain of sharing.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.records import manifest
from harness.records.run_dir import RunDir
from tests.benchmarks.side_by_side import memory_gb, middle, peak_memory_gb, worker_files

SAMPLES = 8  # of each prompt
MAKESPAN_PARTS = ("rollout", "rest")


def main() -> None:
    """Train some members for some steps and write the result.

    It has the seconds of each part, memory, and shares of the peak.
    """
    spec, result = worker_files()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        result.write_text(json.dumps(Measurement(spec, Path(scratch)).result()))


class Measurement:
    """A pack of mixed members, and its timings."""

    def __init__(self, spec: dict[str, Any], scratch: Path) -> None:
        from rltrain.trainer import Trainer

        self._spec = spec
        chosen = [self._recipe(number) for number in range(spec["members"])]
        self._trainer = Trainer(chosen[0], slots=spec["members"])
        self._pack = self._trainer.pack
        self._memory = [memory_gb()]
        for number, recipe in enumerate(chosen):
            run_dir = RunDir(scratch / str(number))
            run_dir.create(
                recipes.to_yaml(recipe),
                manifest.build(recipe, kind="run", name="run", source="benchmark"),
            )
            self._trainer.add(recipe, run_dir)
        self._memory.append(memory_gb())

    def result(self) -> dict[str, Any]:
        """Return the result, with the gain of sharing if the spec asks for it."""
        from rltrain.models.loading import adapter_parameters

        began = time.time()
        steps = [self._step(list(range(self._spec["members"]))) for _ in range(self._spec["steps"])]
        ended = time.time()
        adapters = [
            p
            for m in self._pack.members
            for p in adapter_parameters(self._pack.model, m.name).values()
        ]
        content: dict[str, Any] = {
            "startup_s": round(began - self._spec["launched"], 3),
            "makespan_s": round(ended - self._spec["launched"], 3),
            "steps": steps,
            "memory_open_gb": self._memory[0],
            "memory_joined_gb": self._memory[1],
            "memory_peak_gb": peak_memory_gb(),
            "peak_flops": self._pack.peak_flops,
            # Weights, their gradients, and two moments of Adam.
            "adapter_state_gb": sum(4 * p.numel() * p.element_size() for p in adapters) / 2**30,
            "base_gb": self._pack.active_parameters * 4 / 2**30,
        }
        if self._spec.get("alternate"):
            content["gains"] = self._gains(self._spec["alternate"])
        self._trainer.close()
        return content

    def _gains(self, repeats: int) -> dict[str, float | None]:
        """Return g and c.

        Each is seconds a token of steps of one member at a time, over those of steps of all
        members.
        """
        everyone = range(self._spec["members"])
        ratios: dict[str, list[float]] = {part: [] for part in MAKESPAN_PARTS}
        for _ in range(repeats):
            together = self._step(list(everyone))
            apart = [self._step([number]) for number in everyone]
            tokens = sum(step["tokens"] for step in apart)
            for part in MAKESPAN_PARTS:
                alone = sum(step[part] for step in apart) / tokens
                ratios[part].append(alone / (together[part] / together["tokens"]))
        return {"g": middle(ratios["rollout"]), "c": middle(ratios["rest"])}

    def _step(self, indices: list[int]) -> dict[str, float]:
        """Take one step of some members.

        Returns seconds of the rollout and of the rest, tokens, and shares of the peak.
        """
        members = [self._pack.members[index] for index in indices]
        start = time.perf_counter()
        outcomes = self._trainer.step([member.run_dir for member in members])
        seconds = time.perf_counter() - start
        rows = {}
        for member, outcome in zip(members, outcomes.values(), strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            rows[member] = outcome.metrics
        row = rows[members[0]]
        rollout, update = row["timing_s/rollout"], row["timing_s/update"]
        flops = (
            2
            * self._pack.active_parameters
            * sum(computed_tokens(member, rows[member]) for member in members)
        )
        return {
            "seconds": round(seconds, 5),
            "rollout": round(rollout, 5),
            "rest": round(seconds - rollout, 5),
            "update": round(update, 5),
            "tokens": sum(
                member_completions(m) * rows[m]["completions/mean_length"] for m in members
            ),
            # One forward pass; the update also has one backward pass. LoRA's products are not
            # counted.
            "rollout_share_of_peak": round(flops / rollout / self._pack.peak_flops, 4),
            "update_share_of_peak": round(2 * flops / update / self._pack.peak_flops, 4),
        }

    def _recipe(self, number: int) -> Any:
        """Return the quickstart's recipe for a member.

        Rank, alpha, targets and learning rate are the quickstart's, the seed is new.
        """
        prompts = self._spec["completions"] // SAMPLES
        recipe = recipes.load(
            "quickstart",
            [
                f"seed={number}",
                f"generator.backend={self._spec['engine']}",
                "generator.max_num_seqs=512",
                f"trainer.train_batch_size={prompts}",
                f"trainer.policy_mini_batch_size={prompts}",
                "expect={}",
                "trainer.max_steps=10000",
                "trainer.eval_before_train=false",
                "trainer.eval_interval=0",
                "trainer.ckpt_interval=0",
                f"trainer.num_threads={self._spec['threads']}",
                *self._spec.get("overrides", []),
            ],
        )
        recipe.sweep = None
        return recipe


def member_completions(member: Any) -> int:
    """Return the completions of one of a member's steps."""
    return int(member.recipe.trainer.train_batch_size) * SAMPLES


def computed_tokens(member: Any, row: dict[str, float]) -> float:
    """Return the tokens that a step computes: completions, and each prompt once."""
    completions = member_completions(member) * row["completions/mean_length"]
    return completions + (member.step_tokens - completions) / SAMPLES


if __name__ == "__main__":
    main()
