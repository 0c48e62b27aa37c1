"""LoRA layers that compute and keep less than PEFT's, and access to the base under an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch.nn.functional import linear


def base_model(model: Any) -> Any:
    """Return the transformers model under the adapters; a plain model is its own base."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Disable every adapter inside the block; a plain model is its own base."""
    with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
        yield


class LoRALinear(lora.Linear):
    """y = x W^T + b + s (x A^T) B^T in the dtype of x, which all layers keep once.

    PEFT casts x to the adapter's float32 in each layer. Where dropout, several adapters or another
    variant of LoRA need more, this computes as PEFT does.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return y `[..., out]` for x `[..., in]`."""
        name = self._single_adapter(x, kwargs)
        if name is None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.base_layer
        low, high = self.lora_A[name].weight, self.lora_B[name].weight
        # For many tokens W + s B A costs less than products with A and B. On a GPU it would be
        # another copy of the weights, and in half precision lose the adapter's digits.
        merges = x.device.type == "cpu" and x.dtype == low.dtype
        merges = (
            merges
            and x.numel() // base.weight.shape[1] * sum(base.weight.shape) > base.weight.numel()
        )
        function = _Merged if merges else _LowRank
        y: torch.Tensor = function.apply(x, base.weight, base.bias, low, high, self.scaling[name])
        return y

    def _single_adapter(self, x: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
        """Return the only adapter to compute with; None where PEFT must compute."""
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or names[0] in self.lora_variant or self.lora_bias[names[0]]:
            return None
        dropped = self.training and isinstance(self.lora_dropout[names[0]], torch.nn.Dropout)
        same = x.dtype == self.base_layer.weight.dtype and not torch.is_autocast_enabled(
            x.device.type
        )
        return names[0] if same and not dropped else None


class _LowRank(torch.autograd.Function):
    """The base's product plus the adapter's low-rank products, cast to the base's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low: torch.Tensor,
        high: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.scale, ctx.dtype = scale, low.dtype
        low, high = low.to(x.dtype), high.to(x.dtype)
        y, narrow = linear(x, weight, bias), linear(x, low)
        y.view(-1, y.shape[-1]).addmm_(narrow.flatten(0, -2), high.T, alpha=scale)
        ctx.save_for_backward(x, weight, low, high, narrow)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, low, high, narrow = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)
        d_narrow = (dy @ high).mul_(ctx.scale)
        dx = d_low = d_high = None
        if ctx.needs_input_grad[0]:
            dx = torch.addmm(dy @ weight, d_narrow, low).view_as(x)
        if ctx.needs_input_grad[3]:
            d_low = (d_narrow.T @ x.flatten(0, -2)).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            d_high = (dy.T @ narrow.flatten(0, -2)).to(ctx.dtype).mul_(ctx.scale)
        return dx, None, None, d_low, d_high, None


class _Merged(torch.autograd.Function):
    """The product with W + s B A, which is recomputed in the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low: torch.Tensor,
        high: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
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
