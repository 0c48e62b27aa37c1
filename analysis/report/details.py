"""Show completions before and after training, how the numbers were computed, and provenance."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from analysis.data import labels
from analysis.data.records import lookup
from analysis.experiment import Experiment
from analysis.stats.effects import GAIN_SHARE
from analysis.stats.scores import COLLAPSE_SHARE, COLLAPSE_SPREAD, COMPETING, could_collapse
from harness.config import metrics

SHOWN_PROBLEMS = 12
# A longer completion is cut on the page, and says so.
SHOWN_CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class ShownCompletion:
    """One model's completion of a problem, and its reward."""

    who: str
    completion: str
    reward: str


@dataclass(frozen=True, slots=True)
class ShownProblem:
    """A held-out problem with its reference answer and the completions before and after."""

    index: int
    question: str
    truth: str
    answers: list[ShownCompletion]

    @property
    def differ(self) -> bool:
        """Whether the completions have different rewards."""
        return len({answer.reward for answer in self.answers}) > 1


def problems(experiment: Experiment, run_dir: str) -> tuple[list[ShownProblem], str]:
    """Return the held-out problems kept both before and after training, and a note on them.

    Problems with different rewards come first. Without such samples both are empty.
    """
    samples = experiment.tables.samples
    kept = (samples["run_dir"] == run_dir) & (samples["phase"] == "eval")
    samples = samples[kept].drop_duplicates(["step", "index"])
    if samples.empty or samples["step"].max() == 0:
        return [], ""
    last = int(samples["step"].max())
    before, after = (samples[samples["step"] == step].set_index("index") for step in (0, last))
    shared = before.index.intersection(after.index).sort_values()
    if shared.empty:
        return [], ""
    change = (after.loc[shared, "reward"] - before.loc[shared, "reward"]).astype(float)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    order = [*shared[(change != 0).to_numpy()], *shared[(change == 0).to_numpy()]]
    models = {"base model, step 0": before, f"after training, step {last}": after}
    shown = []
    for index in order[:SHOWN_PROBLEMS]:
        answers = [
            ShownCompletion(
                who,
                _cut(str(rows.loc[index, "completion"])),
                f"{float(rows.loc[index, 'reward']):g}",
            )
            for who, rows in models.items()
        ]
        row = before.loc[index]
        shown.append(
            ShownProblem(int(index), str(row["question"]), str(row["ground_truth"]), answers)
        )
    note = (
        f"Of {labels.plural(len(shared), 'held-out problem')} kept of both, training gained "
        f"{gained} and lost {lost}. The other {len(shared) - gained - lost} have equal rewards and "
        "come last."
    )
    return shown, note


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} … (cut: {len(text) - SHOWN_CHARACTERS} more characters)"


def method(experiment: Experiment) -> list[str]:
    """Say how the numbers on the page were computed, in paragraphs."""
    metric = experiment.metric
    better = "higher" if experiment.direction == "maximize" else "lower"
    name, meaning = labels.capital(labels.metric(metric)), metrics.lookup(metric).meaning
    lines = [f"{name} is the metric {metric}: {meaning}; {better} is better."]
    if metric.startswith("eval/"):
        count = int(lookup(experiment.recipe, "generator.eval_n_samples_per_prompt") or 1)
        key = "generator.eval_sampling_params.temperature"
        several = f"{experiment.problems} problems, " if experiment.problems else ""
        lines.append(
            f"It is measured by sampling: {several}{labels.plural(count, 'completion')} per "
            f"problem at temperature {lookup(experiment.recipe, key)}. A run's score is its last "
            "evaluation's."
        )
    if experiment.is_sweep:
        lines.append(
            "Configurations are ranked by their mean over seeds. Those run again on fresh seeds "
            "(--confirm) come first, ranked by their mean over these, which had no part in the "
            "choice. Only configurations whose every seed is COMPLETE are ranked: a failed, pruned "
            "or running trial never counts as a score, whatever it logged. Equal means share a "
            "rank."
        )
    lines.append(_interval_method(experiment))
    if experiment.is_sweep:
        lines += [_winner_method(experiment), DECISION_METHOD, COLLAPSE_METHOD]
    return lines


def _interval_method(experiment: Experiment) -> str:
    if len(experiment.seeds) > 1:
        return (
            "Every interval is 95% and over seeds, by Student's t: it contains chance in training, "
            "in sampling and in the problems, as far as seeds show them. Tables and bars show the "
            "plain range of a configuration's seeds. The base does not depend on the seed and has "
            "Wilson's interval over the problems."
        )
    if not experiment.problems:
        return "There is no interval: one seed, and a score that is not a share of right answers."
    return (
        f"Every interval is 95%, Wilson's for {experiment.problems} problems: it contains chance "
        "in the problems and in sampling. Chance in training takes several seeds to see."
    )


def _winner_method(experiment: Experiment) -> str:
    bias = (
        "The winner is chosen by the score that is shown, which is therefore too high (selection "
        "bias, winner's curse): the more so, the more configurations are close."
    )
    if experiment.expected is None:
        return (
            f"{bias} With one seed, scores are shrunk towards their mean as far as chance explains "
            "their spread."
        )
    return (
        f"{bias} The score expected when it is run again is corrected for that: each seed scores "
        "the configuration that the other seeds choose. Fresh seeds are used where there are any. "
        "The interval is wider where several configurations compete. Chance is pooled over "
        f"configurations that kept {COMPETING:.0%} of the best gain."
    )


DECISION_METHOD = (
    "Decisions compare the values of one setting, each at its best among the other settings and "
    "corrected for that choice as above. Intervals of the differences hold together with 95% over "
    "all pairs of a question's values (Tukey and Kramer), with Satterthwaite's degrees of freedom, "
    "and with a value's own noise where it is above the average. So at most 5% of sweeps call a "
    "value worse that is not. A value is worse where the interval of its difference from the "
    f"winner excludes 0, and tied where that interval is within {GAIN_SHARE:.0%} of what training "
    "gained. A value that was tried neither beside the winner's other settings nor over learning "
    "rates of its own is not judged. A learning rate is decided as a range around the winner's, "
    "which ends where the next rate tested is worse."
)
COLLAPSE_METHOD = (
    f"A seed has collapsed when it lost {COLLAPSE_SHARE:.0%} of what its configuration's best seed "
    f"gained, and more than {COLLAPSE_SPREAD:g} times the spread of other configurations' seeds. A "
    "value whose every configuration has a collapsed seed is unstable: it is never best, and not "
    "compared. Few seeds say little about collapses: with 95% confidence, after 2 seeds without "
    f"one up to {could_collapse(2):.0%} of seeds could collapse, after 3 {could_collapse(3):.0%}, "
    f"after 10 {could_collapse(10):.0%}."
)


def provenance(experiment: Experiment) -> list[tuple[str, str]]:
    """Return the manifest as names and values."""
    manifest = experiment.manifest
    parts = ("git", "hardware", "recipe", "model", "data", "packages")
    git, hardware, recipe, model, data, packages = (manifest.get(name) or {} for name in parts)
    history = manifest.get("status_history") or [{}]
    dirty = " with uncommitted changes" if git.get("dirty") else ""
    cores, memory = f"{hardware.get('cores')} cores", f"{hardware.get('memory_gb')} GiB"
    machine = f"{hardware.get('cpu')}, {cores}, {memory}"
    status = f"{experiment.source['status']} since {history[-1].get('time')}"
    rows = [
        ("directory", experiment.directory),
        ("command", shlex.join(map(str, manifest.get("command") or []))),
        ("status", f"{status}; created {history[0].get('time')}"),
        ("seeds" if experiment.is_sweep else "seed", ", ".join(map(str, experiment.seeds))),
        ("recipe", f"{recipe.get('source')} (sha256:{recipe.get('digest')})"),
        ("model", f"{model.get('path')} ({model.get('digest') or 'not a folder on this machine'})"),
        *(("data", f"{path} ({digest or 'not on this machine'})") for path, digest in data.items()),
        ("commit", f"{git.get('commit')}{dirty}" if git else None),
        ("machine", machine if hardware else None),
        ("platform", hardware.get("platform")),
        ("python", manifest.get("python")),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
    ]
    return [(name, str(value)) for name, value in rows if value]
