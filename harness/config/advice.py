"""Warnings before a run about unusual settings of LoRA in reinforcement learning.

No warning stops a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.config.schema import LoRA, Recipe
from harness.config.shapes import ATTENTION, MLP, read_config, shape_of
from harness.config.validate import exclude_modules, target_modules
from harness.core.paths import locate

REGRET = "LoRA Without Regret, Schulman et al. 2025, thinkingmachines.ai/blog/lora"
SKYRL = "SkyRL's LoRA guide"
MISMATCH = "Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
GRPO = "DeepSeekMath, Shao et al. 2024, section 4.1"
SAMPLING = "the default of SkyRL, TRL and verl"

# Recipes of SkyRL, TRL and verl train all weights by RL at 1e-6; the best rate of LoRA is ten times
# that.
FULL_LR = 1e-6
LORA_LR = 1e-5
# With the embedded model, 1.6 times the rule's rate learns best and 16 times collapses.
OVER_RULE = 5
# The rule's exponents, by model family.
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
# In every family.
RULE_AT_2000 = 5e-4
LARGE_RANK = 128
ALPHA = 32
ALPHA_FACTOR = 4
BITS_PER_PARAMETER = 2
# SkyRL's LoRA example has 256 prompts x 5 samples = 1280 an update; no limit is published for RL.
LARGE_BATCH = 2048
TEMPERATURES = (0.7, 1.3)


@dataclass(frozen=True, slots=True)
class Advice:
    """A warning about a recipe's key: what is unusual, what is usual, and the source of that."""

    text: str
    source: str
    key: str

    def __str__(self) -> str:
        return f"{self.text} ({self.source})"


def advise(
    recipe: Recipe,
    *,
    num_parameters: int | None = None,
    num_problems: int | None = None,
    hidden_size: int | None = None,
) -> list[Advice]:
    """Return warnings about a recipe's values, except for keys that its sweep varies.

    `num_parameters` of the adapter and `hidden_size` of the model are looked up by default.
    `num_problems` is the size of the training data, for runs counted in epochs.
    """
    path = recipe.trainer.policy.model.path
    if locate(path) is None:
        # A hub model's name mostly contains its type.
        family = next((name for name in EXPONENTS if name in path.lower()), "")
        config: dict[str, Any] = {"model_type": family}
    else:
        config = stored_config(path)
    if hidden_size is not None:
        config["hidden_size"] = hidden_size
    checks = [_sampling(recipe), _group(recipe)]
    if recipe.trainer.policy.model.lora.rank == 0:
        checks.append(_full_learning_rate(recipe))
    else:
        checks += [_learning_rate(recipe, config), _batch(recipe)]
        checks.append(_capacity(recipe, num_parameters, num_problems))
    roles = (
        ["policy", "critic"]
        if recipe.trainer.algorithm.advantage_estimator.name == "gae"
        else ["policy"]
    )
    for role in roles:
        lora: LoRA = getattr(recipe.trainer, role).model.lora
        if lora.rank > 0:
            checks.append(_adapter(recipe, f"trainer.{role}.model.lora", lora))
    swept = set(recipe.sweep.space) if recipe.sweep is not None else set()
    return [advice for check in checks for advice in check if advice.key not in swept]


def rule_learning_rate(config: dict[str, Any]) -> float | None:
    """Return LoRA's learning rate, 5e-5 x 10 x (2000/hidden)^p with p by model family.

    It was fitted to supervised runs by Schulman et al. 2025 (tinker-cookbook). None for a family
    that it was not fitted to.
    """
    family = next(
        (name for name in EXPONENTS if str(config.get("model_type", "")).startswith(name)), None
    )
    if family is None or "hidden_size" not in config:
        return None
    return float(RULE_AT_2000 * (2000 / config["hidden_size"]) ** EXPONENTS[family])


def adapted_modules(targets: Any, excluded: Any) -> list[str]:
    """Return the projections of a Llama or Qwen model that PEFT would adapt.

    It is empty where the modules have other names.
    """
    paths = {name: f"model.layers.0.self_attn.{name}" for name in ATTENTION}
    paths |= {name: f"model.layers.0.mlp.{name}" for name in MLP}
    return [
        name
        for name, path in paths.items()
        if _matches(targets, path) and not _matches(excluded, path)
    ]


def _learning_rate(recipe: Recipe, config: dict[str, Any]) -> Iterator[Advice]:
    key, lr = "trainer.policy.optimizer_config.lr", recipe.trainer.policy.optimizer_config.lr
    rule = rule_learning_rate(config)
    known = f"{RULE_AT_2000:g} at hidden size 2000"
    if rule is not None:
        known = f"{rule:.1e} at hidden size {config['hidden_size']}"
    most = OVER_RULE * (rule or RULE_AT_2000)
    if lr < LORA_LR:
        yield Advice(
            f"{key}={lr:g} is below {LORA_LR:g}: LoRA's best learning rate is about 10 times full "
            f"fine-tuning's, which is {FULL_LR:g} in most RL recipes (the rule fitted to "
            f"supervised runs: {known})",
            f"{REGRET}; {SKYRL}",
            key,
        )
    elif lr > most:
        yield Advice(
            f"{key}={lr:g} is above {most:.1e}, {OVER_RULE} times the rule fitted to "
            f"supervised runs ({known}): "
            "at 16 times the rule the embedded model collapsed",
            f"{REGRET}; the quickstart's sweep",
            key,
        )


def _full_learning_rate(recipe: Recipe) -> Iterator[Advice]:
    key, lr = "trainer.policy.optimizer_config.lr", recipe.trainer.policy.optimizer_config.lr
    if lr > LORA_LR:
        yield Advice(
            f"{key}={lr:g} is above {LORA_LR:g}, a learning rate for LoRA: training all "
            "weights (rank 0) by "
            f"RL usually takes {FULL_LR:g}",
            f"{REGRET}; {SKYRL}",
            key,
        )


def _capacity(
    recipe: Recipe, num_parameters: int | None, num_problems: int | None
) -> Iterator[Advice]:
    """Warn of a small rank.

    RL teaches about one bit an episode, and an adapter holds about two bits a parameter.
    """
    trainer, lora = recipe.trainer, recipe.trainer.policy.model.lora
    if num_parameters is None and (shape := shape_of(trainer.policy.model.path)) is not None:
        num_parameters = shape.adapter_parameters(
            lora.rank, _modules(recipe, lora), lora.expert_rank
        )
    steps = trainer.max_steps
    if steps is None and num_problems is not None:
        steps = trainer.epochs * (num_problems // trainer.train_batch_size)
    if not num_parameters or steps is None:
        return
    episodes = steps * trainer.train_batch_size * recipe.generator.n_samples_per_prompt
    bits = BITS_PER_PARAMETER * num_parameters
    if episodes > bits:
        key = "trainer.policy.model.lora.rank"
        yield Advice(
            f"{key}={lora.rank} may be too small: {episodes} episodes teach up to "
            f"{episodes} bits, and the adapter's "
            f"{num_parameters} parameters hold about {bits}; rank "
            f"{-(-lora.rank * episodes // bits)} holds them",
            REGRET,
            key,
        )


def _batch(recipe: Recipe) -> Iterator[Advice]:
    prompts, samples = recipe.trainer.policy_mini_batch_size, recipe.generator.n_samples_per_prompt
    if prompts * samples > LARGE_BATCH:
        key = "trainer.policy_mini_batch_size"
        yield Advice(
            f"{key}={prompts} with {samples} samples a prompt is {prompts * samples} "
            "sequences an update, above "
            f"{LARGE_BATCH}: LoRA bears large batches less well than full fine-tuning, at "
            "every rank (no limit is "
            "published for RL; SkyRL's example has 1280)",
            f"{REGRET}; {SKYRL}",
            key,
        )


def _adapter(recipe: Recipe, prefix: str, lora: LoRA) -> Iterator[Advice]:
    if lora.rank > LARGE_RANK:
        yield Advice(
            f"{prefix}.rank={lora.rank} is above {LARGE_RANK}: RL learns as well at far "
            "lower ranks, even 1, "
            "at less memory and time; 8 to 64 are common",
            f"{REGRET}; {SKYRL}",
            f"{prefix}.rank",
        )
    if not ALPHA / ALPHA_FACTOR <= lora.alpha <= ALPHA * ALPHA_FACTOR:
        yield Advice(
            f"{prefix}.alpha={lora.alpha:g} is far from {ALPHA}: the update is alpha/rank "
            "B A, so alpha acts like a "
            "learning rate, and the advice for learning rates no longer holds",
            REGRET,
            f"{prefix}.alpha",
        )
    if lora.dropout > 0:
        yield Advice(
            f"{prefix}.dropout={lora.dropout:g} is above 0: what is trained is not what "
            "sampled, so the ratio is not 1 "
            "even at a batch's first update",
            f"{SKYRL} has 0; the mismatch of {MISMATCH}",
            f"{prefix}.dropout",
        )
    modules = _modules(recipe, lora)
    if modules and not set(modules) & set(MLP):
        key = (
            "trainer.target_modules" if lora.target_modules is None else f"{prefix}.target_modules"
        )
        yield Advice(
            f"{key}={target_modules(recipe, lora)} adapts attention alone "
            f"({', '.join(modules)}): worse than "
            "the MLP alone at equal parameters; all-linear has both",
            f"{REGRET}; {SKYRL}",
            key,
        )


def _sampling(recipe: Recipe) -> Iterator[Advice]:
    prefix, sampling = "generator.sampling_params", recipe.generator.sampling_params
    truncations = {
        "top_p": (sampling.top_p, sampling.top_p < 1, "1"),
        "top_k": (sampling.top_k, sampling.top_k > 0, "-1"),
    }
    for name, (value, truncates, off) in truncations.items():
        if truncates:
            yield Advice(
                f"{prefix}.{name}={value:g} instead of {off} (off) samples from a part of "
                "the distribution: engine and "
                "trainer then disagree on every log-probability",
                MISMATCH,
                f"{prefix}.{name}",
            )
    low, high = TEMPERATURES
    if not low <= sampling.temperature <= high:
        yield Advice(
            f"{prefix}.temperature={sampling.temperature:g} is outside {low:g} to "
            f"{high:g}: it is the policy at this "
            "temperature that is trained, which explores too little when low and samples "
            "noise when high; 1 is usual",
            SAMPLING,
            f"{prefix}.temperature",
        )


def _group(recipe: Recipe) -> Iterator[Advice]:
    key = "generator.n_samples_per_prompt"
    if (
        recipe.trainer.algorithm.advantage_estimator.name == "grpo"
        and recipe.generator.n_samples_per_prompt == 1
    ):
        yield Advice(
            f"{key}=1 is below 2: grpo compares the samples of a prompt, so every "
            "advantage is 0 and nothing "
            "is learned",
            GRPO,
            key,
        )


def _modules(recipe: Recipe, lora: LoRA) -> list[str]:
    return adapted_modules(target_modules(recipe, lora), exclude_modules(recipe, lora))


def _matches(targets: Any, path: str) -> bool:
    """Return whether a module is among targets: a named set, a regex over its path, or names."""
    sets = {
        "all-linear": (*ATTENTION, *MLP),
        "attention": ATTENTION,
        "mlp": MLP,
        "experts": MLP,
    }
    if isinstance(targets, str) and targets not in sets:
        try:
            return re.fullmatch(targets, path) is not None
        except re.error:
            return False
    names = sets[targets] if isinstance(targets, str) else targets or ()
    return any(path == name or path.endswith(f".{name}") for name in names)


def stored_config(path: str) -> dict[str, Any]:
    """Return a model's type and sizes from its config.json; {} where there is none here."""
    return {
        name: value
        for name, value in read_config(path).items()
        if name == "model_type" or (type(value) is int and value > 0)
    }
