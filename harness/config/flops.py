"""Model FLOPs of training, by arithmetic on a model's parameters."""

from __future__ import annotations

from harness.config.schema import AdvantageEstimator, Recipe

FORWARD = 2
"""FLOPs per parameter and token of a forward pass."""


def training_flops(parameters: float, *, forwards: int, updates: int, full: bool) -> float:
    """Return model FLOPs per token of `forwards` forward passes and `updates` training passes.

    A forward pass takes 2 per parameter. A training pass is a forward pass and a backward pass,
    which takes 2 for activations and, in full fine-tuning, 2 for weights (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1). Attention and the adapters' own products are left out. Of a
    mixture of experts `parameters` are the active ones.
    """
    backward = 4 if full else 2
    return parameters * (forwards * FORWARD + updates * (FORWARD + backward))


def needs_old_logprobs(recipe: Recipe) -> bool:
    """Return whether a step recomputes the sampling policy's log-probabilities.

    It does where updates see another policy than the one that sampled (several updates a step, or
    dropout), and where rewards include KL.
    """
    trainer = recipe.trainer
    updates = trainer.update_epochs_per_batch * (
        trainer.train_batch_size // trainer.policy_mini_batch_size
    )
    dropout = trainer.policy.model.lora.dropout > 0
    return updates > 1 or dropout or trainer.algorithm.use_kl_in_reward


def flops_per_token(recipe: Recipe, parameters: float) -> float:
    """Return model FLOPs of a training step, per token of its batch.

    Every token is sampled, evaluated once more for old log-probabilities and for the reference
    where the recipe needs these, and trained on `update_epochs_per_batch` times. A critic adds one
    forward pass and its own training; it is taken to be as large as the policy.
    """
    trainer, epochs = recipe.trainer, recipe.trainer.update_epochs_per_batch
    algorithm, policy, critic = trainer.algorithm, trainer.policy.model, trainer.critic.model
    reference = algorithm.use_kl_loss or algorithm.use_kl_in_reward
    forwards = 1 + needs_old_logprobs(recipe) + reference
    flops = training_flops(
        parameters, forwards=forwards, updates=epochs, full=policy.lora.rank == 0
    )
    if algorithm.advantage_estimator is AdvantageEstimator["gae"]:
        full = critic.lora.rank == 0
        flops += training_flops(parameters, forwards=1, updates=epochs, full=full)
    return flops
