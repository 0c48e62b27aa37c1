"""What `--dry-run` says: the space, the first trials and the cost. Imports neither torch nor vllm
nor ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from harness.config import recipe as recipes
from harness.config.advice import advise
from harness.config.metrics import duration
from harness.config.schema import LoRA, Recipe, Sampler
from harness.config.validate import num_processes, sync_mode, target_modules
from harness.core.cli import invocation
from harness.core.paths import locate
from rltrain.data.files import count_rows
from rltrain.distributed.gpus import Gpus
from rltrain.models.targets import check_adapters
from rltrain.tools.fit import check_fit, memory_table
from rltrain.tools.preflight import check_batch
from sweeps.cost import Cost, Pace, costs, pace, run_cost
from sweeps.study import trials
from sweeps.study.plan import Plan, preview
from sweeps.study.space import short_names, show
from sweeps.study.trials import at_a_time, trials_at_once

SHOWN = 8


def describe(plan: Plan, source: str, gpus: Gpus | None = None, *, confirm: int = 0) -> str:
    """The whole text of a sweep; `confirm` is how many of the best configurations are to run again
    on fresh seeds.

    `gpus` are those to plan for, None where it uses none.
    """
    check_adapters(plan.recipe)
    again = min(confirm, plan.num_configurations) * len(plan.fresh_seeds)
    # Of a cluster nothing is known before it is reached.
    known = gpus is None or gpus.count > 0
    settled = (
        Plan(trials.settle(plan.recipe, gpus), plan.space, plan.first_trials) if known else plan
    )
    parts = [
        _settings(
            settled,
            source,
            again,
            at_a_time(settled.recipe) if known else _as_the_cluster_has(plan),
        ),
        _space(plan),
        _first_trials(plan),
        *([] if gpus is None else [memory_table(one, gpus) for one in trials.largest(settled)]),
        _costs(settled, source, plan.num_runs + again),
    ]
    return "\n\n".join(part for part in [*parts, _missing(plan.recipe)] if part)


def check_fits(plan: Plan, gpus: Gpus | None) -> None:
    """Raise UserError for a sweep whose largest trials the GPUs cannot hold."""
    if gpus is not None and gpus.count > 0:
        settled = Plan(trials.settle(plan.recipe, gpus), plan.space, plan.first_trials)
        for one in trials.largest(settled):
            check_fit(one, gpus)


def _as_the_cluster_has(plan: Plan) -> str:
    packs = plan.sweep.max_concurrent
    return (
        f"in {packs} packs"
        if packs
        else "in as many packs as the GPUs hold (--gpu-memory 8x80 shows it for those)"
    )


def describe_run(recipe: Recipe, source: str, gpus: Gpus | None = None) -> str:
    """What one run would do: what is trained how and where, what `gpus` will hold of it, and its
    cost.
    """
    check_adapters(recipe)
    if (problems := count_rows(recipe.data.train_data)) is not None:
        check_batch(problems, recipe.trainer.train_batch_size)
    held = "" if gpus is None else memory_table(recipe, gpus)
    parts = [_run_settings(recipe, source), held, _run_cost(recipe), _missing(recipe)]
    return "\n\n".join(part for part in parts if part)


def notes(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """What a user should know before a start: overrides without effect, and advice."""
    advice = advise(recipe, num_problems=count_rows(recipe.data.train_data))
    return [
        f"note: {note}"
        for note in [*recipes.notes(overrides), *recipes.engine_notes(recipe), *advice]
    ]


def _run_settings(recipe: Recipe, source: str) -> str:
    trainer, generator = recipe.trainer, recipe.generator
    algorithm, policy, critic = trainer.algorithm, trainer.policy, trainer.critic
    ppo = algorithm.advantage_estimator.name == "gae"
    kl = "loss" if algorithm.use_kl_loss else "reward" if algorithm.use_kl_in_reward else None
    critic_path = critic.model.path or policy.model.path
    engines = "inside the training processes"
    if not trainer.placement.colocate_all:
        engines = (
            f"apart: {generator.num_inference_engines} x "
            f"{generator.inference_engine_tensor_parallel_size} devices"
        )
    losses = f"{algorithm.advantage_estimator.name}, {algorithm.policy_loss_type.name} loss"
    batch = f"{trainer.train_batch_size} prompts x {generator.n_samples_per_prompt} samples"
    place = (
        f"{num_processes(recipe)} on {trainer.placement.device.name}; "
        f"{generator.backend.name} engines {engines}"
    )
    rows = [
        ["model", policy.model.path],
        ["policy", _learner(recipe, policy.model.lora, policy.optimizer_config.lr)],
        *(
            [
                [
                    "critic",
                    (
                        f"{_learner(recipe, critic.model.lora, critic.optimizer_config.lr)}, "
                        f"on {critic_path}"
                    ),
                ]
            ]
            * ppo
        ),
        ["algorithm", losses + (f", {algorithm.kl_estimator.name} KL in the {kl}" if kl else "")],
        ["batch", f"{batch}, {trainer.policy_mini_batch_size} prompts an update"],
        ["processes", f"{place}, sync {sync_mode(policy.model.lora).name}"],
        ["log", ", ".join(logger.name for logger in trainer.logger)],
    ]
    return f"run of {source}\n{_table(rows)}"


def _learner(recipe: Recipe, lora: LoRA, lr: float) -> str:
    if lora.rank == 0:
        return f"full fine-tuning, lr {show(lr)}"
    targets = target_modules(recipe, lora)
    where = targets if isinstance(targets, str) else ", ".join(targets)
    return f"LoRA rank {lora.rank}, alpha {show(lora.alpha)}, {where}, lr {show(lr)}"


def _run_cost(recipe: Recipe) -> str:
    found = run_cost(recipe)
    return (
        "cost: unknown until the data is there"
        if found is None
        else "cost\n"
        + _table([[name, text(take(found))] for name, take, text in _cost_lines([found])])
    )


def _settings(plan: Plan, source: str, again: int, at_once: str) -> str:
    sweep, size = plan.sweep, plan.space.size
    seeds = len(sweep.seeds)
    runs = (
        f"{plan.num_configurations} configurations x {seeds} seed{'s' * (seeds > 1)} = "
        f"{plan.num_runs} runs"
    )
    pruner = (
        "none"
        if sweep.pruner is None
        else " ".join(f"{k}={show(v)}" for k, v in sweep.pruner.items())
    )
    rows = [
        ["runs", f"{runs}, {at_once}"],
        ["metric", f"{sweep.metric}, {plan.direction}"],
        ["sampler", f"{sweep.sampler.name}, seed {plan.recipe.seed}"],
        ["pruner", pruner],
        ["seeds", ", ".join(map(str, sweep.seeds))],
    ]
    if again:
        best, fresh = again // len(plan.fresh_seeds), ", ".join(map(str, plan.fresh_seeds))
        rows.append(["confirm", f"the best {best} again, on seeds {fresh}: {again} runs more"])
    if size is not None and size < sweep.num_trials:
        rows.append(
            [
                "note",
                (
                    f"the space has no more than {size} configurations: "
                    f"sweep.num_trials={sweep.num_trials}"
                ),
            ]
        )
    return f"sweep of {source}\n{_table(rows)}"


def _space(plan: Plan) -> str:
    size = plan.space.size
    rows = [[axis.key, axis.kind, axis.describe()] for axis in plan.space.axes]
    return f"space ({'continuous' if size is None else f'{size} configurations'})\n{_table(rows)}"


def _first_trials(plan: Plan) -> str:
    names = short_names([axis.key for axis in plan.space.axes])
    seeds = len(plan.sweep.seeds)
    rows = [["trials" if seeds > 1 else "trial", *names.values()]]
    for place, params in enumerate(preview(plan, SHOWN)):
        first, last = place * seeds, (place + 1) * seeds - 1
        rows.append(
            [
                f"{first}-{last}" if last > first else str(first),
                *(show(params[key]) for key in names),
            ]
        )
    fixed = plan.sweep.sampler is not Sampler.tpe
    return f"first trials{'' if fixed else ' (later ones depend on results)'}\n{_table(rows)}"


def _costs(plan: Plan, source: str, runs: int) -> str:
    found = costs(plan)
    if not found:
        return "cost: unknown until the data is there"
    rows = [["", "a run", f"all {runs}"]]
    for name, take, text in _cost_lines(found):
        rows.append(
            [
                name,
                _span([text(take(c)) for c in found]),
                _span([text(take(c) * runs) for c in found]),
            ]
        )
    return "cost" + "\n" + _table([*rows, _time(plan, found, pace(plan, source), runs)])


def _cost_lines(
    found: Sequence[Cost],
) -> list[tuple[str, Callable[[Cost], float], Callable[[float], str]]]:
    """What is counted of a run: its name, how it is taken from a cost, and how it is written."""
    lines: list[tuple[str, Callable[[Cost], float], Callable[[float], str]]] = [
        ("steps", lambda c: c.steps, _count),
        ("training samples", lambda c: c.training_samples, _count),
        (
            "evaluation samples",
            lambda c: math.nan if c.evaluation_samples is None else c.evaluation_samples,
            _count,
        ),
        ("tokens, at most", lambda c: c.tokens, _count),
    ]
    if found[-1].flops is not None:
        lines.append(
            ("FLOPs, at most, roughly", lambda c: c.flops or 0.0, lambda value: f"{value:.0e}")
        )
    return lines


def _time(plan: Plan, found: Sequence[Cost], speed: Pace | None, runs: int) -> list[str]:
    if speed is None:
        return ["time", "unknown until a first run", ""]
    a_run = [cost.steps * speed.seconds_per_step for cost in found]
    together = min(trials_at_once(plan.recipe), runs)
    source = f"(median of {speed.num_runs} earlier run{'s' * (speed.num_runs > 1)})"
    total = _span([duration(seconds * runs / together) for seconds in a_run])
    return [
        "time",
        f"about {_span([duration(seconds) for seconds in a_run])}",
        f"about {total} {source}",
    ]


def _missing(recipe: Recipe) -> str:
    """Files that will be needed and are not there yet."""
    data = [
        path for path in (*recipe.data.train_data, *recipe.data.val_data) if locate(path) is None
    ]
    lines = [f"  {path}" for path in data]
    return (
        "\n".join([f"data still to be prepared ({invocation('prepare')})", *lines]) if lines else ""
    )


def _count(value: float) -> str:
    if math.isnan(value):
        return "not counted: no data yet"
    return f"{int(value):,}" if value < 1e7 else f"{value / 1e6:,.0f} M"


def _span(texts: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(texts))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)
