"""The train loop: runs are added, trained a step at a time, and removed."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from harness.config.metrics import ACCURACY
from harness.config.schema import Recipe
from harness.config.shapes import flops_per_token
from harness.core.errors import UserError
from harness.records.run_dir import RunDir, Status
from rltrain import checkpoint
from rltrain.distributed.process_group import Ranks
from rltrain.evaluate import Evaluation, evaluate
from rltrain.member import Member
from rltrain.micro_batch_size import settle_micro_batch_size
from rltrain.models.loading import adapter_statistics
from rltrain.pack import Pack
from rltrain.report import StepReport
from rltrain.step import accumulate_gradients, train_step


class Trainer:
    """Trains runs in this process, up to `slots` of them together as a pack.

    A run alone is trained by a trainer with one slot. Each rank of a worker group holds a trainer,
    and the pack server of a sweep puts a queue in front of one.

    With `ranks` every rank makes the same calls in the same order; the first one alone writes.
    Without, a run that fails does not disturb the others: `step` returns its error.
    """

    def __init__(self, recipe: Recipe, *, slots: int = 1, ranks: Ranks | None = None) -> None:
        """Load the base model and start the engine that a recipe asks for."""
        self.pack = Pack.open(recipe, slots=slots, ranks=ranks)
        # A rank that continues alone would wait for the others.
        self.pack.isolates_failures = ranks is None
        self._members: dict[Path, Member] = {}
        self._closed = False

    @property
    def isolates_failures(self) -> bool:
        """Whether a run's error leaves the others as they are."""
        return self.pack.isolates_failures

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, recipe: Recipe, run_dir: RunDir) -> list[StepReport]:
        """Add a run: resume it, or evaluate its base.

        Returns:
            The report of the base's evaluation, if the recipe asks for one, or that of the last
            step, where an earlier process was killed after it.

        Raises:
            UserError: the checkpoint does not fit the recipe, or no step is left to train.
        """
        pack = self.pack
        member = self._members[run_dir.path] = pack.add(recipe, run_dir)
        pack.ranks.once(lambda: run_dir.move_to(Status.RUNNING))
        member.seconds_before = run_dir.read_manifest().get("seconds", 0.0)
        settle_micro_batch_size(pack, member, accumulate_gradients)
        self._resume(member)
        if member.done:
            checkpoint.restore_final_adapter(pack, member)
            row = member.metrics.rows()[-1]
            self._finish(member)
            return [StepReport(member.step, member.total_steps, row)]
        if member.step > 0 or not recipe.trainer.eval_before_train:
            return []
        evaluations = evaluate(pack, [member])
        if member in pack.failures:
            raise pack.failures.pop(member)
        return [self._record(member, {}, evaluations[member])]

    def step(self, run_dirs: Sequence[RunDir]) -> dict[Path, StepReport | Exception]:
        """Take one training step of these runs, and what is due after it.

        Evaluations that are due for several runs share an engine call.

        Returns:
            By the run directory's path, the report of a run's step, or the error that failed it.
        """
        pack = self.pack
        members = [self._members[run_dir.path] for run_dir in run_dirs]
        start = time.perf_counter()
        rows = train_step(pack, members)
        seconds = time.perf_counter() - start
        for member, row in rows.items():
            member.step += 1
            for model in member.trained_models:
                model.scheduler.step()
            row |= {"step_time": seconds, "num_dropped_prompts": member.num_dropped}
            row |= performance(pack, member, row)
        due = [member for member in rows if is_due(member, member.recipe.trainer.eval_interval)]
        evaluations = evaluate(pack, due) if due else {}
        reports = {
            member: pack.isolate(member, self._record, member, row, evaluations.get(member))
            for member, row in rows.items()
        }
        failures, pack.failures = pack.failures, {}
        outcomes: dict[Path, StepReport | Exception] = {}
        for member in members:
            report = reports.get(member)
            outcomes[member.run_dir.path] = failures[member] if report is None else report
        return outcomes

    def remove(self, run_dir: RunDir) -> None:
        """Remove a run, if it is there; its slot is free."""
        member = self._members.pop(run_dir.path, None)
        if member is not None:
            self.pack.remove(member)

    def close(self) -> None:
        """Remove all runs and release the memory of engine and model."""
        self._members = {}
        if not self._closed:
            self._closed = True
            self.pack.close()

    def _resume(self, member: Member) -> None:
        """Load the checkpoint that the recipe names; bring log and engine to the same step."""
        ranks = self.pack.ranks
        path = ranks.once(lambda: checkpoint.find(member))
        if path is not None:
            checkpoint.load(member, path)
        ranks.once(lambda: member.metrics.truncate(member.step if path is not None else -1))
        if member.done and not member.metrics.rows():
            raise UserError(
                "the checkpoint is at the run's last step already: nothing is left to train",
                got=f"{path}: step {member.step}, {member.total_steps} steps in all",
                fix=f"trainer.max_steps={member.step + 1} or more",
            )
        self.pack.publish_member(member)
        self.pack.take_seconds()

    def _record(
        self, member: Member, row: dict[str, float], evaluation: Evaluation | None
    ) -> StepReport:
        """Write what a step leaves: evaluation and adapter, the log's row, checkpoint, result."""
        pack, trainer = self.pack, member.recipe.trainer
        if evaluation is not None:
            metrics, rollout = evaluation
            row = row | metrics
            if pack.ranks.first:
                path = member.run_dir.eval_samples(member.step)
                limit = trainer.samples_per_dump
                rollout.save(path, step=member.step, phase="eval", limit=limit)
            if member.step > 0:
                checkpoint.keep_adapter(pack, member, row[ACCURACY])
            if trainer.policy.model.lora.rank > 0:
                row |= adapter_statistics(pack.model, member.name)
        row = {"step": member.step, **row}
        if pack.ranks.first:
            member.metrics.append(row)
        checkpoint_due = member.step > 0 and is_due(member, trainer.ckpt_interval)
        # The checkpoint comes after the row. A kill between them repeats the step; in the other
        # order it would lose the row.
        if checkpoint_due:
            with pack.span("checkpoint"):
                checkpoint.save(member, pack.ranks)
        if member.done:
            self._finish(member)
        elif pack.ranks.first and (evaluation is not None or checkpoint_due):
            member.run_dir.update(seconds=member.seconds())
        return StepReport(member.step, member.total_steps, row)

    def _finish(self, member: Member) -> None:
        """Move the run to COMPLETE, with the last evaluation, the base's and the best as result."""
        if not self.pack.ranks.first:
            return
        rows = [row for row in member.metrics.rows() if ACCURACY in row]
        first, last, seconds = rows[0], rows[-1], member.seconds()
        result = {
            "step": member.step,
            "metrics": {
                name: value
                for name, value in last.items()
                if name.startswith("eval/") and math.isfinite(value)
            },
            "base": {ACCURACY: first[ACCURACY]} if first["step"] == 0 else None,
            "best": member.best,
            "seconds": seconds,
        }
        member.run_dir.move_to(Status.COMPLETE, seconds=seconds, result=result)


def is_due(member: Member, interval: int) -> bool:
    """Return whether what happens every `interval` steps is due; it always is at the last step.

    An interval of 0 means at the last step only.
    """
    return member.done or (interval > 0 and member.step % interval == 0)


def performance(pack: Pack, member: Member, row: dict[str, float]) -> dict[str, float]:
    """Return tokens per second of a step, model-FLOPs utilisation and peak memory (GiB)."""
    recipe = member.recipe
    samples = recipe.trainer.train_batch_size * recipe.generator.n_samples_per_prompt
    samples *= int(row.get("num_sampled_batches", 1))
    flops = flops_per_token(recipe, pack.active_parameters) * member.step_tokens
    if pack.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        # In KiB on Linux, in bytes on macOS.
        unit = 2**30 if sys.platform == "darwin" else 2**20
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {
        "perf/tokens_per_second": samples * row["completions/mean_length"] / row["step_time"],
        "perf/mfu": flops / (row["step_time"] * pack.peak_flops),
        "perf/max_memory_gb": memory,
    }
