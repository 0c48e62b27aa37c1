"""Decoders: the next token's logits for a batch of sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel

from rltrain.engines.base import unknown_member
from rltrain.engines.cpu import decoder as llama
from rltrain.models.lora import adapter_off


class Decoder(Protocol):
    """A batch of sequences that are decoded together; every prompt is computed once."""

    def prefill(self, prompts: Sequence[Sequence[int]], prompt_of_N: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, V]` after prompts; sequence n continues prompt `prompt_of_N[n]`.

        `prompt_of_N` is ascending.
        """

    def step(self, token_N: torch.Tensor) -> torch.Tensor:
        """Append a token to every sequence; return logits `[N, V]`."""

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these sequences only, in this order (ascending)."""


@contextlib.contextmanager
def decoder(model: Any, member: str | None) -> Iterator[Decoder]:
    """Yield a decoder with the member's adapter on (None: off); restore the model afterwards.

    Raises UserError for a member that has no adapter on the model.
    """
    if member is not None and member not in getattr(model, "peft_config", {}):
        raise unknown_member(member, getattr(model, "peft_config", {}))
    if llama.supports(model, member):
        yield llama.LlamaDecoder(model, member)
        return
    with _eval_mode(model), adapter_off(model) if member is None else _adapter_on(model, member):
        yield ModelDecoder(model)


class ModelDecoder:
    """Decodes with the model's own forward pass, for any architecture; prompts are left-padded."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._mask = torch.empty(0)
        self._cache: Any = None

    def prefill(self, prompts: Sequence[Sequence[int]], prompt_of_N: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, V]` after the prompts; each sample gets a copy of keys and values."""
        self._cache = None
        width = max(map(len, prompts))
        device = self._model.device
        ids = torch.tensor(
            [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(width, device=device) >= (width - lengths)[:, None]).long()
        logits = self._forward(ids, mask, (mask.cumsum(dim=-1) - 1).clamp(min=0))
        self._cache.batch_select_indices(prompt_of_N)
        self._mask = mask[prompt_of_N]
        return logits[prompt_of_N]

    def step(self, token_N: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, V]` after one more token each."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(token_N[:, None], self._mask, self._mask.sum(dim=1, keepdim=True) - 1)

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these sequences only."""
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Put the model into eval mode; restore modes and gradient flags afterwards."""
    training = [module for module in model.modules() if module.training]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _adapter_on(model: PeftModel, member: str) -> Iterator[None]:
    active, before = model.active_adapter, list(model.base_model.active_adapters)
    model.set_adapter(member)
    try:
        yield
    finally:
        model.active_adapter = active
        model.base_model.set_adapter(before)
