"""Log-probabilities and entropies of completion tokens, under the policy and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

from rltrain.data.batch import Batch, to_device
from rltrain.models.attention import can_pack, has_varlen
from rltrain.models.lora import adapter_off, base_model
from rltrain.models.memory import LOGITS_CHUNK
from rltrain.models.sequence_packing import pack

LOGITS_BYTES = LOGITS_CHUNK
"""Bytes of float32 logits computed at a time; a pass holds about three such tensors."""

# What models do to their logits after the head, and the setting that does nothing.
_AFTER_HEAD: dict[str, Any] = {
    "final_logit_softcapping": None,  # Gemma 2: c tanh(logits / c)
    "logits_scaling": 1.0,  # Granite: logits / s
    "logit_scale": 1.0,  # Cohere: logits * s
}


def token_logprobs(model: Any, batch: Batch, temperature: float) -> torch.Tensor:
    """Return log-probabilities of completion tokens, `[B, T]`, float32, zero on padding.

    Logits are divided by the temperature, as the engine does before it samples. The result is on
    the model's device.
    """
    return token_logprobs_and_entropy(model, batch, temperature)[0]


def token_logprobs_and_entropy(
    model: Any, batch: Batch, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `token_logprobs`, and the entropies (nats) of the distributions, `[B, T]`.

    The entropies have no gradient.
    """
    tokens = to_device(batch.completion_ids[batch.mask.bool()], model.device)
    head: Any = base_model(model).get_output_embeddings()
    softcap, divisor, scale = (
        getattr(model.config, name, neutral) for name, neutral in _AFTER_HEAD.items()
    )
    both = at_predictors(
        model,
        batch,
        lambda hidden: chosen_logprobs(
            hidden, head, tokens, temperature * divisor / scale, softcap
        ),
    )
    return on_tokens(both[:, 0], batch), on_tokens(both[:, 1].detach(), batch)


class Reference(Protocol):
    """The policy that KL is measured against."""

    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """Return log-probabilities under the reference, `[B, T]`."""
        ...


@dataclass(frozen=True)
class AdapterOff:
    """The reference of a LoRA run: the same model with its adapter disabled."""

    model: Any

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """Return log-probabilities under the base, `[B, T]`."""
        with adapter_off(self.model):
            return token_logprobs(self.model, batch, temperature)


@dataclass(frozen=True)
class FrozenAdapter:
    """The reference of a run that started from an adapter: a copy of it, on the same model.

    `trained` is the adapter that is active before and after.
    """

    model: Any
    adapter: str
    trained: str

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """Return log-probabilities under the copy, `[B, T]`."""
        self.model.set_adapter(self.adapter)
        try:
            return token_logprobs(self.model, batch, temperature)
        finally:
            self.model.set_adapter(self.trained)


@dataclass(frozen=True)
class FrozenModel:
    """The reference of full fine-tuning: another model with the initial weights."""

    model: Any

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """Return log-probabilities under that model, `[B, T]`."""
        return token_logprobs(self.model, batch, temperature)


def at_predictors(
    model: Any, batch: Batch, head: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Run the model with `head` in place of its own, on the tokens that predict completion tokens.

    `head` gets the hidden states `[M, d]` before each of the M completion tokens, in batch order,
    and its result `[M, ...]` is returned: what the model does after its head is left out. It runs
    inside the model's forward pass, where FSDP has gathered the weights. Where the model's
    attention allows it, padding is not computed and a shared prompt is computed once, except under
    dropout. The batch may be on the CPU: only what the pass needs is moved.
    """
    device = model.device
    if can_pack(model.config):
        # FlashAttention's call has no soft cap.
        capped = getattr(model.config, "attn_logit_softcapping", None) is not None
        varlen = has_varlen(device, computing_dtype(model)) and not capped
        packing = pack(batch, share=not _drops(model), varlen=varlen, device=device)
        inputs = {
            "input_ids": packing.input_ids,
            "position_ids": packing.position_ids,
            # transformers passes a mask of four dimensions on; the packing masks instead.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            "packing": packing,
            "logits_to_keep": packing.predictors,
        }

        def select(hidden: torch.Tensor) -> torch.Tensor:
            # `embedding` sums the gradients of a token that predicts several in a fixed order.
            return torch.nn.functional.embedding(packing.rows, hidden[0])
    else:
        inputs = {
            "input_ids": torch.cat([batch.prompt_ids, batch.completion_ids], dim=1).to(device),
            "attention_mask": batch.attention_mask.to(device),
            "position_ids": batch.position_ids.to(device),
            "logits_to_keep": batch.completion_ids.shape[1] + 1,
        }
        mask = batch.mask.bool().to(device)

        def select(hidden: torch.Tensor) -> torch.Tensor:
            return hidden[:, :-1][mask]

    base: Any = base_model(model)
    original = base.get_output_embeddings()
    after_head = [
        (owner, name, getattr(owner, name))
        for owner in (base, base.config)
        for name in _AFTER_HEAD
        if hasattr(owner, name)
    ]
    base.set_output_embeddings(_Head(lambda hidden: head(select(hidden))))
    try:
        for owner, name, _ in after_head:
            setattr(owner, name, _AFTER_HEAD[name])
        with precision(model):
            result: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    finally:
        base.set_output_embeddings(original)
        for owner, name, value in after_head:
            setattr(owner, name, value)
    return result


class _Head(torch.nn.Module):
    """A function as a module; adds a batch dimension to its result."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.compute(hidden).unsqueeze(0)


def chosen_logprobs(
    hidden: torch.Tensor,
    head: Any,
    tokens: torch.Tensor,
    temperature: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return log softmax(head(h) / temperature) at one token each, and entropies, `[M, 2]`.

    With a soft cap c, c tanh(head(h) / c) takes the place of head(h) (Gemma 2, arXiv 2408.00118).
    `hidden` is `[M, d]`, `tokens` `[M]`; results are float32. Rows are computed in chunks, so that
    no `[M, V]` tensor is made. Under a frozen head the gradient of log p(y) by h, (W[y] - p W) /
    temperature, scales linearly with the incoming gradient: it is computed in the forward pass and
    kept, `[M, d]`, so that nothing is computed twice. A trained head is recomputed in the backward
    pass.
    """
    if not len(hidden):
        return hidden.new_zeros((0, 2), dtype=torch.float32)
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else hidden.shape[1]
    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    if type(head) is torch.nn.Linear and not head.weight.requires_grad:
        chosen, entropy = _Chosen.apply(
            hidden, head.weight, head.bias, tokens, temperature, softcap, rows
        )
        return torch.stack([chosen, entropy], dim=1)

    def part(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        entropy = -torch.linalg.vecdot(logprobs.detach().exp(), logprobs.detach())
        return torch.stack([logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy], dim=1)

    parts = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([checkpoint(part, *chunk, use_reentrant=False) for chunk in parts])


class _Chosen(torch.autograd.Function):
    """`chosen_logprobs` under a frozen head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        temperature: float,
        softcap: float | None,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(chosen)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            index = tokens[chunk].unsqueeze(1)
            logits = torch.nn.functional.linear(hidden[chunk], weight, bias).float()
            if softcap is not None:
                tanh = torch.tanh(logits.div_(softcap))
                logits = softcap * tanh
            logprobs = torch.log_softmax(
                logits if temperature == 1 else logits.div_(temperature), dim=-1
            )
            del logits
            chosen[chunk] = logprobs.gather(1, index).squeeze(1)
            probabilities = logprobs.exp()
            entropy[chunk] = torch.linalg.vecdot(probabilities, logprobs).neg_()
            del logprobs
            if gradient is not None:
                # 1 - p in float32: in half precision W[y] - p W would lose its digits.
                difference = probabilities.neg_()
                difference.scatter_add_(1, index, torch.ones_like(index, dtype=difference.dtype))
                if softcap is not None:
                    difference.mul_(1 - tanh.square_())
                gradient[chunk] = (difference.to(weight.dtype) @ weight).div_(temperature)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0].unsqueeze(1)).to(gradient.dtype), *(None,) * 6


def on_tokens(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Scatter values of all completion tokens, `[M]` in batch order, to `[B, T]`.

    Padding is zero.
    """
    # Indices from the CPU's mask: the backward pass of `masked_scatter` would wait for the GPU to
    # count it.
    indices = to_device(batch.mask.flatten().nonzero().squeeze(1), values.device)
    return values.new_zeros(batch.mask.numel()).scatter(0, indices, values).view(batch.mask.shape)


def computing_dtype(model: Any) -> torch.dtype:
    """Return the dtype of a model's products: its weights', unless it was loaded for another."""
    base = base_model(model)
    dtype: torch.dtype = getattr(base, "computes_in", base.dtype)
    return dtype


def precision(model: Any) -> torch.autocast:
    """Return an autocast context for a model that computes in another dtype than its weights'."""
    differs = computing_dtype(model) != base_model(model).dtype
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=differs)


def _drops(model: Any) -> bool:
    """Return whether the model's passes use dropout, which only an adapter can have."""
    return (
        model.training
        and isinstance(model, PeftModel)
        and model.peft_config[model.active_adapter].lora_dropout > 0
    )
