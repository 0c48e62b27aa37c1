"""Log-probabilities and entropies of completions' tokens under a causal language model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

from rltrain.data.batch import Batch, to_device
from rltrain.models.attention import can_pack, has_varlen
from rltrain.models.lora import base_model
from rltrain.models.memory import LOGITS_CHUNK
from rltrain.models.sequence_packing import pack

LOGITS_BYTES = LOGITS_CHUNK
"""Float32 logits made at a time; a pass holds about three such tensors, never one of all tokens by
the vocabulary.
"""

# Models with one of these set change their logits after the head (Gemma 2, Granite, Cohere).
_CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def token_logprobs(model: Any, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probabilities of the completions' tokens, `[B, T]`, float32, zero where there is none.

    Logits are divided by the temperature, as the engine does before it samples. The result is on
    the model's device.
    """
    return token_logprobs_and_entropy(model, batch, temperature)[0]


def token_logprobs_and_entropy(
    model: Any, batch: Batch, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropies (nats) of the distributions there, `[B, T]`, without
    gradient.
    """
    tokens = to_device(batch.completion_ids[batch.mask.bool()], model.device)
    head: Any = base_model(model).get_output_embeddings()
    if any(getattr(model.config, name, None) is not None for name in _CHANGES_LOGITS):
        logits = at_predictors(model, batch, head)
        both = chosen_logprobs(logits, torch.nn.Identity(), tokens, temperature)
    else:
        both = at_predictors(
            model, batch, lambda hidden: chosen_logprobs(hidden, head, tokens, temperature)
        )
    return on_tokens(both[:, 0], batch), on_tokens(both[:, 1].detach(), batch)


def at_predictors(
    model: Any, batch: Batch, head: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Run the model with `head` in place of its own head, where completions' tokens are predicted.

    `head` gets the hidden states `[M, d]` before each of the M tokens of all completions in turn;
    what it makes of them, `[M, ...]`, is returned. It is called inside the model's forward pass,
    where FSDP has its weights gathered. Prompts are computed once for all that share them, and
    padding is not, where the model's attention allows it; prompts under dropout are each sequence's
    own. The batch may be on the CPU: only what the pass needs is moved.
    """
    device = model.device
    if can_pack(model.config):
        # FlashAttention's call draws no dropout masks.
        varlen = has_varlen(device, computing_dtype(model)) and not (
            model.training and _attention_dropout(model)
        )
        packing = pack(batch, share=not _drops(model), varlen=varlen).to(device)
        inputs = {
            "input_ids": packing.input_ids,
            "position_ids": packing.position_ids,
            # A mask of four dimensions is taken as it is; the packing says what this one does not.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            "packing": packing,
            "logits_to_keep": packing.predictors,
        }

        def select(hidden: torch.Tensor) -> torch.Tensor:
            # As an embedding: it adds up the gradients of a place that several tokens have in a
            # fixed order.
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

    with (
        _in_place_of_the_head(base_model(model), lambda hidden: head(select(hidden))),
        precision(model),
    ):
        found: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    return found


class _Head(torch.nn.Module):
    """A function where a model wants a module; its result gets a batch dimension."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.compute(hidden).unsqueeze(0)


@contextlib.contextmanager
def _in_place_of_the_head(
    causal_lm: Any, compute: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    head = causal_lm.get_output_embeddings()
    causal_lm.set_output_embeddings(_Head(compute))
    try:
        yield
    finally:
        causal_lm.set_output_embeddings(head)


def chosen_logprobs(
    hidden: torch.Tensor, head: Any, tokens: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log softmax(head(h) / temperature) at one token each, and the entropies: `[M, d]`, `[M]` ->
    `[M, 2]`, float32.

    Some rows at a time, so that no tensor of all rows by the vocabulary is made. Under a frozen
    head the gradient of log p(y) by h, (W[y] - p W) / temperature, is linear in what comes from
    above: it is made in the forward pass and kept, M x d, so that nothing is computed twice. A head
    that is trained is computed again in the backward pass.
    """
    if not len(hidden):
        return hidden.new_zeros((0, 2), dtype=torch.float32)
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else hidden.shape[1]
    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    if type(head) is torch.nn.Linear and not head.weight.requires_grad:
        chosen, entropy = _Chosen.apply(hidden, head.weight, head.bias, tokens, temperature, rows)
        return torch.stack([chosen, entropy], dim=1)

    def part(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
        entropy = -torch.linalg.vecdot(logprobs.detach().exp(), logprobs.detach())
        return torch.stack([logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy], dim=1)

    parts = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([checkpoint(part, *some, use_reentrant=False) for some in parts])


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
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(chosen)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            some = slice(start, start + rows)
            index = tokens[some].unsqueeze(1)
            logits = torch.nn.functional.linear(hidden[some], weight, bias).float()
            logprobs = torch.log_softmax(
                logits if temperature == 1 else logits.div_(temperature), dim=-1
            )
            del logits
            chosen[some] = logprobs.gather(1, index).squeeze(1)
            probabilities = logprobs.exp()
            entropy[some] = torch.linalg.vecdot(probabilities, logprobs).neg_()
            del logprobs
            if gradient is not None:
                # 1 - p in float32: the difference of W[y] and p W in half precision would lose its
                # digits.
                difference = probabilities.neg_()
                difference.scatter_add_(1, index, torch.ones_like(index, dtype=difference.dtype))
                gradient[some] = (difference.to(weight.dtype) @ weight).div_(temperature)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (
            (gradient * gradients[0].unsqueeze(1)).to(gradient.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def on_tokens(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values of all completions' tokens in turn, `[M]`, at their places, `[B, T]`; zeros
    elsewhere.
    """
    # By places found on the CPU: the backward pass of `masked_scatter` waits for the GPU to count a
    # mask.
    places = to_device(batch.mask.flatten().nonzero().squeeze(1), values.device)
    return values.new_zeros(batch.mask.numel()).scatter(0, places, values).view(batch.mask.shape)


def computing_dtype(model: Any) -> torch.dtype:
    """The dtype that a model's products are computed in; its weights' own unless it was loaded for
    another.
    """
    base = base_model(model)
    dtype: torch.dtype = getattr(base, "computes_in", base.dtype)
    return dtype


def precision(model: Any) -> torch.autocast:
    """The precision a model computes in, where that is not its weights' own."""
    differs = computing_dtype(model) != base_model(model).dtype
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=differs)


def _drops(model: Any) -> bool:
    """Whether the model's passes draw dropout masks."""
    adapter = (
        model.peft_config[model.active_adapter].lora_dropout
        if isinstance(model, PeftModel)
        else 0.0
    )
    return bool(model.training and (adapter > 0 or _attention_dropout(model) > 0))


def _attention_dropout(model: Any) -> float:
    return getattr(model.config, "attention_dropout", None) or 0.0
