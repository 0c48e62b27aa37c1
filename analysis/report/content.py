"""Gather what a page says, under the names that the templates use; figures are added later."""

from __future__ import annotations

from typing import Any

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.report import answer, compare, details, tables
from analysis.report.decisions import MEANINGS, decisions
from analysis.report.next_step import next_step
from analysis.report.verdicts import ClaimTable, claim_table
from analysis.stats.rates import GOOD_SHARE

# The Markdown page, for a pull request, has this many of the best configurations.
TOP = 5
_PAIRED_METHOD = (
    "The best of each is compared with the leading one on held-out problems that both kept samples "
    "of: the mean difference in reward per problem, with errors clustered by problem (Miller 2024) "
    "and a 95% interval. It contains chance in the problems and in sampling; the intervals over "
    "seeds show chance in training."
)
_CLAIM_METHOD = (
    "Claims are judged on all runs that differ only in what the claims vary, whichever experiment "
    "they belong to."
)


def part(experiment: Experiment) -> dict[str, Any]:
    """Return what a page says of one run or sweep alone."""
    trial = experiment.best_trial()
    run_dir = "." if not experiment.is_sweep else None if trial is None else str(trial["run_dir"])
    configurations = tables.configurations(experiment) if experiment.is_sweep else None
    decided = decisions(experiment)
    problems, note = details.problems(experiment, run_dir) if run_dir else ([], "")
    return {
        "name": experiment.name,
        "directory": experiment.directory,
        "sweep": experiment.is_sweep,
        "status": str(experiment.source["status"]),
        "metric": labels.metric(experiment.metric),
        "better": "higher" if experiment.direction == "maximize" else "lower",
        "standing": answer.standing(experiment),
        "answer": answer.answer(experiment),
        "next": next_step(experiment, decided),
        "decisions": decided,
        "meanings": MEANINGS,
        "command": experiment.command(run_dir) if run_dir else None,
        "best_dir": run_dir,
        "configurations": configurations,
        "bars": tables.bars(experiment) if experiment.is_sweep else [],
        "top": configurations.top(TOP) if configurations else None,
        "rates": answer.rate_rows(experiment),
        "good_share": f"{GOOD_SHARE:.0%}",
        "problems": problems,
        "problems_note": note,
        "method": details.method(experiment),
        "provenance": details.provenance(experiment),
    }


def single(experiment: Experiment) -> dict[str, Any]:
    """Return the content of the page of one run or sweep."""
    claims, content = claim_table([experiment]), part(experiment)
    return {
        **content,
        "compare": False,
        "claims": claims if claims and claims.judged else None,
        "trials": tables.trials([experiment]),
        "method": [*content["method"], *_unjudged(claims)],
    }


def comparison(experiments: list[Experiment]) -> dict[str, Any]:
    """Return the content of the page of several: comparisons, all claims, and each one's part."""
    names = compare.unique_names(experiments)
    parts = [
        {**part(experiment), "name": name, "anchor": f"sweep-{number}"}
        for number, (name, experiment) in enumerate(zip(names, experiments, strict=True), 1)
    ]
    better = {content["better"] for content in parts}
    count = labels.plural(sum(len(experiment.trials) for experiment in experiments), "trial")
    claims = claim_table(experiments)
    judged = claims if claims and claims.judged else None
    method = [_PAIRED_METHOD, *([_CLAIM_METHOD] if judged else [])]
    method += [line for content in parts for line in content["method"]] + _unjudged(claims)
    return {
        "name": f"{labels.plural(len(experiments), 'experiment')} compared",
        "compare": True,
        "standing": f"{labels.listed(names)}: {count} in all.",
        "metric": labels.listed(list(dict.fromkeys(content["metric"] for content in parts))),
        "better": better.pop() if len(better) == 1 else "each metric's better end",
        "parts": parts,
        "best_of_each": compare.best_of_each(experiments),
        "pairs": compare.pairs(experiments),
        "claims": judged,
        "trials": tables.trials(experiments),
        "method": list(dict.fromkeys(method)),
    }


def _unjudged(claims: ClaimTable | None) -> list[str]:
    """Say that no claim can be judged, where that is so."""
    if claims is None or claims.judged:
        return []
    count = labels.plural(len(claims.rows), "claim")
    what = f"None of the {count} of LoRA Without Regret can be judged by these runs"
    return [f"{what}: docs/claims.md says what each takes."]
