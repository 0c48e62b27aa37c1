"""The engine protocol (requests in, samples out, adapters loaded) and the registry of engines."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.config.schema import Backend, Recipe, Sampling
from harness.core.errors import UserError

if TYPE_CHECKING:
    import torch

# Each module has `build(recipe, model, options) -> Engine`. Importing vLLM takes seconds, so only
# the recipe's engine is imported.
ENGINES: dict[Backend, str] = {
    Backend.vllm: "rltrain.engines.vllm",
    Backend.transformers: "rltrain.engines.transformers",
}

WEIGHTS_AT_ONCE = 512 * 2**20
"""Bytes of new weights that are sent to an engine in one message."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for `n` samples of a prompt from `member`'s adapter; None: the base model."""

    prompt_token_ids: Sequence[int]
    n: int
    seed: int
    sampling: Sampling
    member: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion. `finish_reason` is "stop" (its last token is an EOS) or "length".

    `logprobs[t]` is the log-probability of `token_ids[t]` under the distribution that it was
    sampled from: temperature, top-k and top-p applied. At temperature 0 the token is the likeliest,
    and its log-probability that of temperature 1.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine needs besides the recipe.

    `max_lora_rank` 0: there are no adapters, and weights are set by `load_weights`.
    """

    model_path: str
    dtype: torch.dtype
    stop_token_ids: tuple[int, ...]
    max_lora_rank: int = 0
    max_loras: int = 1


class Engine(Protocol):
    """Samples from the base model and from the adapters loaded on it.

    Methods that return None do nothing here; a subclass overrides those that it needs.
    """

    shares_weights: bool
    """Whether it samples from the trainer's own modules, so that there is nothing to sync."""

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Return samples `[P][G]` in the order of the requests.

        A sample depends on its weights, prompt, seed, index in G and sampling parameters only.
        Raises UserError for a member without an adapter and for a prompt that is too long.
        """

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """Serve `member` from the PEFT folder `path` from now on; drop its earlier version."""
        return

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """Serve `member` from tensors under PEFT's names; `config` is PEFT's configuration."""
        return

    def drop_adapter(self, member: str) -> None:
        """Remove the member's adapter; a member without one is no error."""
        return

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights; the names are those of the base model's `state_dict`."""
        return

    def use_model(self, model: Any) -> None:
        """Sample from this model from now on, where weights are shared."""
        return

    def sleep(self) -> None:
        """Release accelerator memory until `wake`, where trainer and engine share a device."""
        return

    def wake(self) -> None:
        """Get ready to generate again after `sleep`."""
        return

    def close(self) -> None:
        """Free all resources; the engine cannot be used afterwards."""
        return


def build_engine(recipe: Recipe, model: Any, options: EngineOptions) -> Engine:
    """Return the engine that `generator.backend` names; `model` is the trainer's, PEFT or plain."""
    module = importlib.import_module(ENGINES[recipe.generator.backend])
    engine: Engine = module.build(recipe, model, options)
    return engine


def stop_token_ids(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the ids that end a completion, sorted.

    These are the EOS ids of the model's generation config and config, and of the tokenizer.
    """
    ids: set[int] = set()
    for owner in (
        getattr(model, "generation_config", None),
        getattr(model, "config", None),
        tokenizer,
    ):
        eos = getattr(owner, "eos_token_id", None)
        if eos is not None:
            ids.update([eos] if isinstance(eos, int) else eos)
    return tuple(sorted(ids))


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of a request's `index`-th sample, below 2^63; hashed, so that all differ."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def in_parts(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int = WEIGHTS_AT_ONCE
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the weights in lists of at most `limit` bytes; a larger tensor is in a list alone."""
    part: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += tensor.nbytes
    if part:
        yield part


def check_prompts(requests: Sequence[Request], max_input_length: int) -> None:
    """Raise UserError for an empty prompt or one longer than `max_input_length` tokens."""
    for index, request in enumerate(requests):
        length = len(request.prompt_token_ids)
        if not 1 <= length <= max_input_length:
            raise UserError(
                f"the prompt of request {index} has a length the engine was not built for",
                got=f"{length} tokens",
                allowed=f"1 to {max_input_length} (generator.max_input_length)",
                fix="drop the prompt, or raise generator.max_input_length",
            )


def unknown_member(member: str, known: Iterable[str]) -> UserError:
    """Return the error for a request whose member has no adapter in the engine."""
    return UserError(
        "no adapter is loaded for a member of the pack",
        got=member,
        allowed=", ".join(sorted(known)) or "none is loaded",
        fix="publish the member's adapter to the engine before it generates",
    )


class SyncError(RuntimeError):
    """Raised when the engine does not serve the weights that were published to it."""
