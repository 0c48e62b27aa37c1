"""The engine that samples from the trainer's own modules: nothing to sync, fast for tiny models."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from harness.config.schema import Recipe
from rltrain.distributed.device_memory import free_memory, release
from rltrain.engines.base import (
    Engine,
    EngineOptions,
    Request,
    Sample,
    check_prompts,
    sample_seed,
)
from rltrain.engines.decoders import Decoder, decoder
from rltrain.engines.sampling import TokenSampler, uniform_numbers

COMPACTION = 0.8
"""Finished sequences are removed once at most this share still runs: it copies the others' keys."""


def build(recipe: Recipe, model: Any, options: EngineOptions) -> TransformersEngine:
    """Return an engine on the trainer's model itself."""
    generator = recipe.generator
    return TransformersEngine(
        model, options.stop_token_ids, generator.max_input_length, generator.max_num_seqs
    )


class TransformersEngine(Engine):
    """Samples from the trainer's modules, one batch per member and sampling parameters.

    It uses the trainer's adapters and weights of that moment, so nothing is loaded.
    """

    shares_weights = True

    def __init__(
        self, model: Any, stop_token_ids: Sequence[int], max_input_length: int, max_num_seqs: int
    ) -> None:
        self._model = model
        self._stop_token_ids = torch.tensor(sorted(stop_token_ids), dtype=torch.long)
        self._max_input_length = max_input_length
        self._max_num_seqs = max_num_seqs

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Return samples `[P][G]` in the order of the requests.

        Raises UserError as `Engine.generate` does. Where a batch runs out of memory, all requests
        are sampled again in batches of half the size, and so are later ones.
        """
        check_prompts(requests, self._max_input_length)
        while True:
            try:
                return self._samples(requests)
            except torch.OutOfMemoryError as error:
                count = min(self._max_num_seqs, sum(request.n for request in requests))
                if count == 1:
                    raise
                release(error)
            free_memory()
            self._max_num_seqs = count // 2
            print(
                f"out of memory: {self._max_num_seqs} sequences are sampled at a time from now on",
                file=sys.stderr,
                flush=True,
            )

    def _samples(self, requests: Sequence[Request]) -> list[list[Sample]]:
        groups: dict[tuple[str | None, tuple[Any, ...]], list[tuple[int, int]]] = defaultdict(list)
        for p, request in enumerate(requests):
            sampling = request.sampling
            key = (
                sampling.max_generate_length,
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
            )
            groups[request.member, key].extend((p, g) for g in range(request.n))
        samples: dict[tuple[int, int], Sample] = {}
        for (member, _), indices in groups.items():
            # Sorted by length, batches have little padding; the order changes no sample.
            indices.sort(key=lambda index: len(requests[index[0]].prompt_token_ids))
            with decoder(self._model, member) as serving:
                for start in range(0, len(indices), self._max_num_seqs):
                    batch = indices[start : start + self._max_num_seqs]
                    samples |= zip(batch, self._batch(requests, batch, serving), strict=True)
        return [[samples[p, g] for g in range(request.n)] for p, request in enumerate(requests)]

    def use_model(self, model: Any) -> None:
        """Sample from this model's modules from now on."""
        self._model = model

    def close(self) -> None:
        """Release the trainer's model."""
        self._model = None

    def _batch(
        self, requests: Sequence[Request], indices: Sequence[tuple[int, int]], decoder: Decoder
    ) -> Iterator[Sample]:
        """Sample one batch of one member and Sampling, in the order of `indices` (request, sample).

        All samples of a prompt must be neighbours. Sequences that have ended are removed from time
        to time.
        """
        sampling, device = requests[indices[0][0]].sampling, self._model.device
        row_of = {p: row for row, p in enumerate(dict.fromkeys(p for p, _ in indices))}
        prompt_of_N = torch.tensor([row_of[p] for p, _ in indices], device=device)
        seeds = [sample_seed(requests[p].seed, g) for p, g in indices]
        uniform_NT = uniform_numbers(seeds, sampling.max_generate_length, device)
        logits_NV = decoder.prefill([requests[p].prompt_token_ids for p in row_of], prompt_of_N)
        sampler, (count, longest) = TokenSampler(sampling), uniform_NT.shape
        rows = torch.arange(count, device=uniform_NT.device)
        token_NT = torch.zeros(count, longest, dtype=torch.long, device=uniform_NT.device)
        logprob_NT = torch.zeros(count, longest, device=uniform_NT.device)
        length_N = torch.full((count,), longest, device=uniform_NT.device)
        running = torch.ones(count, dtype=torch.bool, device=uniform_NT.device)
        for t in range(longest):
            token, logprob = sampler.sample(logits_NV, uniform_NT[rows, t])
            token_NT[rows, t], logprob_NT[rows, t] = token, logprob
            ended = torch.isin(token, self._stop_token_ids.to(token.device)) & running
            length_N[rows[ended]] = t + 1
            running = running & ~ended
            left = int(running.sum())
            if left == 0 or t + 1 == longest:
                break
            if left <= COMPACTION * len(rows):
                decoder.keep(running.nonzero().squeeze(1))
                rows, token, running = rows[running], token[running], running[running]
            logits_NV = decoder.step(token)
        stop = set(self._stop_token_ids.tolist())
        for ids, logprobs, length in zip(
            token_NT.tolist(), logprob_NT.tolist(), length_N.tolist(), strict=True
        ):
            reason = "stop" if ids[length - 1] in stop else "length"
            yield Sample(ids[:length], logprobs[:length], reason)
