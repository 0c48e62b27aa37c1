"""The vLLM engine in this process, on a CPU or GPUs.

Only this module, `vllm_extension`, `vllm_process`, `vllm_worker` and `cpu.grouped_lora` import
vllm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read once, when vLLM is imported
import vllm
from vllm.lora.request import LoRARequest

from harness.config.schema import Recipe
from harness.config.validate import VLLM_LORA_RANKS
from rltrain.distributed import placement as parallel
from rltrain.distributed.cluster import keep_to_loopback
from rltrain.distributed.device_memory import free_memory
from rltrain.engines import vllm_gpu
from rltrain.engines.arguments import check_engine_args
from rltrain.engines.base import (
    Engine,
    EngineOptions,
    Request,
    Sample,
    SyncError,
    check_prompts,
    in_parts,
    sample_seed,
    unknown_member,
)
from rltrain.engines.vllm_extension import WorkerExtension
from rltrain.engines.vllm_process import (
    executor_backend,
    preserve_classes,
    preserve_process_state,
    preserve_random_state,
    set_environment,
    without_torch_determinism,
)

CPU_BATCHED_TOKENS = 4096
"""Tokens in one forward pass on a CPU: the activations of more leave the cache."""

CPU_BLOCK_SIZE = 32
"""Tokens in a block of the KV cache, vLLM's minimum: samples share only whole prompt blocks."""


def build(recipe: Recipe, model: Any, options: EngineOptions) -> VLLMEngine:
    """Return an engine with the recipe's `generator` settings.

    The trainer's model gives the device and size, where it is in this process.
    """
    device = parallel.device_of(recipe) if model is None else next(model.parameters()).device
    return VLLMEngine(recipe, options, on_cpu=device.type == "cpu", model=model)


class VLLMEngine(Engine):
    """`vllm.LLM` under the engine protocol.

    Every adapter version gets a new integer id and name, so vLLM reuses no cached prefix of an
    older one.
    """

    shares_weights = False

    def __init__(
        self, recipe: Recipe, options: EngineOptions, on_cpu: bool, model: Any = None
    ) -> None:
        """Start vLLM beside the trainer's `model`, if that is in this process.

        Raises UserError for arguments that vLLM does not have, and for a GPU with too little free
        memory.
        """
        check_engine_args(recipe)
        generator = recipe.generator
        set_environment(generator.cpu_kv_cache_gb if on_cpu else None)
        if parallel.address_of(recipe) is None:
            keep_to_loopback()
        self._max_input_length = generator.max_input_length
        self._stop_token_ids = list(options.stop_token_ids)
        self._max_loras = options.max_loras
        self._adapters: dict[str, Any] = {}
        self._layouts: dict[str, object] = {}
        self._next_id = 1
        self._reloading = False
        self._tensor_parallel_size = generator.inference_engine_tensor_parallel_size
        self._sleeps = recipe.trainer.placement.colocate_all and not on_cpu
        longest = max(
            generator.sampling_params.max_generate_length,
            generator.eval_sampling_params.max_generate_length,
        )
        max_model_len = generator.max_input_length + longest
        settings: dict[str, Any] = {
            "model": options.model_path,
            "dtype": str(options.dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": generator.max_num_seqs,
            "tensor_parallel_size": self._tensor_parallel_size,
            "distributed_executor_backend": executor_backend(self._tensor_parallel_size),
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
            "gpu_memory_utilization": generator.gpu_memory_utilization,
            # A CPU has no graphs to capture, and compiling for it takes longer than it saves.
            "enforce_eager": on_cpu if generator.enforce_eager is None else generator.enforce_eager,
            "enable_sleep_mode": self._sleeps,
            "seed": recipe.seed,
            # Prompts are token ids, and EOS ids are passed as stop tokens.
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
        }
        if on_cpu:
            # With chunked prefill a request that has a seed crashes vLLM's CPU runner: a CPU
            # generator has no offset.
            settings |= {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(
                    max_model_len, generator.max_num_seqs, CPU_BATCHED_TOKENS
                ),
                "block_size": CPU_BLOCK_SIZE,
            }
        else:
            free_memory()  # PyTorch's cache may hold blocks from loading the trainer's model
            free, total = torch.cuda.mem_get_info()
            least = vllm_gpu.least_bytes(model, options.dtype.itemsize, max_model_len)
            settings |= vllm_gpu.gpu_settings(recipe, free=free, total=total, least=least)
        if options.max_lora_rank:
            settings |= {
                "enable_lora": True,
                "max_lora_rank": next(
                    rank for rank in VLLM_LORA_RANKS if rank >= options.max_lora_rank
                ),
                "max_loras": options.max_loras,
            }
        with preserve_process_state(), preserve_classes(model), without_torch_determinism():
            if on_cpu:
                # For worker processes: as many threads as this one.
                os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
            self._llm = vllm.LLM(**settings | generator.engine_args)

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Return samples `[P][G]` in the order of the requests.

        Raises UserError as `Engine.generate` does.
        """
        check_prompts(requests, self._max_input_length)
        prompts: list[dict[str, list[int]]] = []
        params: list[Any] = []
        adapters: list[Any] = []
        for request in requests:
            adapter = None
            if request.member is not None:
                if request.member not in self._adapters:
                    raise unknown_member(request.member, self._adapters)
                adapter = self._adapters[request.member]
            prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
            for index in range(request.n):
                prompts.append(prompt)
                params.append(
                    vllm.SamplingParams(
                        temperature=request.sampling.temperature,
                        top_p=request.sampling.top_p,
                        top_k=request.sampling.top_k,
                        max_tokens=request.sampling.max_generate_length,
                        stop_token_ids=self._stop_token_ids,
                        seed=sample_seed(request.seed, index),
                        logprobs=0,
                        detokenize=False,
                        # Nobody else holds it, and vLLM's deep copy takes 80 µs a sample.
                        skip_clone=True,
                    )
                )
                adapters.append(adapter)
        # No keys of older weights are reused, and the same call gives the same bits again.
        self._llm.llm_engine.reset_prefix_cache()
        try:
            with preserve_random_state(), without_torch_determinism():
                outputs = self._llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        except BaseException:
            # vLLM would continue the unfinished requests in the next call.
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        samples = iter([_sample(output.outputs[0]) for output in outputs])
        return [[next(samples) for _ in range(request.n)] for request in requests]

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """Serve `member` from the PEFT folder `path` from now on.

        Raises RuntimeError when all slots are taken, and SyncError when vLLM took fewer modules
        than the folder holds.
        """
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            names = list(file.keys())
        self._serve(member, version, str(path), names, self._llm.llm_engine.add_lora)

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """Serve `member` from these tensors; raises as `load_adapter` does.

        A version with the configuration and shapes of the one before overwrites its tensors in
        place.
        """
        if self._tensor_parallel_size > 1:
            # Every worker process would rebuild a CUDA tensor on the GPU that it came from.
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        layout = config, {name: tensor.shape for name, tensor in tensors.items()}
        if self._layouts.get(member) == layout:
            self._llm.collective_rpc(
                "update_adapter", args=(self._adapters[member].lora_int_id, tensors)
            )
            return
        updatable: list[bool] = []

        def add(adapter: Any) -> None:
            updatable.extend(
                self._llm.collective_rpc("add_adapter", args=(adapter.lora_int_id, tensors, config))
            )

        # vLLM requires a path, and reads it only for an adapter that it does not hold.
        self._serve(member, version, "/nowhere", tensors, add)
        if all(updatable):
            self._layouts[member] = layout

    def _serve(
        self,
        member: str,
        version: int,
        path: str,
        names: Iterable[str],
        add: Callable[[Any], object],
    ) -> None:
        """Register a new version of an adapter, which `add` gives to the workers.

        Raises SyncError when a worker serves fewer modules than `names`, its tensors, belong to.
        """
        self.drop_adapter(member)
        if len(self._adapters) == self._max_loras:
            raise RuntimeError(
                f"the engine has room for {self._max_loras} adapters and holds "
                f"{sorted(self._adapters)}"
            )
        # vLLM never loads an id twice.
        name, new_id = f"{member}-v{version:06d}-{self._next_id}", self._next_id
        self._next_id += 1
        adapter = LoRARequest(lora_name=name, lora_int_id=new_id, lora_path=path)
        add(adapter)
        trained = sum("lora_A" in name or "lora_embedding_A" in name for name in names)
        for served in self._llm.collective_rpc("modules_served", args=(new_id,)):
            if served != trained:
                self._llm.llm_engine.remove_lora(new_id)
                raise SyncError(
                    f"vLLM took {served} of the {trained} modules of {member}'s adapter"
                )
        self._adapters[member] = adapter

    def drop_adapter(self, member: str) -> None:
        """Forget the member's adapter; a member that has none is no error."""
        self._layouts.pop(member, None)
        old = self._adapters.pop(member, None)
        if old is not None:
            self._llm.llm_engine.remove_lora(old.lora_int_id)

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, last: bool = True
    ) -> None:
        """Replace the model's weights, in one call or in several of which the last has `last` set.

        Uses vLLM's layer-by-layer reloading, because its kernels keep packed copies.
        """
        if not self._reloading:
            self._llm.collective_rpc("start_reload")
            self._reloading = True
        for part in in_parts(weights):
            if self._tensor_parallel_size > 1:
                part = [(name, tensor.cpu()) for name, tensor in part]
            self._llm.collective_rpc("reload_part", args=(part,))
        if last:
            self._llm.collective_rpc("finish_reload")
            self._reloading = False

    def sleep(self) -> None:
        """Move weights to host memory and drop the KV cache.

        That is vLLM's level 1; level 2 would discard the base model.
        """
        if self._sleeps:
            # vLLM 0.24 unmaps memory without waiting for kernels that still read it.
            torch.cuda.synchronize()
            self._llm.llm_engine.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`. The prefix cache is empty: vLLM drops it when it goes to sleep."""
        if self._sleeps:
            # vLLM 0.24 maps memory back with the driver's own calls, which cannot use blocks that
            # PyTorch caches.
            free_memory()
            self._llm.llm_engine.wake_up()

    def close(self) -> None:
        """Shut vLLM down; another engine may then be built in the same process."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def _sample(output: Any) -> Sample:
    token_ids = list(output.token_ids)
    logprobs = [
        position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)
    ]
    return Sample(token_ids, logprobs, output.finish_reason)
