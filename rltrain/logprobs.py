"""Log-probabilities and entropies of completions' tokens under a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from rltrain.attention import can_pack
from rltrain.batch import Batch
from rltrain.lora import base_model
from rltrain.packing import pack


def token_logprobs(model: Any, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probabilities of the completions' tokens, `[B, T]`, float32, zero where there is none.

    Logits are divided by the temperature, as the engine does before it samples.
    """
    logits, rows = predictions(model, batch)
    found = torch.log_softmax(logits.float() / temperature, dim=-1)[rows, _tokens(batch)]
    return on_tokens(found, batch)


def token_logprobs_and_entropy(model: Any, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropies (nats) of the distributions there, `[B, T]`, without gradient."""
    logits, rows = predictions(model, batch)
    found, entropy = _Chosen.apply(logits, rows, _tokens(batch), temperature)
    return on_tokens(found, batch), on_tokens(entropy[rows], batch)


def predictions(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model's head gives where a completion's token is predicted, `[L, ...]`, and which is whose, `[M]`.

    The M tokens are those of all completions in turn. Prompts are computed once for all that share them, and padding
    is not, where the model's attention allows it; prompts under dropout are each sequence's own.
    """
    if can_pack(model.config):
        packing = pack(batch, share=not _drops(model))
        with precision(model):
            output = model(
                input_ids=packing.input_ids,
                position_ids=packing.position_ids,
                # A mask of four dimensions is taken as it is; the packing says what this one does not.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.input_ids.device),
                packing=packing,
                use_cache=False,
                logits_to_keep=packing.predictors,
            )
        return output.logits[0], packing.rows
    with precision(model):
        output = model(
            input_ids=torch.cat([batch.prompt_ids, batch.completion_ids], dim=1),
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.completion_ids.shape[1] + 1,
        )
    logits: torch.Tensor = output.logits[:, :-1][batch.mask.bool()]
    return logits, torch.arange(len(logits), device=logits.device)


def on_tokens(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values of all completions' tokens in turn, `[M]`, at their places, `[B, T]`; zeros elsewhere."""
    return torch.zeros_like(batch.mask).masked_scatter(batch.mask.bool(), values)


def precision(model: Any) -> torch.autocast:
    """The precision a model computes in, where that is not its weights' own."""
    base = base_model(model)
    wanted = getattr(base, "computes_in", base.dtype)
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=wanted != base.dtype)


def _drops(model: Any) -> bool:
    """Whether the model's passes draw dropout masks."""
    adapter = model.peft_config[model.active_adapter].lora_dropout if isinstance(model, PeftModel) else 0.0
    return bool(model.training and (adapter > 0 or getattr(model.config, "attention_dropout", 0.0) > 0))


def _tokens(batch: Batch) -> torch.Tensor:
    return batch.completion_ids[batch.mask.bool()]


class _Chosen(torch.autograd.Function):
    """log softmax(z / temperature) at chosen places, and the rows' entropies; keeps one tensor of the logits' size."""

    @staticmethod
    def forward(
        ctx: Any, logits_LV: torch.Tensor, rows_M: torch.Tensor, tokens_M: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits_LV.float() if temperature == 1 else logits_LV.float() / temperature
        logprobs = torch.log_softmax(scaled, dim=-1)
        chosen, probabilities = logprobs[rows_M, tokens_M], logprobs.exp()
        entropy = -torch.linalg.vecdot(probabilities, logprobs)
        ctx.save_for_backward(probabilities, rows_M, tokens_M)
        ctx.temperature, ctx.dtype = temperature, logits_LV.dtype
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities, rows, tokens = ctx.saved_tensors
        given = gradients[0] / ctx.temperature
        # Accumulated by `index_put_`, whose order is fixed on a GPU too.
        of_rows = torch.zeros_like(probabilities[:, 0]).index_put_((rows,), given, accumulate=True)
        d_logits = probabilities * -of_rows.unsqueeze(1)
        d_logits.index_put_((rows, tokens), given, accumulate=True)
        return d_logits.to(ctx.dtype), None, None, None
