"""The text of `--dry-run`: settings, space, first trials, memory and cost.

Imports neither torch nor vllm nor ray.
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
from sweeps.cost import Cost, costs, pace, run_cost
from sweeps.study import sizing
from sweeps.study.plan import Plan, preview
from sweeps.study.space import short_names, show

NUM_FIRST_TRIALS = 8


def describe(plan: Plan, source: str, gpus: Gpus | None = None, *, confirm: int = 0) -> str:
    """Return the dry run of a sweep.

    Args:
        source: the recipe's path or name.
        gpus: the GPUs to plan for; None: the sweep uses none.
        confirm: how many of the best configurations will run again on fresh seeds.
    """
    check_adapters(plan.recipe)
    confirm_runs = min(confirm, plan.num_configurations) * len(plan.fresh_seeds)
    # A cluster's GPUs are not known before it is reached.
    if gpus is None or gpus.count > 0:
        plan = sizing.settle(plan, gpus)
        slots = sizing.describe_slots(plan.recipe)
    elif plan.sweep.max_concurrent:
        slots = f"in {plan.sweep.max_concurrent} packs"
    else:
        slots = "in as many packs as the GPUs hold (--gpu-memory 8x80 shows it for those)"
    size = plan.space.size
    extent = "continuous" if size is None else f"{size} configurations"
    axes = [[axis.key, axis.kind, axis.describe()] for axis in plan.space.axes]
    parts = [
        _sweep_settings(plan, source, confirm_runs, slots),
        f"space ({extent})\n{_table(axes)}",
        _first_trials(plan),
    ]
    if gpus is not None:
        parts += [memory_table(trial, gpus) for trial in sizing.largest_trials(plan)]
    parts += [_sweep_cost(plan, source, plan.num_runs + confirm_runs), _missing_data(plan.recipe)]
    return "\n\n".join(part for part in parts if part)


def check_fits(plan: Plan, gpus: Gpus | None) -> None:
    """Raise UserError for a sweep whose largest trials do not fit the GPUs."""
    if gpus is not None and gpus.count > 0:
        for trial in sizing.largest_trials(sizing.settle(plan, gpus)):
            check_fit(trial, gpus)


def describe_run(recipe: Recipe, source: str, gpus: Gpus | None = None) -> str:
    """Return the dry run of one run: its settings, the memory it needs on `gpus`, and its cost."""
    check_adapters(recipe)
    if (problems := count_rows(recipe.data.train_data)) is not None:
        check_batch(problems, recipe.trainer.train_batch_size)
    memory = "" if gpus is None else memory_table(recipe, gpus)
    cost = run_cost(recipe)
    if cost is None:
        cost_text = "cost: unknown until the data is there"
    else:
        rows = [[name, write(value(cost))] for name, value, write in _cost_lines([cost])]
        cost_text = f"cost\n{_table(rows)}"
    parts = [_run_settings(recipe, source), memory, cost_text, _missing_data(recipe)]
    return "\n\n".join(part for part in parts if part)


def notes(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """Return what a user should know before a start: overrides without effect, and advice."""
    advice = advise(recipe, num_problems=count_rows(recipe.data.train_data))
    return [
        f"note: {note}"
        for note in [*recipes.notes(overrides), *recipes.engine_notes(recipe), *advice]
    ]


def _run_settings(recipe: Recipe, source: str) -> str:
    trainer, generator = recipe.trainer, recipe.generator
    algorithm, policy, critic = trainer.algorithm, trainer.policy, trainer.critic
    rows = [
        ["model", policy.model.path],
        ["policy", _adapter(recipe, policy.model.lora, policy.optimizer_config.lr)],
    ]
    if algorithm.advantage_estimator.name == "gae":
        adapter = _adapter(recipe, critic.model.lora, critic.optimizer_config.lr)
        rows.append(["critic", f"{adapter}, on {critic.model.path or policy.model.path}"])
    losses = f"{algorithm.advantage_estimator.name}, {algorithm.policy_loss_type.name} loss"
    if algorithm.use_kl_loss or algorithm.use_kl_in_reward:
        where = "loss" if algorithm.use_kl_loss else "reward"
        losses += (
            f", {algorithm.kl_estimator.name} KL to the {trainer.reference.name} in the {where}"
        )
    engines = "inside the training processes"
    if not trainer.placement.colocate_all:
        engines = (
            f"apart: {generator.num_inference_engines} x "
            f"{generator.inference_engine_tensor_parallel_size} devices"
        )
    batch = f"{trainer.train_batch_size} prompts x {generator.n_samples_per_prompt} samples"
    processes = f"{num_processes(recipe)} on {trainer.placement.device.name}"
    sync = sync_mode(policy.model.lora).name
    rows += [
        ["algorithm", losses],
        ["batch", f"{batch}, {trainer.policy_mini_batch_size} prompts an update"],
        ["processes", f"{processes}; {generator.backend.name} engines {engines}, sync {sync}"],
        ["log", ", ".join(logger.name for logger in trainer.logger)],
    ]
    return f"run of {source}\n{_table(rows)}"


def _adapter(recipe: Recipe, lora: LoRA, lr: float) -> str:
    if lora.rank == 0:
        return f"full fine-tuning, lr {show(lr)}"
    targets = target_modules(recipe, lora)
    modules = targets if isinstance(targets, str) else ", ".join(targets)
    start = getattr(lora, "adapter_path", None)
    from_start = "" if start is None else f", from {start}"
    return f"LoRA rank {lora.rank}, alpha {show(lora.alpha)}, {modules}, lr {show(lr)}{from_start}"


def _sweep_settings(plan: Plan, source: str, confirm_runs: int, slots: str) -> str:
    sweep, size = plan.sweep, plan.space.size
    seeds = len(sweep.seeds)
    runs = (
        f"{plan.num_configurations} configurations x {seeds} seed{'s' * (seeds > 1)} = "
        f"{plan.num_runs} runs"
    )
    pruner = "none"
    if sweep.pruner is not None:
        pruner = " ".join(f"{key}={show(value)}" for key, value in sweep.pruner.items())
    rows = [
        ["runs", f"{runs}, {slots}"],
        ["metric", f"{sweep.metric}, {plan.direction}"],
        ["sampler", f"{sweep.sampler.name}, seed {plan.recipe.seed}"],
        ["pruner", pruner],
        ["seeds", ", ".join(map(str, sweep.seeds))],
    ]
    if confirm_runs:
        best = confirm_runs // len(plan.fresh_seeds)
        fresh = ", ".join(map(str, plan.fresh_seeds))
        rows.append(
            ["confirm", f"the best {best} again, on seeds {fresh}: {confirm_runs} more runs"]
        )
    if size is not None and size < sweep.num_trials:
        note = f"the space has only {size} configurations: sweep.num_trials={sweep.num_trials}"
        rows.append(["note", note])
    return f"sweep of {source}\n{_table(rows)}"


def _first_trials(plan: Plan) -> str:
    names = short_names([axis.key for axis in plan.space.axes])
    seeds = len(plan.sweep.seeds)
    rows = [["trials" if seeds > 1 else "trial", *names.values()]]
    for configuration, params in enumerate(preview(plan, NUM_FIRST_TRIALS)):
        first, last = configuration * seeds, (configuration + 1) * seeds - 1
        numbers = f"{first}-{last}" if last > first else str(first)
        rows.append([numbers, *(show(params[key]) for key in names)])
    fixed = plan.sweep.sampler is not Sampler.tpe
    return f"first trials{'' if fixed else ' (later ones depend on results)'}\n{_table(rows)}"


def _sweep_cost(plan: Plan, source: str, runs: int) -> str:
    """Return a run's cost, from the cheapest to the most expensive, and all runs' together."""
    extremes = costs(plan)
    if not extremes:
        return "cost: unknown until the data is there"
    rows = [["", "a run", f"all {runs}"]]
    for name, value, write in _cost_lines(extremes):
        of_run = [write(value(cost)) for cost in extremes]
        of_all = [write(value(cost) * runs) for cost in extremes]
        rows.append([name, _span(of_run), _span(of_all)])
    earlier = pace(plan, source)
    if earlier is None:
        rows.append(["time", "unknown until a first run", ""])
    else:
        seconds = [cost.steps * earlier.seconds_per_step for cost in extremes]
        slots = min(sizing.num_slots(plan.recipe), runs)
        of_run = [duration(each) for each in seconds]
        of_all = [duration(each * runs / slots) for each in seconds]
        basis = f"(median of {earlier.num_runs} earlier run{'s' * (earlier.num_runs > 1)})"
        rows.append(["time", f"about {_span(of_run)}", f"about {_span(of_all)} {basis}"])
    return f"cost\n{_table(rows)}"


def _cost_lines(
    run_costs: Sequence[Cost],
) -> list[tuple[str, Callable[[Cost], float], Callable[[float], str]]]:
    """Return the lines of a cost table: a name, the value in a cost, and how to write it."""
    lines: list[tuple[str, Callable[[Cost], float], Callable[[float], str]]] = [
        ("steps", lambda cost: cost.steps, _count),
        ("training samples", lambda cost: cost.training_samples, _count),
        (
            "evaluation samples",
            lambda cost: math.nan if cost.evaluation_samples is None else cost.evaluation_samples,
            _count,
        ),
        ("tokens, at most", lambda cost: cost.tokens, _count),
    ]
    if run_costs[-1].flops is not None:
        lines.append(("FLOPs, at most, roughly", lambda cost: cost.flops or 0.0, "{:.0e}".format))
    return lines


def _missing_data(recipe: Recipe) -> str:
    """Return a list of the data files that do not exist yet."""
    paths = [*recipe.data.train_data, *recipe.data.val_data]
    lines = [f"  {path}" for path in paths if locate(path) is None]
    if not lines:
        return ""
    return "\n".join([f"data still to be prepared ({invocation('prepare')})", *lines])


def _count(value: float) -> str:
    if math.isnan(value):
        return "not counted: no data yet"
    return f"{int(value):,}" if value < 1e7 else f"{value / 1e6:,.0f} M"


def _span(texts: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(texts))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)
