"""PEFT's models and LoRA layer: the base under an adapter; one product in place of three for many tokens."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch.nn.functional import linear


def base_model(model: Any) -> Any:
    """The transformers model that adapters are on; a plain model is its own base."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class LoRALinear(lora.Linear):
    """y = x (W + s B A)^T + b: the sum is made for each pass, which costs less than x A^T B^T for many tokens.

    Where that does not hold, or dropout, another dtype or several adapters ask for more, it computes as PEFT does.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        name = self._alone(x, kwargs)
        if name is None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.base_layer
        low, high = self.lora_A[name].weight, self.lora_B[name].weight
        y: torch.Tensor = _Adapted.apply(x, base.weight, base.bias, low, high, self.scaling[name])
        return y

    def _alone(self, x: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
        """The adapter to add to the weight; None: nothing here may be added, or it would not pay."""
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        weight = self.base_layer.weight
        if len(names) != 1 or names[0] in self.lora_variant or self.lora_bias[names[0]]:
            return None
        same = x.dtype == weight.dtype == self.lora_A[names[0]].weight.dtype and not torch.is_autocast_enabled()
        dropped = self.training and isinstance(self.lora_dropout[names[0]], torch.nn.Dropout)
        # Products of x with A and B against one of B with A, per unit of rank.
        pays = x.numel() // weight.shape[1] * sum(weight.shape) > weight.numel()
        return names[0] if same and pays and not dropped else None


class _Adapted(torch.autograd.Function):
    """The layer's product and its gradients; the sum of the weights is made again for the backward pass, not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, low: torch.Tensor,
        high: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, low, high)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, high, low, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, low, high = ctx.saved_tensors
        dy, flat = gradients[0].flatten(0, -2), x.flatten(0, -2)
        dx = d_low = d_high = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ torch.addmm(weight, high, low, alpha=ctx.scale)).view_as(x)
        # Narrow products are up to three times as fast with the rank's axis first.
        if ctx.needs_input_grad[3]:
            d_low = (ctx.scale * (high.T @ dy.T)) @ flat
        if ctx.needs_input_grad[4]:
            d_high = ((ctx.scale * (low @ flat.T)) @ dy).T
        return dx, None, None, d_low, d_high, None
