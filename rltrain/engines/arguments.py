"""Which arguments of vLLM `generator.engine_args` may set. Imports neither torch nor vllm."""

from __future__ import annotations

from harness.config.schema import Recipe
from harness.core import machine
from harness.core.errors import UserError, nearest

OF_KEYS = {
    "model": "trainer.policy.model.path",
    "dtype": "trainer.policy.model.dtype",
    "max_model_len": "generator.max_input_length and generator.sampling_params.max_generate_length",
    "max_num_seqs": "generator.max_num_seqs",
    "tensor_parallel_size": "generator.inference_engine_tensor_parallel_size",
    "gpu_memory_utilization": "generator.gpu_memory_utilization",
    "enforce_eager": "generator.enforce_eager",
    "enable_sleep_mode": "trainer.placement.colocate_all",
    "enable_lora": "trainer.policy.model.lora.rank",
    "max_lora_rank": "generator.max_lora_rank",
    "max_loras": "sweep.pack_size",
    "seed": "seed",
}
"""Arguments that a key of the recipe sets, and that key."""

OF_ENGINE = frozenset(
    {
        "distributed_executor_backend",
        "generation_config",
        "logprobs_mode",
        "skip_tokenizer_init",
        "worker_cls",
        "worker_extension_cls",
    }
)
"""Arguments that the engine sets itself."""


def check_engine_args(recipe: Recipe) -> None:
    """Raise UserError for a name in `generator.engine_args` that vLLM lacks or another key sets.

    Where vLLM is not installed its arguments are unknown, and only the second is checked.
    """
    known = machine.vllm_arguments()
    for name in recipe.generator.engine_args:
        got = f"generator.engine_args.{name}"
        if name in OF_KEYS:
            raise UserError(
                "a key of the recipe sets this argument of vLLM",
                got=got,
                fix=f"set {OF_KEYS[name]}",
            )
        if name in OF_ENGINE:
            raise UserError(
                "the engine itself sets this argument of vLLM", got=got, fix="leave it out"
            )
        if known and name not in known:
            near = nearest(name, known - OF_KEYS.keys() - OF_ENGINE)
            raise UserError(
                "vLLM has no argument of this name",
                got=got,
                allowed="the fields of vllm.EngineArgs",
                fix=f"did you mean {near}?" if near else "leave it out",
            )
