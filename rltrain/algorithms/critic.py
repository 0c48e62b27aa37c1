"""PPO's critic: a value head and an adapter of its own, on the policy's base where they
share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from harness.config.schema import Recipe
from rltrain.algorithms.learner import Learner, Statistics, mean_over
from rltrain.algorithms.losses import Totals, value_loss
from rltrain.data.batch import Batch
from rltrain.data.seeding import stream_seed
from rltrain.models.logprobs import at_predictors, on_tokens
from rltrain.models.lora import base_model


class ValueHead(torch.nn.Module):
    """Hidden state to value, float32 throughout; starts small (Ouyang et al. 2022, appendix C: std
    1/(d + 1)).
    """

    def __init__(self, hidden_size: int, seed: int) -> None:
        super().__init__()
        weight = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(weight / (hidden_size + 1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., d]` -> `[..., 1]`."""
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)


class Critic(Learner):
    """Trains the clipped value loss: its adapter (or, at rank 0, a base of its own) and the value
    head.
    """

    name = "critic"
    prefix = "critic/"

    def __init__(
        self,
        adapter: str,
        model: Any,
        parameters: Mapping[str, torch.nn.Parameter],
        recipe: Recipe,
        total_steps: int,
    ) -> None:
        trainer = recipe.trainer
        self.head = ValueHead(
            base_model(model).config.hidden_size, stream_seed(recipe.seed, "value_head")
        ).to(model.device)
        heads = {f"value_head.{name}": p for name, p in self.head.named_parameters()}
        super().__init__(
            {**parameters, **heads},
            trainer.critic.optimizer_config,
            total_steps,
            trainer.max_bad_steps,
        )
        self.adapter = adapter
        self.model = model
        self.mini_batch_size = trainer.critic_mini_batch_size or trainer.policy_mini_batch_size
        self._clip_range = trainer.algorithm.value_clip

    def activate(self) -> None:
        """Make its adapter the one that computes and trains."""
        if isinstance(self.model, PeftModel):
            self.model.set_adapter(self.adapter)

    def values(self, batch: Batch) -> torch.Tensor:
        """V(s_t) before each of the completions' tokens, `[B, T]`, float32."""
        return on_tokens(at_predictors(self.model, batch, self.head).squeeze(-1).float(), batch)

    def totals(self, batch: Batch) -> Totals:
        """The divisors of a mini-batch's loss."""
        return Totals(
            tokens=max(1, batch.tokens), sequences=len(batch), max_length=batch.mask.shape[1]
        )

    def loss(self, micro: Batch, totals: Totals) -> tuple[torch.Tensor, Statistics]:
        """A micro-batch's share of the clipped value loss, a mean over tokens."""
        values, micro = self.values(micro), micro.to(self.model.device)
        assert micro.values is not None
        assert micro.returns is not None
        losses, held = value_loss(values, micro.values, micro.returns, self._clip_range)
        loss = (losses * micro.loss_mask).sum() / totals.tokens
        return loss, {
            "vf_loss": loss.detach().double(),
            "clip_ratio": mean_over(held * micro.loss_mask, totals.tokens),
        }
