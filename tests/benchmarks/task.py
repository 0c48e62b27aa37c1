"""The task that all contenders train on, read from a recipe."""

from __future__ import annotations

from typing import Any

from harness.config import recipe as recipes
from harness.core.paths import PROJECT, locate


def task_of(recipe: str) -> dict[str, Any]:
    """Return a recipe's model, data, environment and sampling, as plain values.

    `samples` are those of each prompt, `kl` the weight of the KL term in the loss.
    """
    config = recipes.load(recipe)
    algorithm, generator = config.trainer.algorithm, config.generator
    files = (config.trainer.policy.model.path, config.data.train_data[0], config.data.val_data[0])
    model, train, held_out = (str(locate(file) or PROJECT / file) for file in files)
    return {
        "recipe": recipe,
        "model": model,
        "train": train,
        "held_out": held_out,
        "env": config.environment.env_class,
        "max_completion": generator.sampling_params.max_generate_length,
        "samples": generator.n_samples_per_prompt,
        "kl": algorithm.kl_loss_coef if algorithm.use_kl_loss else 0.0,
    }
