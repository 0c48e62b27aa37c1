"""Transformers' `generate` on the trainer's own modules: nothing to sync, quickest for tiny models on a CPU."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from harness.schema import Recipe, Sampling
from rltrain.engines.base import EngineOptions, Request, Sample, check_prompts, sample_seed, unknown_member


def build(recipe: Recipe, model: Any, options: EngineOptions) -> TransformersEngine:
    """An engine on the trainer's model itself."""
    generator = recipe.generator
    return TransformersEngine(model, options.stop_token_ids, generator.max_input_length, generator.max_num_seqs)


class TransformersEngine:
    """Samples from the trainer's modules, one batch per member and sampling parameters, prompts padded on the left.

    Adapters and weights are those the trainer holds this moment: what loads and drops them has nothing to do, and
    neither have `sleep` and `wake`.
    """

    shares_weights = True

    def __init__(self, model: Any, stop_token_ids: Sequence[int], max_input_length: int, max_num_seqs: int) -> None:
        self._model = model
        self._stop_token_ids = list(stop_token_ids)
        self._max_input_length = max_input_length
        self._max_num_seqs = max_num_seqs

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples `[P][G]` in the order of the requests. Raises UserError as the protocol says."""
        check_prompts(requests, self._max_input_length)
        wanted: dict[tuple[str | None, tuple[Any, ...]], list[tuple[int, int]]] = defaultdict(list)
        for p, request in enumerate(requests):
            sampling = request.sampling
            key = (sampling.max_generate_length, sampling.temperature, sampling.top_p, sampling.top_k)
            wanted[request.member, key].extend((p, g) for g in range(request.n))
        samples: dict[tuple[int, int], Sample] = {}
        for (member, _), places in wanted.items():
            # Neighbours of like length waste little padding; the sort is stable and changes no sample.
            places.sort(key=lambda place: len(requests[place[0]].prompt_token_ids))
            with _serving(self._model, member):
                for start in range(0, len(places), self._max_num_seqs):
                    batch = places[start : start + self._max_num_seqs]
                    samples |= zip(batch, self._batch(requests, batch), strict=True)
        return [[samples[p, g] for g in range(request.n)] for p, request in enumerate(requests)]

    def use_model(self, model: Any) -> None:
        """Sample from this model's modules from now on."""
        self._model = model

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """The trainer's adapter is the engine's."""

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """The trainer's adapter is the engine's."""

    def drop_adapter(self, member: str) -> None:
        """The trainer's adapter is the engine's."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The trainer's weights are the engine's."""

    def sleep(self) -> None:
        """The engine holds no memory of its own."""

    def wake(self) -> None:
        """The engine holds no memory of its own."""

    def close(self) -> None:
        """Let go of the trainer's model."""
        self._model = None

    def _batch(self, requests: Sequence[Request], places: Sequence[tuple[int, int]]) -> list[Sample]:
        """One padded batch `[B]`, all of one member and one Sampling."""
        sampling = requests[places[0][0]].sampling
        device = self._model.device
        rows = {p: row for row, p in enumerate(dict.fromkeys(p for p, _ in places))}
        prompts = [list(requests[p].prompt_token_ids) for p in rows]
        width = max(map(len, prompts))
        ids_P = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask_P = (torch.arange(width, device=device) >= (width - lengths)[:, None]).long()
        row_of_B = torch.tensor([rows[p] for p, _ in places], device=device)
        draw = _Draw([sample_seed(requests[p].seed, g) for p, g in places], sampling, device)
        sequences = self._model.generate(
            input_ids=ids_P[row_of_B],
            attention_mask=mask_P[row_of_B],
            past_key_values=self._prefill(ids_P[:, :-1], mask_P[:, :-1], row_of_B),
            generation_config=self._generation_config(sampling),
            logits_processor=_processors(sampling, draw),
        )
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        return [self._sample(row, logprobs[i]) for i, row in enumerate(sequences[:, width:].tolist())]

    def _prefill(self, ids_P: torch.Tensor, mask_P: torch.Tensor, row_of_B: torch.Tensor) -> Any:
        """Keys and values of the prompts, computed once per prompt and repeated for each of its samples."""
        if ids_P.shape[1] == 0:
            return None
        position_ids = (mask_P.cumsum(dim=-1) - 1).clamp(min=0)
        output = self._model(
            input_ids=ids_P, attention_mask=mask_P, position_ids=position_ids, use_cache=True, logits_to_keep=1
        )
        output.past_key_values.batch_select_indices(row_of_B)
        return output.past_key_values

    def _sample(self, token_ids: list[int], logprobs: list[float]) -> Sample:
        """Cut the padding that `generate` leaves after a row's EOS."""
        end = next((t for t, token in enumerate(token_ids) if token in self._stop_token_ids), None)
        if end is None:
            return Sample(token_ids, logprobs, "length")
        return Sample(token_ids[: end + 1], logprobs[: end + 1], "stop")

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=sampling.max_generate_length,
            do_sample=False,  # the last logits processor draws
            eos_token_id=self._stop_token_ids or None,
            pad_token_id=self._stop_token_ids[0] if self._stop_token_ids else 0,
        )


class _Draw(LogitsProcessor):
    """Draws each row's token with a generator of its own, and leaves scores whose argmax is that token.

    By inversion: the first token whose cumulative probability exceeds a uniform number, one number per row and step,
    all drawn beforehand, so that a row's draw depends on its seed and its step alone.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self.logprobs: list[torch.Tensor] = []
        self._greedy = sampling.temperature == 0
        rows = [
            torch.rand(sampling.max_generate_length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self._uniform_BT = torch.stack(rows).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs_BV = scores.float().log_softmax(dim=-1)
        if self._greedy:
            token_B1 = logprobs_BV.argmax(dim=-1, keepdim=True)
        else:
            cumulative_BV = logprobs_BV.double().exp_().cumsum(dim=-1)
            target_B1 = self._uniform_BT[:, len(self.logprobs), None] * cumulative_BV[:, -1:]
            token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        self.logprobs.append(logprobs_BV.gather(-1, token_B1).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B1, 0.0)


def _processors(sampling: Sampling, draw: _Draw) -> LogitsProcessorList:
    """Transformers' own warpers in vLLM's order (temperature, top-k, top-p), then the draw."""
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(draw)
    return processors


@contextlib.contextmanager
def _serving(model: Any, member: str | None) -> Iterator[None]:
    """Eval mode with the member's adapter on (None: off); modes, flags and active adapters come back afterwards."""
    training = [module for module in model.modules() if module.training]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with _adapter(model, member):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _adapter(model: Any, member: str | None) -> Iterator[None]:
    if not isinstance(model, PeftModel):
        if member is not None:
            raise unknown_member(member, ())
        yield
    elif member is None:
        with model.disable_adapter():
            yield
    elif member not in model.peft_config:
        raise unknown_member(member, model.peft_config)
    else:
        active, before = model.active_adapter, list(model.base_model.active_adapters)
        model.set_adapter(member)
        try:
            yield
        finally:
            model.active_adapter = active
            model.base_model.set_adapter(before)
