"""A run from resume to its last step: step, log, evaluate, checkpoint; a report after
every step.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.records.files import damage, whole_folder
from harness.records.run_dir import RunDir, Status
from rltrain import checkpoint
from rltrain.distributed.placement import dtype_of, needs_workers
from rltrain.distributed.process import exits_are_failures
from rltrain.evaluate import evaluate
from rltrain.member import Member
from rltrain.models.flops import step_flops
from rltrain.models.loading import adapter_statistics
from rltrain.pack import Pack
from rltrain.passes import settle_passes
from rltrain.report import Report
from rltrain.scored import Rollout
from rltrain.step import train_step
from rltrain.sync.disk import write_adapter
from rltrain.sync.merge import merged_weights

ACCURACY = "eval/accuracy"


def run(recipe: Recipe, run_dir: RunDir) -> Iterator[Report]:
    """Train a run to its end, in this process or on a worker group as its placement says; a report
    after every step.

    Any failure is recorded.
    """
    if needs_workers(recipe):
        from rltrain.worker_group import run_on_workers

        yield from run_on_workers(recipe, run_dir)
        return
    with recorded_failure(run_dir):
        pack = Pack.open(recipe)
    try:
        with recorded_failure(run_dir):
            member = pack.join(recipe, run_dir)
        yield from train(pack, member)
    finally:
        pack.close()


def train(pack: Pack, member: Member) -> Generator[Report]:
    """`training`, with any failure recorded as the run's status. A consumer that stops early leaves
    it RUNNING.
    """
    with recorded_failure(member.run_dir):
        yield from training(pack, member)


def training(pack: Pack, member: Member) -> Generator[Report]:
    """Train a member to its end, from its last checkpoint if it has one; yields a report after
    every step.
    """
    course = Course(pack, member)
    yield from course.begin()
    while not course.done:
        yield course.take(advance(pack, [member])[member])


@dataclass(frozen=True, slots=True)
class Step:
    """What came of a member's step: its metrics and, where an evaluation was due, the samples of
    that.
    """

    row: dict[str, float]
    scored: Rollout | None


def advance(pack: Pack, members: Sequence[Member]) -> dict[Member, Step]:
    """One step of these members, and together the evaluations that are due; those that fail are
    missing.
    """
    start = time.perf_counter()
    rows = train_step(pack, members)
    seconds = time.perf_counter() - start
    for member, row in rows.items():
        member.step += 1
        for learner in member.learners:
            learner.scheduler.step()
        row |= {"step_time": seconds, "num_dropped_prompts": member.num_dropped}
        row |= performance(pack, member, row)
    waiting = [member for member in rows if due(member, member.recipe.trainer.eval_interval)]
    evaluated = evaluate(pack, waiting) if waiting else {}
    steps = {}
    for member, row in rows.items():
        metrics, scored = evaluated.get(member, ({}, None))
        if member not in pack.failures:
            steps[member] = Step(row | metrics, scored)
    return steps


class Course:
    """A member's way through its run: everything but the training steps themselves, which a pack's
    members share.

    The run's status goes to RUNNING, and to COMPLETE at the end. The first rank alone writes.
    """

    def __init__(self, pack: Pack, member: Member) -> None:
        self._pack = pack
        self._member = member
        self._start = time.perf_counter()
        self._before = 0.0

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self._member.step >= self._member.total_steps

    def begin(self) -> Iterator[Report]:
        """Resume; then the base's evaluation, or the last row of a run that was killed after its
        last step.
        """
        pack, member = self._pack, self._member
        pack.ranks.once(lambda: member.run_dir.move_to(Status.RUNNING))
        self._before = member.run_dir.read_manifest().get("seconds", 0.0)
        settle_passes(pack, member)
        resume(pack, member)
        if self.done:
            restore_final(pack, member)
            yield self._record(Report(member.step, member.total_steps, member.metrics.rows()[-1]))
        if member.step == 0 and member.recipe.trainer.eval_before_train:
            evaluated = evaluate(pack, [member])
            if member in pack.failures:
                raise pack.failures.pop(member)
            row, scored = evaluated[member]
            yield self._record(log(pack, member, row | keep_evaluation(pack, member, row, scored)))

    def take(self, step: Step) -> Report:
        """A training step was made: what is due after it, and the report."""
        pack, member, row = self._pack, self._member, step.row
        if step.scored is not None:
            row = row | keep_evaluation(pack, member, row, step.scored)
        report = log(pack, member, row)
        # Logged before it is saved: a kill in between repeats the step, the other way round it
        # would lose the row.
        if due(member, member.recipe.trainer.ckpt_interval):
            with pack.timer.span("checkpoint"):
                checkpoint.save(member, pack.ranks)
        return self._record(report)

    def _record(self, report: Report) -> Report:
        """How long the run has taken so far; its end where this was the last step."""
        if self._pack.ranks.first:
            self._member.run_dir.update(seconds=self._before + time.perf_counter() - self._start)
            if report.done:
                finish(self._member)
        return report


def resume(pack: Pack, member: Member) -> None:
    """Load the checkpoint the recipe names and bring log and engine to the same step."""
    path = pack.ranks.once(lambda: checkpoint.find(member))
    if path is not None:
        checkpoint.load(member, path)
    pack.ranks.once(lambda: member.metrics.truncate(member.step if path is not None else -1))
    if member.step >= member.total_steps and not member.metrics.rows():
        raise UserError(
            "the checkpoint is at the run's last step already: nothing is left to train",
            got=f"{path}: step {member.step}, {member.total_steps} steps in all",
            fix=f"trainer.max_steps={member.step + 1} or more",
        )
    pack.publish_member(member)
    pack.timer.take()


def due(member: Member, interval: int) -> bool:
    """Whether something done every `interval` steps is due now; always at the last step, never
    before it at 0.
    """
    return member.step == member.total_steps or (interval > 0 and member.step % interval == 0)


def log(pack: Pack, member: Member, row: dict[str, float]) -> Report:
    """Write a step's row to `metrics.jsonl`, its step first."""
    row = {"step": member.step, **row}
    if pack.ranks.first:
        member.metrics.append(row)
    return Report(member.step, member.total_steps, row)


def keep_evaluation(
    pack: Pack, member: Member, row: dict[str, float], scored: Rollout
) -> dict[str, float]:
    """Keep samples of an evaluation, and the adapter when it is the best so far; metrics of the
    adapter.
    """
    trainer = member.recipe.trainer
    if pack.ranks.first:
        path = member.run_dir.eval_samples(member.step)
        scored.save(path, step=member.step, phase="eval", limit=trainer.samples_per_dump)
    if member.step > 0:
        keep_adapter(pack, member, row[ACCURACY])
    return adapter_statistics(pack.model, member.name) if trainer.policy.model.lora.rank > 0 else {}


def keep_adapter(pack: Pack, member: Member, accuracy: float) -> None:
    """Write `adapter/best` when the score is the best so far, and `adapter/final` at the
    last step.
    """
    folders = []
    if member.best is None or accuracy > member.best[ACCURACY]:
        member.best = {"step": member.step, ACCURACY: accuracy}
        folders.append("best")
    if member.step == member.total_steps:
        folders.append("final")
    for folder in folders:
        write_policy(pack, member, member.run_dir.adapter / folder)


def restore_final(pack: Pack, member: Member) -> None:
    """Write `adapter/final` again where a run killed after its last checkpoint finds it damaged."""
    run_dir, final = member.run_dir, member.run_dir.adapter / "final"
    why = pack.ranks.once(lambda: damage(final))
    if why is None:
        return
    if pack.ranks.first and final.exists():
        run_dir.set_aside(final, why)
    write_policy(pack, member, final)


def write_policy(pack: Pack, member: Member, folder: Path) -> None:
    """The adapter in PEFT's format; the whole model in transformers' when all weights were
    trained.
    """
    if member.recipe.trainer.policy.model.lora.rank > 0:
        write_adapter(pack.model, member.name, folder, pack.ranks.once)
        return
    dtype = dtype_of(member.recipe)
    whole = {name: tensor.to(dtype) for name, tensor in merged_weights(pack.model, member.name)}

    def write() -> None:
        with whole_folder(folder) as new:
            pack.model.save_pretrained(new, state_dict=whole)
            pack.tokenizer.save_pretrained(new)

    pack.ranks.once(write)


def performance(pack: Pack, member: Member, row: dict[str, float]) -> dict[str, float]:
    """Tokens a second over the step, model-FLOPs utilisation and peak memory."""
    recipe = member.recipe
    samples = recipe.trainer.train_batch_size * recipe.generator.n_samples_per_prompt
    samples *= int(row.get("num_sampled_batches", 1))
    forwards = (
        1
        + member.needs_old_logprobs
        + (member.policy.reference is not None)
        + (member.critic is not None)
    )
    full = recipe.trainer.policy.model.lora.rank == 0
    flops = step_flops(pack.num_parameters, member.step_tokens, forwards=forwards, full=full)
    if pack.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        # Linux counts in KiB, macOS in bytes.
        unit = 2**30 if sys.platform == "darwin" else 2**20
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {
        "perf/tokens_per_second": samples * row["completions/mean_length"] / row["step_time"],
        "perf/mfu": flops / (row["step_time"] * pack.peak_flops),
        "perf/max_memory_gb": memory,
    }


def finish(member: Member) -> None:
    """Move to COMPLETE with the result: the last evaluation, the base's, and the best."""
    rows = [row for row in member.metrics.rows() if ACCURACY in row]
    last, first = rows[-1], rows[0]
    result = {
        "step": member.step,
        "metrics": {
            name: value
            for name, value in last.items()
            if name.startswith("eval/") and math.isfinite(value)
        },
        "base": {ACCURACY: first[ACCURACY]} if first["step"] == 0 else None,
        "best": member.best,
        "seconds": member.run_dir.read_manifest()["seconds"],
    }
    member.run_dir.move_to(Status.COMPLETE, result=result)


@contextlib.contextmanager
def recorded_failure(run_dir: RunDir) -> Iterator[None]:
    """Record an exception as the run's FAILED status with its reason, and let it go on."""
    try:
        with exits_are_failures():
            yield
    except Exception as error:
        run_dir.fail(error)
        raise
