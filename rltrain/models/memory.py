"""Estimate a run's GPU memory from the model's shape. Imports no torch.

There are two phases. While sampling, a GPU holds the trainer's weights, adapters and optimizers,
and the awake engine. While training, it holds the weights, gradients and a pass's activations, and
the sleeping engine. Sizes are bytes, counted from the tensors that the trainer keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.config import shapes
from harness.config.schema import AdvantageEstimator, Backend, DType, KLReference, Recipe
from harness.config.shapes import ATTENTION, MLP, ModelShape
from harness.config.validate import engine_lora_rank

__all__ = [
    "ModelShape",
    "Usage",
    "members_that_fit",
    "pass_bytes",
    "shape_of",
    "tokens_that_fit",
    "usage",
]

MIB, GIB = 2**20, 2**30

MOST_TOKENS, MOST_TOKENS_CPU, FEWEST_TOKENS = 65_536, 2_048, 256
"""Limits of a pass's tokens: more are no faster."""
ROOM_TOKENS, MOST_MEMBERS = 16_384, 16
"""A pack on a GPU grows up to MOST_MEMBERS members while a pass of ROOM_TOKENS tokens fits."""
SAFETY = 0.85
"""Share of the free memory to plan a pass for: allocators split blocks, and lengths vary."""
PACKED = 0.95
"""Share of a GPU's memory to choose a pack's size for."""

WORKSPACE = 1.07
"""A layer's memory over the tensors that autograd keeps: allocators round up."""
LOGITS_CHUNK = 128 * MIB
"""Float32 logits of a chunk of tokens; logits, probabilities and gradient are three of these."""

CONTEXT = int(1.5 * GIB)
"""CUDA's context, loaded kernels, and blocks that the allocator keeps."""
ENGINE_ASLEEP = 1 * GIB
"""What vLLM keeps while asleep, with its weights in host memory and its cache dropped."""
ENGINE_AWAKE = int(1.5 * GIB)
"""vLLM's activations and CUDA graphs, without its sampler's logits."""


def shape_of(path: str) -> ModelShape | None:
    """Return a model's sizes; None where they are not known, and for a mixture of experts.

    What its adapted experts take in a pass is not measured.
    """
    shape = shapes.shape_of(path)
    return shape if shape is not None and shape.experts == 1 else None


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that one GPU holds in each phase, by part; `apart`: one GPU of a separate engine.

    `tokens` are those of the largest training pass. `engine` is all that vLLM allocates while
    awake, which `generator.gpu_memory_utilization` limits; 0 for another engine.
    """

    sampling: dict[str, int]
    training: dict[str, int]
    apart: dict[str, int]
    tokens: int
    engine: int

    def phases(self) -> dict[str, dict[str, int]]:
        """Return the parts by phase, and those of a separate engine if there is one."""
        return {"sampling": self.sampling, "training": self.training} | (
            {"engine": self.apart} if self.apart else {}
        )


def usage(
    recipe: Recipe, shape: ModelShape, memory: int, *, members: int = 1, on_gpu: bool = True
) -> Usage:
    """Return what one GPU of `memory` bytes holds of a run, or of a pack of `members` such runs.

    On a CPU `memory` is what the process may use.
    """
    lora, vllm = recipe.trainer.policy.model.lora.rank > 0, recipe.generator.backend is Backend.vllm
    apart = vllm and not recipe.trainer.placement.colocate_all
    process, weights = _process(on_gpu), _weights(recipe, shape, members, on_gpu)
    awake = _engine(recipe, shape, memory, members, on_gpu)
    untrained = _untrained(recipe, shape, memory, members, on_gpu)
    tokens = _pass_tokens(recipe, shape, memory - sum(untrained.values()), members, on_gpu)
    state, gradients = _state(recipe, shape, members)
    kept, one_layer, head = _pass(recipe, shape, tokens, on_gpu)
    trained = {"adapters and their optimizers" if lora else "optimizer": state}
    passing = {
        "gradients": gradients,
        f"activations of {tokens:,} tokens": kept,
        "the layer that is computed": one_layer,
        "logits of a chunk": head,
    }
    return Usage(
        sampling=_nonzero(process | weights | trained | ({} if apart else awake)),
        training=_nonzero(untrained | trained | passing),
        apart=_nonzero(process | awake) if apart else {},
        tokens=tokens,
        engine=sum(awake.values()) if vllm and on_gpu else 0,
    )


def tokens_that_fit(
    recipe: Recipe, shape: ModelShape, free_bytes: float, *, on_gpu: bool, members: int
) -> int:
    """Return the tokens of a training pass: the largest power of two that `free_bytes` hold.

    It is at most 65,536 (2,048 on a CPU), and at least 256 even if these do not fit. `free_bytes`
    is what is free with a sleeping engine and no adapters: room for the adapters of `members` runs,
    their gradients and optimizers is subtracted. All trials of a sweep get the same number,
    whatever their rank and modules, because the largest rank is assumed for all.
    """
    left = SAFETY * free_bytes - sum(_state(recipe, shape, members))
    tokens = MOST_TOKENS if on_gpu else MOST_TOKENS_CPU
    while tokens > FEWEST_TOKENS and pass_bytes(recipe, shape, tokens, on_gpu=on_gpu) > left:
        tokens //= 2
    return tokens


def members_that_fit(recipe: Recipe, shape: ModelShape, memory: int, *, on_gpu: bool = True) -> int:
    """Return how many runs like this one fit a pack on a GPU of `memory` bytes, 1 to 16.

    They leave room for a pass of 16,384 tokens (2,048 on a CPU).
    """

    def fit(members: int) -> bool:
        held = usage(recipe, shape, memory, members=members, on_gpu=on_gpu)
        free = memory - sum(_untrained(recipe, shape, memory, members, on_gpu).values())
        tokens = tokens_that_fit(recipe, shape, free, on_gpu=on_gpu, members=members)
        parts = [held.sampling, held.training, held.apart]
        fits = all(sum(part.values()) <= PACKED * memory for part in parts)
        return fits and tokens >= (ROOM_TOKENS if on_gpu else MOST_TOKENS_CPU)

    return max((members for members in range(1, MOST_MEMBERS + 1) if fit(members)), default=1)


def pass_bytes(recipe: Recipe, shape: ModelShape, tokens: int, *, on_gpu: bool) -> int:
    """Return the peak bytes of a forward and backward pass, without weights and gradients."""
    return sum(_pass(recipe, shape, tokens, on_gpu))


def _pass(recipe: Recipe, shape: ModelShape, tokens: int, on_gpu: bool) -> tuple[int, int, int]:
    """Return bytes kept for the backward pass, of the layer being computed, and of the head."""
    width, layer = _width(recipe, on_gpu), _layer_bytes(recipe, shape, on_gpu)
    # The widest gradient, of the down projection's input: the base's term and the adapter's.
    moving = tokens * 2 * width * shape.intermediate
    if checkpoints(recipe, on_gpu):
        kept, one_layer = (
            tokens * shape.layers * shape.hidden * width,
            math.ceil(tokens * layer) + moving,
        )
    else:
        kept, one_layer = math.ceil(tokens * shape.layers * layer), moving
    head = 3 * min(LOGITS_CHUNK, 4 * tokens * shape.vocab) + tokens * shape.hidden * width
    if _ranks(recipe) > 1:
        # FSDP2 holds embedding and head, one layer, and the next.
        gathered = 4 if recipe.trainer.policy.model.lora.rank == 0 else width
        one_layer += gathered * (shape.embedding_parameters + 2 * shape.layer_parameters)
    return kept, one_layer, head


def _layer_bytes(recipe: Recipe, shape: ModelShape, on_gpu: bool) -> float:
    """Return bytes that autograd keeps of a layer for a token, with all projections adapted."""
    width, hidden, inner, query = (
        _width(recipe, on_gpu),
        shape.hidden,
        shape.intermediate,
        shape.query,
    )
    norms = 2 * 4 * hidden  # in float32
    attention = width * 2 * (query + shape.key_value)  # queries and output, keys and values
    mlp = width * 3 * inner  # gate, its SiLU, up
    if recipe.trainer.policy.model.lora.rank == 0:
        # Inputs of the projections, and of the norms' weights.
        trained = width * (4 * hidden + query + inner)
    else:
        # Inputs (q, k and v share one, and so do gate and up), and each adapter's A times its own.
        rank = _largest_rank(recipe, recipe.trainer.policy.model.lora.rank)
        trained = width * (2 * hidden + query + inner + len(ATTENTION + MLP) * rank)
    return WORKSPACE * (norms + attention + mlp + trained)


def checkpoints(recipe: Recipe, on_gpu: bool) -> bool:
    """Return whether a pass recomputes layers from their inputs; `auto` does on a GPU."""
    setting = recipe.trainer.gradient_checkpointing
    return on_gpu if setting == "auto" else bool(setting)


def _process(on_gpu: bool) -> dict[str, int]:
    return {"CUDA and its allocator": CONTEXT} if on_gpu else {"process": GIB}


def _untrained(
    recipe: Recipe, shape: ModelShape, memory: int, members: int, on_gpu: bool
) -> dict[str, int]:
    """Return what is held while training without adapters, optimizers, gradients and a pass.

    A CPU's engine does not sleep.
    """
    held = _process(on_gpu) | _weights(recipe, shape, members, on_gpu)
    if not on_gpu:
        return held | _engine(recipe, shape, memory, members, on_gpu)
    if recipe.trainer.policy.model.lora.rank == 0 and _width(recipe, on_gpu) < 4:
        held["weights as autocast copies them"] = _width(recipe, on_gpu) * shape.parameters
    sleeps = recipe.generator.backend is Backend.vllm and recipe.trainer.placement.colocate_all
    return held | ({"engine asleep": ENGINE_ASLEEP} if sleeps else {})


def _weights(recipe: Recipe, shape: ModelShape, members: int, on_gpu: bool) -> dict[str, int]:
    """Return the weights of policy, reference model and critics' bases, sharded over the ranks."""
    width, ranks, trainer = _width(recipe, on_gpu), _ranks(recipe), recipe.trainer
    full, algorithm = trainer.policy.model.lora.rank == 0, trainer.algorithm
    held = {
        "weights in float32" if full else "base": (4 if full else width) * shape.parameters // ranks
    }
    if full and (algorithm.use_kl_loss or algorithm.use_kl_in_reward):
        held["reference model"] = width * shape.parameters // ranks
    critic = _critic_base(recipe, shape)
    if critic is not None:
        each = (4 if trainer.critic.model.lora.rank == 0 else width) * critic.parameters // ranks
        held["the critic's own base"] = members * each
    return held


def _state(recipe: Recipe, shape: ModelShape, members: int) -> tuple[int, int]:
    """Return bytes of trained state and of gradients of all members, float32, on every rank.

    State is an adapter with AdamW's two moments, and the copy of it that is a reference; in full
    fine-tuning only the moments, sharded as the weights are.
    """
    trainer = recipe.trainer
    ranks = [(trainer.policy.model.lora.rank, shape)]
    if trainer.algorithm.advantage_estimator is AdvantageEstimator["gae"]:
        ranks.append((trainer.critic.model.lora.rank, _critic_base(recipe, shape) or shape))
    trained = [
        model.adapter_parameters(_largest_rank(recipe, rank))
        if rank
        else model.parameters // _ranks(recipe)
        for rank, model in ranks
    ]
    beside = [n * (3 if rank else 2) for n, (rank, _) in zip(trained, ranks, strict=True)]
    algorithm, start = trainer.algorithm, trainer.policy.model.lora.adapter_path
    if start and trainer.reference is KLReference.start:
        beside.append(trained[0] * (algorithm.use_kl_loss or algorithm.use_kl_in_reward))
    return members * 4 * sum(beside), members * 4 * sum(trained)


def _largest_rank(recipe: Recipe, rank: int) -> int:
    """Return the rank to plan for: a sweep's trials must get equal numbers whatever their rank."""
    return max(rank, recipe.generator.max_lora_rank or 0)


def _critic_base(recipe: Recipe, shape: ModelShape) -> ModelShape | None:
    """Return the shape of a critic's own base; None without one."""
    trainer = recipe.trainer
    critic, policy = trainer.critic.model, trainer.policy.model
    if trainer.algorithm.advantage_estimator is not AdvantageEstimator["gae"]:
        return None
    path = critic.path or policy.path
    if path == policy.path and critic.lora.rank > 0 and policy.lora.rank > 0:
        return None
    return shape if path == policy.path else shape_of(path) or shape


def _engine(
    recipe: Recipe, shape: ModelShape, memory: int, members: int, on_gpu: bool
) -> dict[str, int]:
    """Return the awake engine's parts on one of its GPUs.

    An engine on the trainer's own model needs a cache and logits only.
    """
    generator, width = recipe.generator, _width(recipe, on_gpu)
    logits = 2 * 4 * generator.max_num_seqs * shape.vocab
    if generator.backend is not Backend.vllm:
        return {
            "engine: keys and values": cache_bytes(
                recipe, shape, generator.max_num_seqs, on_gpu=on_gpu
            ),
            "engine: logits": logits,
        }
    split = generator.inference_engine_tensor_parallel_size
    held = {
        "engine: weights": width * shape.parameters // split,
        "engine: activations, graphs": ENGINE_AWAKE + logits,
    }
    if recipe.trainer.policy.model.lora.rank > 0:
        slot = width * shape.adapter_parameters(engine_lora_rank(recipe))
        held["engine: room for adapters"] = members * slot // split
    if on_gpu:
        rest = int(generator.gpu_memory_utilization * memory) - sum(held.values())
        # Without room for one sequence the engine does not start: at least that is counted.
        least, most = (
            cache_bytes(recipe, shape, n, on_gpu=True) for n in (1, generator.max_num_seqs)
        )
        cache = max(least, min(most, rest))
    else:
        cache = generator.cpu_kv_cache_gb * GIB
    return held | {"engine: keys and values": cache}


def cache_bytes(recipe: Recipe, shape: ModelShape, sequences: int, *, on_gpu: bool) -> int:
    """Return bytes of keys and values of the longest sequences, on one of an engine's GPUs."""
    generator = recipe.generator
    completion = max(
        generator.sampling_params.max_generate_length,
        generator.eval_sampling_params.max_generate_length,
    )
    split = (
        generator.inference_engine_tensor_parallel_size if generator.backend is Backend.vllm else 1
    )
    a_token = shape.cache_bytes_per_token(_width(recipe, on_gpu), split)
    return sequences * (generator.max_input_length + completion) * a_token


def _pass_tokens(recipe: Recipe, shape: ModelShape, free: float, members: int, on_gpu: bool) -> int:
    """Return tokens of the largest pass: the budget, but a mini-batch at most.

    It is one sequence at least.
    """
    trainer, generator = recipe.trainer, recipe.generator
    longest = generator.max_input_length + generator.sampling_params.max_generate_length
    sequences = math.ceil(
        trainer.policy_mini_batch_size * generator.n_samples_per_prompt / _ranks(recipe)
    )
    if trainer.micro_train_batch_size_per_gpu is not None:
        sequences = min(sequences, trainer.micro_train_batch_size_per_gpu)
    budget = trainer.max_tokens_per_microbatch
    if budget == "auto":
        budget = tokens_that_fit(recipe, shape, free, on_gpu=on_gpu, members=members)
    most = sequences * longest
    return int(max(longest, most if budget is None else min(budget, most)))


def _ranks(recipe: Recipe) -> int:
    placement = recipe.trainer.placement
    return placement.policy_num_gpus_per_node * placement.policy_num_nodes


def _width(recipe: Recipe, on_gpu: bool) -> int:
    """Return bytes of a number that the model computes with."""
    dtype = recipe.trainer.policy.model.dtype
    return 2 if dtype is DType.bfloat16 or (dtype is DType.auto and on_gpu) else 4


def _nonzero(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size > 0}
