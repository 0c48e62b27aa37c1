"""PPO's critic: a value head and its own adapter, on the policy's base where they share one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.config.schema import Recipe
from rltrain.algorithms.losses import Totals, value_loss
from rltrain.algorithms.trained_model import Statistics, TrainedModel, mean_over
from rltrain.data.batch import Batch
from rltrain.data.seeding import stream_seed
from rltrain.models.logprobs import at_predictors, on_tokens
from rltrain.models.lora import base_model


class ValueHead(torch.nn.Module):
    """Map hidden states to values, in float32; starts small (std 1/(d + 1)).

    Ouyang et al. 2022, appendix C.
    """

    def __init__(self, hidden_size: int, seed: int) -> None:
        super().__init__()
        weight = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(weight / (hidden_size + 1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute `[..., d]` -> `[..., 1]`."""
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)


class Critic(TrainedModel):
    """Clipped value loss on an adapter (at rank 0, on a base of its own) and the value head."""

    name = "critic"
    span = "critic"
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
        hidden_size = base_model(model).config.hidden_size
        self.head = ValueHead(hidden_size, stream_seed(recipe.seed, "value_head")).to(model.device)
        trained = {**parameters} | {
            f"value_head.{name}": p for name, p in self.head.named_parameters()
        }
        optimizer = trainer.critic.optimizer_config
        super().__init__(model, adapter, trained, optimizer, total_steps, trainer.max_bad_steps)
        self.mini_batch_size = trainer.critic_mini_batch_size or trainer.policy_mini_batch_size
        self._clip_range = trainer.algorithm.value_clip

    def values(self, batch: Batch) -> torch.Tensor:
        """Return V(s_t) before each completion token, `[B, T]`, float32."""
        return on_tokens(at_predictors(self.model, batch, self.head).squeeze(-1).float(), batch)

    def totals(self, batch: Batch) -> Totals:
        """Return the divisors of a mini-batch's loss."""
        return Totals(
            tokens=max(1, batch.tokens), sequences=len(batch), max_length=batch.mask.shape[1]
        )

    def loss(self, micro: Batch, totals: Totals) -> tuple[torch.Tensor, Statistics]:
        """Return a micro-batch's share of the clipped value loss, a mean over tokens."""
        values, micro = self.values(micro), micro.to(self.model.device)
        assert micro.values is not None
        assert micro.returns is not None
        losses, clipped = value_loss(values, micro.values, micro.returns, self._clip_range)
        loss = (losses * micro.loss_mask).sum() / totals.tokens
        return loss, {
            "vf_loss": loss.detach().double(),
            "clip_ratio": mean_over(clipped * micro.loss_mask, totals.tokens),
        }
