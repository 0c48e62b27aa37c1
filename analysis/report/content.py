"""What a page says of one run or sweep, by the names that templates know, figures aside."""

from __future__ import annotations

from typing import Any

from analysis.data import commands as rerun
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.report import answer as reading
from analysis.report import bars, compare, tables
from analysis.report import details as page
from analysis.report.decisions import MEANINGS, decisions
from analysis.report.next_step import next_step
from analysis.report.verdicts import Claims, claims
from analysis.stats import ranking as stats

# So many of the best configurations stand in a pull request.
TOP = 5


def part(experiment: Experiment) -> dict[str, Any]:
    """One run's or sweep's own part of a page."""
    trial = experiment.best_trial()
    run_dir = None if trial is None else str(trial["run_dir"])
    if not experiment.is_sweep:
        run_dir = "."
    configurations = tables.configurations(experiment) if experiment.is_sweep else None
    decided = decisions(experiment)
    problems, note = page.problems(experiment, run_dir) if run_dir else ([], "")
    return {
        "name": experiment.name,
        "directory": experiment.directory,
        "sweep": experiment.is_sweep,
        "status": str(experiment.source["status"]),
        "metric": labels.metric(experiment.metric),
        "better": "higher" if experiment.direction == "maximize" else "lower",
        "standing": reading.standing(experiment),
        "answer": reading.answer(experiment),
        "next": next_step(experiment, decided),
        "decisions": decided,
        "meanings": MEANINGS,
        "command": rerun.command(experiment, run_dir) if run_dir else None,
        "best_dir": run_dir,
        "configurations": configurations,
        "bars": bars.bars(experiment) if experiment.is_sweep else [],
        "top": configurations.top(TOP) if configurations else None,
        "rates": reading.rate_rows(experiment),
        "good_share": f"{stats.GOOD_SHARE:.0%}",
        "problems": problems,
        "problems_note": note,
        "method": page.method(experiment),
        "provenance": page.provenance(experiment),
    }


def single(experiment: Experiment) -> dict[str, Any]:
    """The page of one run or sweep."""
    found, own = claims([experiment]), part(experiment)
    return {
        **own,
        "compare": False,
        "claims": found if found and found.judged else None,
        "trials": tables.trials([experiment]),
        "method": [*own["method"], *_unjudged(found)],
    }


def comparison(experiments: list[Experiment]) -> dict[str, Any]:
    """The page of several: the best of each, these against each other, all runs' claims, and each
    one's own part.
    """
    called = compare.names(experiments)
    parts = [
        {**part(experiment), "name": name, "anchor": f"sweep-{number}"}
        for number, (name, experiment) in enumerate(zip(called, experiments, strict=True), 1)
    ]
    better = dict.fromkeys(one["better"] for one in parts)
    counted = sum(len(experiment.trials) for experiment in experiments)
    paired = (
        "The best of each is compared with the leading one on held-out problems that both "
        "kept samples of: the mean "
        "difference in reward per problem, with errors clustered by problem (Miller 2024) "
        "and a 95% interval. It holds "
        "chance in the problems and in sampling; chance in training shows in the "
        "intervals over seeds."
    )
    judged = (
        "Claims are judged on the runs of all that differ only in what the claims "
        "vary, whichever they belong to."
    )
    found = claims(experiments)
    shown = found if found and found.judged else None
    leading = [paired, judged] if shown else [paired]
    lines = dict.fromkeys(
        [*leading, *(line for one in parts for line in one["method"]), *_unjudged(found)]
    )
    return {
        "name": f"{labels.plural(len(experiments), 'experiment')} compared",
        "compare": True,
        "standing": f"{labels.listed(called)}: {labels.plural(counted, 'trial')} in all.",
        "metric": labels.listed(list(dict.fromkeys(one["metric"] for one in parts))),
        "better": next(iter(better)) if len(better) == 1 else "each its own end",
        "parts": parts,
        "best_of_each": compare.best_of_each(experiments),
        "pairs": compare.pairs(experiments),
        "claims": shown,
        "trials": tables.trials(experiments),
        "method": list(lines),
    }


def _unjudged(found: Claims | None) -> list[str]:
    """A sentence in the claims' place where none of them can be judged."""
    if found is None or found.judged:
        return []
    count = labels.plural(len(found.rows), "claim")
    return [
        (
            f"None of the {count} of LoRA Without Regret can be judged by these runs: "
            "docs/claims.md says what each takes."
        )
    ]
