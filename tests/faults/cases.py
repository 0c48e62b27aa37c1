"""Define the faults that the tests try, by name, as listed in docs/guides/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.hooks import Fault

SAME = "resumes; the same to the bit as never killed"
OLDER = "named and set aside; resumes from the checkpoint before it; the same to the bit"
CLEARED = "removed; resumes from the checkpoint before it; the same to the bit"
ANEW = "named and set aside; starts again from step 0; the same to the bit"
REFUSED = "named, refused with exit status 2; no file changed"
ANSWERED = (
    "a valid recipe or a dry run, or one message; never a traceback, never a start on invalid input"
)
ALONE = (
    "FAILED, with its reason on the console, in study and report; the others "
    "complete; no process left"
)


@dataclass(frozen=True, slots=True)
class Kill:
    """A SIGKILL: its phase, by its name in the table, and the moment."""

    phase: str
    fault: Fault


def _file(phase: str, target: str, count: int) -> Kill:
    return Kill(phase, Fault("file", target, count))


def _call(phase: str, target: str, count: int, *, after: bool = False) -> Kill:
    return Kill(phase, Fault("call", target, count, after))


CREATION = "the run directory's creation"
ROLLOUT, SCORING, UPDATE, SYNC, EVALUATION = "rollout", "scoring", "update", "sync", "evaluation"
WRITE, REMOVAL, APPEND = "checkpoint write", "an old checkpoint's removal", "metrics append"
MANIFEST, ADAPTER, SAMPLES, END = (
    "manifest write",
    "adapter write",
    "samples write",
    "the run's end",
)
VERDICT, ANYTIME = "between the run's end and its verdict", "any time, by the clock"

_DECODE = "rltrain.engines.cpu.decoder:LlamaDecoder.step"
_STEP, _TRAINER, _CHECKPOINT = "rltrain.step:", "rltrain.trainer:", "rltrain.checkpoint:"
_NEW, _OLD = (
    r"checkpoints/\.step_\d+\.\w+/new/|rename checkpoints/step",
    r"(remove|rmdir) checkpoints/\.step_\d+\.\w+",
)

# Each chain uses one directory, which is killed and resumed several times and then completes.
# Counts are for each process.
CHAINS: tuple[tuple[Kill, ...], ...] = (
    (
        _file(CREATION, r"rename recipe\.yaml", 1),
        _call(EVALUATION, f"{_TRAINER}evaluate", 1),
        _call(ROLLOUT, f"{_STEP}sample_rollouts", 2),
        _file(WRITE, _NEW, 4),
        _call(UPDATE, "torch:Tensor.backward", 3),
        _call(VERDICT, "harness.run:judge", 1),
    ),
    (
        _file(CREATION, r"open \.manifest\.json", 1),
        _call(ROLLOUT, _DECODE, 47),
        Kill(APPEND, Fault("torn", r"/metrics\.jsonl$", 2, cut=12)),
        _file(WRITE, _NEW, 12),
        _file(ADAPTER, "adapter/", 5),
    ),
    (
        _call(SYNC, "rltrain.pack:Pack.publish_member", 1),
        _file(SAMPLES, r"rename samples/", 1),
        _call(UPDATE, "torch.optim:AdamW.step", 3, after=True),
        _file(MANIFEST, r"rename manifest", 4),
        _file(REMOVAL, _OLD, 3),
    ),
    (
        _call(EVALUATION, f"{_TRAINER}evaluate", 1, after=True),
        _call(UPDATE, "torch.optim:AdamW.step", 1),
        _file(WRITE, _NEW, 1),
        Kill(APPEND, Fault("torn", r"/metrics\.jsonl$", 3, cut=600)),
        _file(REMOVAL, _OLD, 9),
    ),
    (
        _call(SYNC, "rltrain.pack:Pack.publish_member", 2, after=True),
        _file(APPEND, r"open metrics\.jsonl", 3),
        _file(MANIFEST, r"open \.manifest", 3),
        _file(ADAPTER, r"rename adapter/", 1),
        _call(END, f"{_TRAINER}Trainer._finish", 1),
    ),
    (
        _call(SCORING, f"{_STEP}compute_advantages", 1),
        _call(WRITE, f"{_CHECKPOINT}save_file", 3, after=True),
        _file(SAMPLES, "samples/", 3),
        _file(REMOVAL, r"rename checkpoints/\.step", 2),
        _call(SCORING, f"{_STEP}compute_advantages", 1, after=True),
    ),
    (
        Kill(ANYTIME, Fault("time", seconds=0.25)),
        Kill(ANYTIME, Fault("time", seconds=0.35)),
        Kill(ANYTIME, Fault("time", seconds=0.3)),
    ),
    (Kill(ANYTIME, Fault("time", seconds=0.45)), Kill(ANYTIME, Fault("time", seconds=0.2))),
)
"""Times are shares of the whole run's CPU time, small enough for a machine twice as fast."""


# A run whose engine does not share the trainer's weights: adapters reach vLLM through files.
VLLM_KILLS = (
    _file("sync to vLLM", r"rename sync/\w+/v000002", 1),
    _file("sync to vLLM", r"remove sync/\w+/v000001/", 2),
)
# One sweep, killed and resumed several times: before Ray is up, while trials run, and after all
# have ended.
_JOURNAL, _TRIAL, _SUMMARY = (
    "sweep, journal write",
    "sweep, a trial's directory",
    "sweep, results and report",
)
SWEEP_KILLS = (
    Kill(_JOURNAL, Fault("torn", r"/study\.journal$", 3)),
    _file("sweep, manifest and recipe", r"rename recipe\.yaml", 1),
    Kill(_JOURNAL, Fault("torn", r"/study\.journal$", 2, cut=40)),
    _file(_TRIAL, r"rename trials/0000/recipe\.yaml", 1),
    _call("sweep, while a trial trains", "sweeps.execution.controller:TrialController.report", 2),
    _call(_JOURNAL, "sweeps.study.study:Study.complete", 1),
    _call("sweep, between the last trial and its result", "sweeps.session:conclude", 1),
    _file(_SUMMARY, r"rename results\.parquet", 1),
    _file(_SUMMARY, r"open report/figures/", 5),
    _file(_SUMMARY, r"rename report/index\.html", 1),
)


@dataclass(frozen=True, slots=True)
class Corruption:
    """Damage to one file of a stopped run, and its expected outcome.

    The run was stopped in its fifth step, with the checkpoints of steps 3 and 4 and a best adapter
    of step 4. `how` names a function of test_corruption.py. `message` is what the command prints,
    `from_step` the checkpoint it continues from, `aside` the files that it moves to set_aside/.
    """

    name: str
    file: str
    how: str
    message: str
    from_step: int = 3
    aside: tuple[str, ...] = ("step_000004",)

    @property
    def happened(self) -> str:
        """Return the outcome for the table."""
        if not self.aside:
            return CLEARED
        return {0: ANEW, 3: OLDER}[self.from_step]


_LAST = "checkpoints/step_000004"
CORRUPTIONS = (
    Corruption(
        "weights truncated",
        f"{_LAST}/weights.safetensors",
        "halve",
        "weights.safetensors is damaged",
    ),
    Corruption(
        "weights: one bit flipped",
        f"{_LAST}/weights.safetensors",
        "flip",
        "weights.safetensors is damaged",
    ),
    Corruption(
        "weights missing",
        f"{_LAST}/weights.safetensors",
        "remove",
        "weights.safetensors is missing",
    ),
    Corruption(
        "optimizer: one bit flipped",
        f"{_LAST}/optimizer.safetensors",
        "flip",
        "optimizer.safetensors is damaged",
    ),
    Corruption("state.json missing", f"{_LAST}/state.json", "remove", "state.json is missing"),
    Corruption("state.json empty", f"{_LAST}/state.json", "empty", "state.json is damaged"),
    Corruption("COMPLETE missing", f"{_LAST}/COMPLETE", "remove", "COMPLETE is missing"),
    Corruption(
        "SHA256SUMS of a checkpoint missing",
        f"{_LAST}/SHA256SUMS",
        "remove",
        "SHA256SUMS is missing",
    ),
    Corruption(
        "half a checkpoint, under its temporary name",
        _LAST,
        "unfinished",
        "",
        from_step=3,
        aside=(),
    ),
    Corruption(
        "every checkpoint damaged",
        "checkpoints/*/weights.safetensors",
        "flip",
        "resuming from step 0",
        from_step=0,
        aside=("step_000003", "step_000004"),
    ),
    Corruption(
        "metrics.jsonl: a line in the middle garbled",
        "metrics.jsonl",
        "garble",
        "line 3 of metrics.jsonl is damaged",
        from_step=0,
        aside=("metrics.jsonl", "step_000003", "step_000004"),
    ),
    Corruption(
        "metrics.jsonl: a number changed",
        "metrics.jsonl",
        "renumber",
        "metrics.jsonl was changed",
        aside=("metrics.jsonl", "step_000004"),
    ),
    Corruption(
        "metrics.jsonl: last line cut",
        "metrics.jsonl",
        "cut",
        "metrics.jsonl has lost rows",
        aside=("metrics.jsonl", "step_000004"),
    ),
    Corruption(
        "metrics.jsonl: rows missing",
        "metrics.jsonl",
        "halve",
        "metrics.jsonl has lost rows",
        from_step=0,
        aside=("metrics.jsonl", "step_000003", "step_000004"),
    ),
    Corruption(
        "metrics.jsonl missing",
        "metrics.jsonl",
        "remove",
        "metrics.jsonl has lost rows",
        from_step=0,
        aside=("step_000003", "step_000004"),
    ),
    Corruption(
        "adapter/best: one bit flipped",
        "adapter/best/adapter_model.safetensors",
        "flip",
        "adapter/best is set aside",
        aside=("best", "step_000004"),
    ),
    Corruption(
        "adapter/best missing", "adapter/best", "remove", "it needs adapter/best, of step 4"
    ),
)
# Damage that is refused on --resume: name, file, how, message.
REFUSALS = (
    ("manifest.json truncated", "manifest.json", "halve", "the manifest is damaged"),
    ("manifest.json: status garbled", "manifest.json", "garble", "status is"),
    ("recipe.yaml: one bit flipped", "recipe.yaml", "flip", "recipe.yaml: its SHA-256 is not"),
    ("recipe.yaml truncated", "recipe.yaml", "halve", "recipe.yaml: its SHA-256 is not"),
)
NAMED = "trainer.resume_mode names a damaged checkpoint"
OTHER_OUTCOMES = {
    "adapter/final damaged after the last checkpoint": "named and set aside; written "
    "again from the checkpoint; "
    "the same to the bit",
    NAMED: REFUSED,
    "a checkpoint of another rank": REFUSED,
    "read-only run directory": REFUSED,
    "a file-size limit in mid-run": "named, exit status 2; with more room resumes; the "
    "same to the bit",
    "disk full in mid-run": "named, exit status 2; with more room resumes; the same to the bit",
    "study.journal: one bit flipped in the middle": REFUSED,
    "study.journal: a line missing": REFUSED,
}
# Number of random mutations of each input, the same each time (test_mutations.py).
RECIPE_VALUES = "mutated recipe: values replaced, removed, renamed, moved"
RECIPE_FILES = "mutated recipe file: cut, lines doubled or swapped, text put in"
RUN_LINES = "mutated command line of run and sweep"
OTHER_LINES = "mutated command line of report, export, reproduce and prepare"
MUTATIONS = {RECIPE_VALUES: 220, RECIPE_FILES: 60, RUN_LINES: 160, OTHER_LINES: 60}
# Trials of one sweep of ten (test_sweep_failures.py): the modules in environments/, and how a trial
# with each of them fails.
FAILURES = {
    "raises": "a trial's reward raises",
    "hangs": "a trial hangs",
    "nan": "a trial's reward is not a number",
}
ENVIRONMENTS = ("good", "raises", "good", "hangs", "good", "raises", "good", "nan", "good", "good")


def expected() -> dict[str, int]:
    """Return how often the tests try each fault."""
    tried: dict[str, int] = {}
    for kill in [*(kill for chain in CHAINS for kill in chain), *VLLM_KILLS, *SWEEP_KILLS]:
        tried[f"SIGKILL: {kill.phase}"] = tried.get(f"SIGKILL: {kill.phase}", 0) + 1
    names = (
        [each.name for each in CORRUPTIONS] + [name for name, *_ in REFUSALS] + list(OTHER_OUTCOMES)
    )
    # Two tests try a named damaged checkpoint: one of the same run, and one of another run.
    failing = {fault: ENVIRONMENTS.count(environment) for environment, fault in FAILURES.items()}
    return tried | dict.fromkeys(names, 1) | {NAMED: 2} | failing | MUTATIONS
