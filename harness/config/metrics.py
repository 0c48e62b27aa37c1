"""Every metric with its meaning, unit, direction, and when it is logged.

`python -m harness.config.metrics` prints them as a page, docs/reference/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harness.core.errors import UserError, nearest

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One logged metric.

    `direction` is None where neither end is better. `timing` marks metrics that differ between
    equal runs.
    """

    name: str
    meaning: str
    unit: str = ""
    direction: Direction | None = None
    timing: bool = False
    logged: str = "step"


# When a metric is in a row of `metrics.jsonl`, where that is not every step.
_EVALUATION = "evaluation"
_LORA = "evaluation, with `lora.rank` > 0"
_CRITIC = "step, with `advantage_estimator=gae`"
_TIS = "step, with `tis`"
_FILTERS = "step, with `apply_overlong_filtering` or `zero_variance_filter`"

ACCURACY = "eval/accuracy"
"""The metric that every evaluation logs."""

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "step",
            "optimizer steps taken; 0 is the base before training",
            logged="step and evaluation",
        ),
        Metric("reward", "mean reward of the step's training samples", direction="maximize"),
        Metric("reward_std", "mean over groups of the rewards' standard deviation"),
        Metric(
            "frac_reward_zero_std",
            "share of groups whose rewards are all equal: no signal",
            "share",
        ),
        Metric(
            "frac_masked_completions",
            "share of completions left out of the loss: cut at max_generate_length, "
            "or of a group without signal",
            "share",
            logged=_FILTERS,
        ),
        Metric(
            "num_sampled_batches",
            "batches sampled for the step, until enough groups had a signal",
            "count",
            logged="step, with `dynamic_sampling.type=filter`",
        ),
        Metric(
            "num_replaced_groups",
            "groups without signal replaced by copies of others",
            "count",
            logged="step, with `dynamic_sampling.type=replace`",
        ),
        Metric("completions/mean_length", "mean completion length", "tokens"),
        Metric(
            "completions/clipped_ratio",
            "share of completions cut at max_generate_length",
            "share",
            "minimize",
        ),
        Metric("entropy", "mean entropy of the policy at sampled tokens", "nats"),
        Metric("loss", "policy loss, KL term included"),
        Metric(
            "kl",
            "mean estimated KL(policy || reference) per token",
            "nats",
            logged="step, with `use_kl_loss`",
        ),
        Metric(
            "kl_in_reward",
            "mean estimated KL(policy || reference) per token, taken off the rewards times "
            "kl_loss_coef",
            "nats",
            logged="step, with `use_kl_in_reward`",
        ),
        Metric("clip_ratio/region_mean", "share of tokens whose ratio the clip holds", "share"),
        Metric(
            "sampling/sampling_logp_difference/mean",
            "mean |log-probability| gap, engine to trainer",
            "nats",
            "minimize",
        ),
        Metric(
            "sampling/sampling_logp_difference/max",
            "largest |log-probability| gap, engine to trainer",
            "nats",
            "minimize",
        ),
        Metric(
            "sampling/importance_sampling_ratio/mean",
            "mean weight, engine to trainer, after its cap",
            logged=_TIS,
        ),
        Metric(
            "sampling/importance_sampling_ratio/max",
            "largest weight, engine to trainer, after its cap",
            logged=_TIS,
        ),
        Metric("grad_norm", "gradient norm before clipping"),
        Metric(
            "skipped_updates",
            "optimizer steps skipped for a non-finite gradient",
            "count",
            "minimize",
        ),
        Metric("learning_rate", "learning rate of the step"),
        Metric("critic/vf_loss", "clipped value loss", logged=_CRITIC),
        Metric(
            "critic/explained_variance",
            "share of the returns' variance that the values explained before the "
            "update: 1 - Var(return - value) / Var(return)",
            "share",
            "maximize",
            logged=_CRITIC,
        ),
        Metric(
            "critic/clip_ratio",
            "share of tokens whose value the clip holds",
            "share",
            logged=_CRITIC,
        ),
        Metric("critic/mean_value", "mean value of the step's tokens", logged=_CRITIC),
        Metric(
            "critic/mean_return",
            "mean return of the step's tokens: what the values should be",
            logged=_CRITIC,
        ),
        Metric("critic/grad_norm", "the critic's gradient norm before clipping", logged=_CRITIC),
        Metric("critic/learning_rate", "the critic's learning rate of the step", logged=_CRITIC),
        Metric("num_tokens", "prompt and completion tokens trained on so far", "tokens"),
        Metric(
            "num_dropped_prompts",
            "training prompts dropped as longer than max_input_length",
            "count",
        ),
        Metric("step_time", "wall time of the step", "s", "minimize", timing=True),
        *(
            Metric(
                f"timing_s/{part}",
                f"wall time of {what}",
                "s",
                "minimize",
                timing=True,
                logged=logged,
            )
            for part, what, logged in (
                ("rollout", "sampling and scoring", "step"),
                ("logprobs", "old and reference log-probabilities, and values", "step"),
                ("update", "the policy's updates", "step"),
                ("critic", "the critic's updates", _CRITIC),
                ("sync", "giving the policy to the engine", "step"),
                (
                    "checkpoint",
                    "the checkpoint written after the step before",
                    "step after a checkpoint",
                ),
                ("eval", "the evaluation", _EVALUATION),
            )
        ),
        Metric(
            "perf/tokens_per_second",
            "completion tokens a second over the whole step",
            "tokens/s",
            "maximize",
            timing=True,
        ),
        Metric(
            "perf/mfu",
            "model FLOPs of the step, shared and skipped work counted in full, of a mixture "
            "those of its active experts, over its time and the matmul peak",
            "share",
            "maximize",
            timing=True,
        ),
        Metric(
            "perf/max_memory_gb",
            "peak memory of the process (GPU memory on a GPU)",
            "GB",
            "minimize",
            timing=True,
        ),
        Metric(
            "perf/members",
            "members of the pack that took the step together, and share its times",
            "count",
            timing=True,
        ),
        Metric(
            ACCURACY,
            "mean reward on held-out problems",
            "share",
            "maximize",
            logged=_EVALUATION,
        ),
        Metric(
            "eval/num_problems",
            "held-out problems evaluated: those whose prompts are within max_input_length",
            "count",
            logged=_EVALUATION,
        ),
        Metric(
            "eval/mean_length", "mean completion length at evaluation", "tokens", logged=_EVALUATION
        ),
        Metric(
            "eval/clipped_ratio",
            "share of evaluation completions cut at max_generate_length",
            "share",
            "minimize",
            logged=_EVALUATION,
        ),
        Metric("lora/norm_A", "Frobenius norm of all A together", logged=_LORA),
        Metric("lora/norm_B", "Frobenius norm of all B together", logged=_LORA),
        Metric(
            "lora/effective_rank",
            "mean over modules and experts of exp(entropy of BA's normalised singular values)",
            logged=_LORA,
        ),
    )
}

_SEVERAL = "evaluation, with `eval_n_samples_per_prompt` > 1"
_FAMILIES = {
    m.name.removesuffix("N"): m
    for m in (
        Metric(
            "eval/mean@N",
            "mean reward over N samples a problem",
            "share",
            "maximize",
            logged=_SEVERAL,
        ),
        Metric(
            "eval/pass@N",
            "share of problems with a right answer among N samples",
            "share",
            "maximize",
            logged=_SEVERAL,
        ),
    )
}


def lookup(name: str) -> Metric:
    """Return a metric by name; raises UserError with the nearest name for an unknown one."""
    if name in METRICS:
        return METRICS[name]
    for prefix, metric in _FAMILIES.items():
        if name.startswith(prefix) and name[len(prefix) :].isdigit():
            return metric
    guess = nearest(name, METRICS)
    raise UserError(
        "unknown metric",
        got=name,
        allowed=", ".join(METRICS),
        fix=f"did you mean {guess}?" if guess else None,
    )


def direction(name: str) -> Direction:
    """Return the better direction of a metric; raises UserError when neither is better."""
    better_end = lookup(name).direction
    if better_end is None:
        better = ", ".join(m.name for m in METRICS.values() if m.direction and not m.timing)
        raise UserError(
            "a sweep cannot optimise this metric: neither direction is better",
            got=name,
            allowed=better,
        )
    return better_end


def without_timings(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row without the metrics that differ between equal runs."""
    return {name: value for name, value in row.items() if not lookup(name).timing}


def duration(seconds: float) -> str:
    """Return a duration in words: `47 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


_PAGE = """# Metrics

What a run writes to `metrics.jsonl`, the console, W&B and TensorBoard, under these names. A row is
a step of training or, before the first, the base's evaluation; what an evaluation adds is in the
row of its step. Where *better* is empty neither end is, and a sweep cannot optimise the metric.
Timings differ between two equal runs, nothing else does.

Made from `harness/config/metrics.py`:
`python -m harness.config.metrics > docs/reference/metrics.md`.

"""


def markdown() -> str:
    """Return docs/metrics.md: every metric with meaning, unit, direction and when it is logged."""
    rows = [
        (f"`{m.name}`", m.meaning, m.unit, m.direction or "", m.logged, "yes" if m.timing else "")
        for m in (*METRICS.values(), *_FAMILIES.values())
    ]
    head = ("metric", "meaning", "unit", "better", "logged at", "timing")
    lines = [
        " | ".join(cell.replace("|", "\\|") for cell in row)
        for row in (head, ["---"] * len(head), *rows)
    ]
    return _PAGE + "".join(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    print(markdown(), end="")
