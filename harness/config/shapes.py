"""Sizes of causal language models, as published or by config.json, and FLOPs of their training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.config.schema import AdvantageEstimator, Recipe
from harness.core.paths import locate, locate_folder

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# FLOPs per parameter and token of a forward pass.
FORWARD = 2
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Settings of mixtures with dense layers, or with experts that all tokens pass.
_OTHER_LAYERS = (
    "mlp_only_layers",
    "first_k_dense_replace",
    "n_shared_experts",
    "shared_expert_intermediate_size",
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder of the Llama family (Llama, Qwen2, Qwen3, SmolLM2).

    `tied` models use the embedding as their head. A mixture has `experts` MLPs of `intermediate` a
    layer, of which a token passes `active`; a dense model's are one.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    experts: int = 1
    active: int = 1

    @property
    def query(self) -> int:
        """Return the width of a token's queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Return the width of a token's keys, and of its values, all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Return the parameters of one layer's projections.

        Norms, biases and routers are left out: they are a ten-thousandth of a model.
        """
        return self._layer_parameters(self.experts)

    @property
    def embedding_parameters(self) -> int:
        """Return the parameters of the embedding, and of the head where it is not tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Return the parameters of the whole model."""
        return self.embedding_parameters + self.layers * self.layer_parameters

    @property
    def active_parameters(self) -> int:
        """Return the parameters that compute one token: of the experts the active ones."""
        return self.embedding_parameters + self.layers * self._layer_parameters(self.active)

    def _layer_parameters(self, experts: int) -> int:
        return sum(
            inputs * outputs * (experts if name in MLP else 1)
            for name, (inputs, outputs) in self.linears().items()
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of each projection of a layer, or an expert, by name."""
        hidden, inner = self.hidden, self.intermediate
        attention = {
            "q_proj": (hidden, self.query),
            "k_proj": (hidden, self.key_value),
            "v_proj": (hidden, self.key_value),
            "o_proj": (self.query, hidden),
        }
        return attention | {
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def cache_bytes_per_token(self, dtype_bytes: int, split: int = 1) -> int:
        """Return the bytes of one token's keys and values in all layers.

        They are those on one of `split` GPUs that share the heads.
        """
        return 2 * self.layers * math.ceil(self.kv_heads / split) * self.head_dim * dtype_bytes

    def adapter_parameters(
        self, rank: int, modules: Sequence[str] = ATTENTION + MLP, expert_rank: int | None = None
    ) -> int:
        """Return the parameters of A and B of these projections in every layer.

        `expert_rank` is the rank on a mixture's experts (`rank_on_experts` by default), where one
        adapter has gate and up together.
        """
        linears = self.linears()
        if self.experts == 1:
            return rank * self.layers * sum(sum(linears[name]) for name in modules)
        attention = rank * sum(sum(linears[name]) for name in modules if name in ATTENTION)
        expert = 2 * self.hidden + 3 * self.intermediate if set(modules) & set(MLP) else 0
        expert_rank = expert_rank or rank_on_experts(rank, self.active)
        return self.layers * (attention + self.experts * expert_rank * expert)


# From the models' config.json on the hub; tests/unit/harness/config/test_shapes.py compares them
# with the published totals.
_PUBLISHED = {
    "Qwen2.5-0.5B": ModelShape(896, 24, 14, 2, 64, 4864, 151_936, True),
    "Qwen2.5-1.5B": ModelShape(1536, 28, 12, 2, 128, 8960, 151_936, True),
    "Qwen2.5-3B": ModelShape(2048, 36, 16, 2, 128, 11_008, 151_936, True),
    "Qwen2.5-7B": ModelShape(3584, 28, 28, 4, 128, 18_944, 152_064, False),
    "Qwen2.5-14B": ModelShape(5120, 48, 40, 8, 128, 13_824, 152_064, False),
    "Qwen2.5-32B": ModelShape(5120, 64, 40, 8, 128, 27_648, 152_064, False),
    "Qwen3-0.6B": ModelShape(1024, 28, 16, 8, 128, 3072, 151_936, True),
    "Qwen3-1.7B": ModelShape(2048, 28, 16, 8, 128, 6144, 151_936, True),
    "Qwen3-4B": ModelShape(2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen3-8B": ModelShape(4096, 36, 32, 8, 128, 12_288, 151_936, False),
    "Qwen3-14B": ModelShape(5120, 40, 40, 8, 128, 17_408, 151_936, False),
    "Qwen3-32B": ModelShape(5120, 64, 64, 8, 128, 25_600, 151_936, False),
    "Llama-3.2-1B": ModelShape(2048, 16, 32, 8, 64, 8192, 128_256, True),
    "Llama-3.2-3B": ModelShape(3072, 28, 24, 8, 128, 8192, 128_256, True),
    "Llama-3.1-8B": ModelShape(4096, 32, 32, 8, 128, 14_336, 128_256, False),
    "SmolLM2-135M": ModelShape(576, 30, 9, 3, 64, 1536, 49_152, True),
    "SmolLM2-360M": ModelShape(960, 32, 15, 5, 64, 2560, 49_152, True),
    "SmolLM2-1.7B": ModelShape(2048, 24, 32, 32, 64, 8192, 49_152, True),
}
# Parts of a name that do not change the shape.
_VARIANT = re.compile(r"^Meta-|-(Coder|Math|Base|(Instruct|Thinking)(-2507)?)(?=-|$)")


def shape_of(path: str) -> ModelShape | None:
    """Return the sizes of a local model or a hub model, without network; None if not known."""
    config = read_config(path)
    if not config and locate(path) is None:
        return _PUBLISHED.get(_VARIANT.sub("", path.rpartition("/")[2]))
    return shape_from(config)


def shape_from(config: Mapping[str, Any]) -> ModelShape | None:
    """Return the sizes in a config.json; None for an incomplete one.

    None too for a mixture of experts with layers of another kind, or with experts for all tokens.
    """
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        experts, active = experts_of(config) or (1, 1)
        expert_width = config.get("moe_intermediate_size") if experts > 1 else None
        shape = ModelShape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=expert_width or config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            experts=experts,
            active=active,
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    sizes = {name: size for name, size in asdict(shape).items() if name != "tied"}
    valid = all(type(size) is int and size > 0 for size in sizes.values())
    uniform = config.get("decoder_sparse_step", 1) == 1 and not any(
        config.get(key) for key in _OTHER_LAYERS
    )
    return shape if valid and uniform else None


def experts_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the number of experts of a layer and of those active for a token; None if dense."""
    experts = next((config[key] for key in _EXPERTS if config.get(key)), None)
    active = config.get("num_experts_per_tok")
    if type(experts) is not int or type(active) is not int or experts < 2 or active < 1:
        return None
    return experts, active


def rank_on_experts(rank: int, active: int) -> int:
    """Return the default rank on each expert: the active ones have together that of a dense MLP.

    Schulman et al. 2025, LoRA Without Regret: the rank is divided by the active experts.
    """
    return max(1, rank // active)


def read_config(path: str) -> dict[str, Any]:
    """Return the config.json of a local model, or of one in the hub's cache.

    The result is {} for one that is missing or damaged.
    """
    folder = locate_folder(path, "config.json")
    if folder is None:
        return {}
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def training_flops(parameters: float, *, forwards: int, updates: int, full: bool) -> float:
    """Return model FLOPs per token of `forwards` forward passes and `updates` training passes.

    A forward pass takes 2 per parameter. A training pass is a forward pass and a backward pass,
    which takes 2 for activations and, in full fine-tuning, 2 for weights (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1). Attention and the adapters' own products are left out. Of a
    mixture of experts `parameters` are the active ones.
    """
    backward = 4 if full else 2
    return parameters * (forwards * FORWARD + updates * (FORWARD + backward))


def needs_old_logprobs(recipe: Recipe) -> bool:
    """Return whether a step recomputes the sampling policy's log-probabilities.

    It does where updates see another policy than the one that sampled (several updates a step, or
    dropout), and where rewards include KL.
    """
    trainer = recipe.trainer
    updates = trainer.update_epochs_per_batch * (
        trainer.train_batch_size // trainer.policy_mini_batch_size
    )
    dropout = trainer.policy.model.lora.dropout > 0
    return updates > 1 or dropout or trainer.algorithm.use_kl_in_reward


def flops_per_token(recipe: Recipe, parameters: float) -> float:
    """Return model FLOPs of a training step, per token of its batch.

    Every token is sampled, evaluated once more for old log-probabilities and for the reference
    where the recipe needs these, and trained on `update_epochs_per_batch` times. A critic adds one
    forward pass and its own training; it is taken to be as large as the policy.
    """
    trainer, epochs = recipe.trainer, recipe.trainer.update_epochs_per_batch
    algorithm, policy, critic = trainer.algorithm, trainer.policy.model, trainer.critic.model
    reference = algorithm.use_kl_loss or algorithm.use_kl_in_reward
    forwards = 1 + needs_old_logprobs(recipe) + reference
    flops = training_flops(
        parameters, forwards=forwards, updates=epochs, full=policy.lora.rank == 0
    )
    if algorithm.advantage_estimator is AdvantageEstimator["gae"]:
        full = critic.lora.rank == 0
        flops += training_flops(parameters, forwards=1, updates=epochs, full=full)
    return flops
