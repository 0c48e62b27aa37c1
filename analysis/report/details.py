"""What the report says besides its answer, tables and figures: completions, method and
provenance.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.stats.values import (
    COLLAPSE_SHARE,
    COLLAPSE_SPREAD,
    COMPETING,
    GAIN_SHARE,
    could_collapse,
)
from harness.config import metrics

SHOWN_PROBLEMS = 12
# A completion longer than this is cut on the page, and says so.
SHOWN_CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's completion for a problem, and its reward."""

    who: str
    completion: str
    reward: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A held-out problem by its index, its reference answer, and how the base and the trained model
    answered it.
    """

    index: int
    question: str
    truth: str
    answers: list[Answer]

    @property
    def differ(self) -> bool:
        """Whether the answers were rewarded differently."""
        return len({answer.reward for answer in self.answers}) > 1


def problems(experiment: Experiment, run_dir: str) -> tuple[list[Problem], str]:
    """Held-out problems that step 0 and a run's last evaluation kept, those answered differently
    first; and a note.

    Without such samples no problem and an empty note.
    """
    samples = experiment.tables.samples
    kept = (samples["run_dir"] == run_dir) & (samples["phase"] == "eval")
    samples = samples[kept].drop_duplicates(["step", "index"])
    if samples.empty or samples["step"].max() == 0:
        return [], ""
    last = int(samples["step"].max())
    asked = {
        f"after training, step {step!s}" if step else "base model, step 0": rows.set_index("index")
        for step, rows in samples[samples["step"].isin([0, last])].groupby("step")
    }
    shared = (
        sorted(set.intersection(*(set(rows.index) for rows in asked.values())))
        if len(asked) > 1
        else []
    )
    rewards = [[float(rows.loc[index, "reward"]) for rows in asked.values()] for index in shared]
    gained = sum(after > before for before, after in rewards)
    lost = sum(after < before for before, after in rewards)
    order = sorted(
        zip(shared, rewards, strict=True), key=lambda one: (one[1][0] == one[1][1], one[0])
    )
    shown = [
        _problem(index, {who: rows.loc[index] for who, rows in asked.items()})
        for index, _ in order[:SHOWN_PROBLEMS]
    ]
    if not shown:
        return [], ""
    note = (
        f"Of {labels.plural(len(shared), 'held-out problem')} kept of both, training "
        f"gained {gained} and lost {lost}; "
        f"the other {len(shared) - gained - lost} were rewarded alike. Those that differ "
        "come first."
    )
    return shown, note


def method(experiment: Experiment) -> list[str]:
    """How the numbers on the page were computed."""
    name = labels.metric(experiment.metric)
    meaning = metrics.lookup(experiment.metric).meaning
    better = "higher" if experiment.direction == "maximize" else "lower"
    lines = [
        f"{labels.capital(name)} is the metric {experiment.metric}: {meaning}; {better} is better."
    ]
    if experiment.metric.startswith("eval/"):
        lines.append(
            f"It is measured by sampling: {_sampling(experiment)}. A run's score is its "
            "last evaluation's."
        )
    if experiment.is_sweep:
        lines.append(
            "Configurations are ranked by their mean over seeds. Those run again on fresh "
            "seeds (--confirm), which had "
            "no part in the choice, come first, ranked by their mean over these. Only "
            "those whose every seed is "
            "COMPLETE are ranked: a failed, pruned or running trial never counts as a "
            "score, whatever it logged. Equal "
            "means share a rank."
        )
    lines.append(_interval_method(experiment))
    if experiment.is_sweep:
        lines += [_winner_method(experiment), _decision_method(), _collapse_method()]
    return lines


def _interval_method(experiment: Experiment) -> str:
    if len(experiment.seeds) > 1:
        return (
            "Every interval is 95% and over seeds, by Student's t: it holds chance in "
            "training, in sampling and in the "
            "problems as far as seeds show them. A table or bar shows the plain range of "
            "a configuration's seeds. The "
            "base, which does not depend on the seed, has Wilson's interval over the problems."
        )
    if not experiment.problems:
        return (
            "No interval: there is one seed, and the score is not a share of right "
            "answers that can be counted."
        )
    return (
        f"Every interval is 95%, Wilson's for {experiment.problems} problems: it holds "
        "chance in the problems and in "
        "sampling. Chance in training takes several seeds to see."
    )


def _winner_method(experiment: Experiment) -> str:
    flattered = (
        "The winner is picked by the very score shown, which is too high for that: the "
        "more configurations are close, "
        "the more (selection bias, the winner's curse)."
    )
    if experiment.expected is None:
        return (
            f"{flattered} With one seed, scores are drawn to their mean as far as "
            "chance explains their spread."
        )
    return (
        f"{flattered} The score expected when it is run again is corrected for it: each "
        "seed, a fresh one where there "
        "are such, scores the configuration that the other seeds choose. The interval is "
        "widened where several "
        f"configurations compete; chance is pooled over those that kept {COMPETING:.0%} of "
        "the best gain."
    )


def _decision_method() -> str:
    return (
        "Decisions compare the values of one setting, each at its best among the other "
        "settings and corrected for that "
        "choice as above. Intervals of the differences hold together with 95% over all "
        "pairs of a question's values "
        "(Tukey and Kramer), with Satterthwaite's degrees of freedom and a value's own "
        "noise where it is above the "
        "average: at most 5% of sweeps call a value worse that is not. A value is worse "
        "where its interval excludes "
        f"the winner's, and tied where it lies within {GAIN_SHARE:.0%} of what training "
        "gained. One that was never "
        "tried beside the winner's other settings, nor over learning rates of its own, is "
        "not judged. A learning rate "
        "is decided as a range around the winner's, which ends where the next rate tested is worse."
    )


def _collapse_method() -> str:
    return (
        f"A seed has collapsed when it lost {COLLAPSE_SHARE:.0%} of what its "
        "configuration's best seed gained, and "
        f"over {COLLAPSE_SPREAD:g} times the spread of other configurations' seeds. A "
        "value of which no configuration "
        "is free of that is unstable: it is never best, and not compared. That no seed "
        "collapsed says little with few "
        f"seeds: with 95% confidence, 2 leave up to {could_collapse(2):.0%} that could, 3 "
        f"{could_collapse(3):.0%}, "
        f"10 {could_collapse(10):.0%}."
    )


def provenance(experiment: Experiment) -> list[tuple[str, str]]:
    """The manifest, as name and value."""
    manifest = experiment.manifest
    git, hardware = manifest.get("git") or {}, manifest.get("hardware") or {}
    history = manifest.get("status_history") or [{}]
    commit = (
        f"{git.get('commit')}{' with uncommitted changes' if git.get('dirty') else ''}"
        if git
        else None
    )
    recipe, data = manifest.get("recipe") or {}, manifest.get("data") or {}
    machine = [
        hardware.get("cpu"),
        f"{hardware.get('cores')} cores",
        f"{hardware.get('memory_gb')} GiB",
    ]
    rows = [
        ("directory", experiment.directory),
        ("command", shlex.join(map(str, manifest.get("command") or []))),
        (
            "status",
            (
                f"{experiment.source['status']} since {history[-1].get('time')}; made "
                f"{history[0].get('time')}"
            ),
        ),
        (
            "seed" if not experiment.is_sweep else "seeds",
            ", ".join(str(seed) for seed in experiment.seeds),
        ),
        ("recipe", f"{recipe.get('source')} (sha256:{recipe.get('digest')})"),
        ("model", _named_digest(manifest.get("model") or {})),
        *(("data", f"{path} ({digest or 'not on this machine'})") for path, digest in data.items()),
        ("commit", commit),
        ("machine", ", ".join(str(part) for part in machine) if hardware else None),
        ("platform", hardware.get("platform")),
        ("python", manifest.get("python")),
        (
            "packages",
            ", ".join(
                f"{name} {version}" for name, version in (manifest.get("packages") or {}).items()
            ),
        ),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _problem(index: int, rows: dict[str, pd.Series]) -> Problem:
    answers = [
        Answer(who, _cut(str(row["completion"])), f"{float(row['reward']):g}")
        for who, row in rows.items()
    ]
    any_row = next(iter(rows.values()))
    return Problem(int(index), str(any_row["question"]), str(any_row["ground_truth"]), answers)


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} … (cut: {len(text) - SHOWN_CHARACTERS} more characters)"


def _sampling(experiment: Experiment) -> str:
    generator = experiment.recipe.get("generator") or {}
    settings = generator.get("eval_sampling_params") or {}
    count = labels.plural(int(generator.get("eval_n_samples_per_prompt") or 1), "completion")
    several = f"{experiment.problems} problems, " if experiment.problems else ""
    return f"{several}{count} per problem at temperature {settings.get('temperature')}"


def _named_digest(model: dict[str, Any]) -> str:
    return f"{model.get('path')} ({model.get('digest') or 'not a folder on this machine'})"
