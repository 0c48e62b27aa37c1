"""vLLM in this process, on a CPU or GPUs. Only this file, grouped_lora.py and vllm_worker.py import
vllm.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read once, when vLLM is imported
import vllm
from vllm.config import set_current_vllm_config
from vllm.config import vllm as vllm_defaults
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from harness.config.schema import Recipe, Sampling
from harness.config.validate import VLLM_LORA_RANKS
from harness.core.errors import UserError
from rltrain.distributed import placement as parallel
from rltrain.distributed.cluster import keep_to_loopback
from rltrain.distributed.device_memory import free_memory
from rltrain.engines import vllm_gpu
from rltrain.engines.arguments import check_engine_args
from rltrain.engines.base import (
    EngineOptions,
    Request,
    Sample,
    SyncError,
    check_prompts,
    in_parts,
    sample_seed,
    unknown_member,
)
from rltrain.engines.cpu import grouped_lora

CPU_BATCHED_TOKENS = 4096
"""Tokens in one forward pass on a CPU; more is slower, for the activations leave the cache."""

CPU_BLOCK_SIZE = 32
"""Tokens in a block of the KV cache, the least there is: samples of one prompt share its whole
blocks only.
"""


def build(recipe: Recipe, model: Any, options: EngineOptions) -> VLLMEngine:
    """An engine with the recipe's `generator` settings; the trainer's model, if it is here, tells
    device and size.
    """
    device = parallel.device_of(recipe) if model is None else next(model.parameters()).device
    return VLLMEngine(recipe, options, on_cpu=device.type == "cpu", model=model)


class VLLMEngine:
    """`vllm.LLM` under the engine protocol: a new integer id and name for every adapter version, no
    stale prefixes.
    """

    shares_weights = False

    def __init__(
        self, recipe: Recipe, options: EngineOptions, on_cpu: bool, model: Any = None
    ) -> None:
        """Start vLLM beside the trainer's `model`, if that is in this process.

        Raises UserError for arguments that vLLM does not have and for a GPU with too little memory
        left.
        """
        check_engine_args(recipe)
        generator = recipe.generator
        _set_environment(generator.cpu_kv_cache_gb if on_cpu else None)
        if parallel.address_of(recipe) is None:
            keep_to_loopback()
        self._max_input_length = generator.max_input_length
        self._stop_token_ids = list(options.stop_token_ids)
        self._max_loras = options.max_loras
        self._adapters: dict[str, Any] = {}
        self._forms: dict[str, object] = {}
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
            "distributed_executor_backend": _executor(self._tensor_parallel_size),
            "worker_extension_cls": f"{__name__}.{WorkerExtension.__name__}",
            "gpu_memory_utilization": generator.gpu_memory_utilization,
            # A CPU has no graphs to capture, and compiling for it takes longer than it saves.
            "enforce_eager": on_cpu if generator.enforce_eager is None else generator.enforce_eager,
            "enable_sleep_mode": self._sleeps,
            "seed": recipe.seed,
            # Prompts come as token ids and EOS ids as stop tokens: no tokenizer, no second reading
            # of the model's EOS.
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
        }
        if on_cpu:
            # A prompt cut in two crashes vLLM's CPU runner when its request has a seed: a CPU
            # generator has no offset.
            settings |= {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(
                    max_model_len, generator.max_num_seqs, CPU_BATCHED_TOKENS
                ),
                "block_size": CPU_BLOCK_SIZE,
            }
        else:
            # what loading the trainer's model has left in PyTorch's cache is free for vLLM
            free_memory()
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
        with _process_state_kept(), _vllms_own_determinism():
            if on_cpu:
                os.environ["OMP_NUM_THREADS"] = str(
                    torch.get_num_threads()
                )  # worker processes take what we have
            self._llm = vllm.LLM(**settings | generator.engine_args)

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples `[P][G]` in the order of the requests. Raises UserError as the protocol says."""
        check_prompts(requests, self._max_input_length)
        prompts: list[dict[str, list[int]]] = []
        params: list[Any] = []
        adapters: list[Any] = []
        for request in requests:
            adapter = self._adapter(request.member)
            prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
            for index in range(request.n):
                prompts.append(prompt)
                params.append(self._params(request.sampling, sample_seed(request.seed, index)))
                adapters.append(adapter)
        # Nothing cached outlives a call: no keys of older weights, and the same call gives the same
        # bits again.
        self._llm.llm_engine.reset_prefix_cache()
        with _random_state_kept(), _vllms_own_determinism(), self._nothing_left_behind():
            outputs = self._llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        samples = iter([_sample(output.outputs[0]) for output in outputs])
        return [[next(samples) for _ in range(request.n)] for request in requests]

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """Serve `member` from the PEFT folder `path` from now on.

        Raises RuntimeError when all slots are taken and SyncError when vLLM took fewer modules than
        the folder holds.
        """
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            names = list(file.keys())
        self._serve(member, version, str(path), names, self._llm.llm_engine.add_lora)

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """As `load_adapter`, with nothing read from files; a version like the one before takes over
        its memory.
        """
        if self._tensor_parallel_size > 1:
            # On their way to the worker processes; a GPU's memory would be rebuilt on that one GPU
            # in all of them.
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        form = config, {name: tensor.shape for name, tensor in tensors.items()}
        if self._forms.get(member) == form:
            self._llm.collective_rpc(
                "update_adapter", args=(self._adapters[member].lora_int_id, tensors)
            )
            return
        updatable: list[bool] = []

        def add(adapter: Any) -> None:
            updatable.extend(
                self._llm.collective_rpc("add_adapter", args=(adapter.lora_int_id, tensors, config))
            )

        # vLLM wants a path, and would go there only for an adapter that it does not hold.
        self._serve(member, version, "/nowhere", tensors, add)
        if all(updatable):
            self._forms[member] = form

    def _serve(
        self,
        member: str,
        version: int,
        path: str,
        names: Iterable[str],
        add: Callable[[Any], object],
    ) -> None:
        """Bookkeeping of a new version whose tensors have those names and which `add` gives to the
        workers.
        """
        self.drop_adapter(member)
        if len(self._adapters) == self._max_loras:
            raise RuntimeError(
                f"the engine has room for {self._max_loras} adapters and holds "
                f"{sorted(self._adapters)}"
            )
        # vLLM never reads an id again that it has seen.
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
        self._forms.pop(member, None)
        old = self._adapters.pop(member, None)
        if old is not None:
            self._llm.llm_engine.remove_lora(old.lora_int_id)

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, last: bool = True
    ) -> None:
        """Replace the model's weights, in one call or in several of which the last has `last` set.

        Through vLLM's own reloading, layer by layer, for its kernels keep packed copies.
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

    def use_model(self, model: Any) -> None:
        """vLLM has weights of its own."""

    def sleep(self) -> None:
        """Level 1: weights wait in host memory, the cache is dropped. Level 2 would lose the base
        for good.
        """
        if self._sleeps:
            # vLLM 0.24 unmaps memory without waiting for kernels that still read it.
            torch.cuda.synchronize()
            self._llm.llm_engine.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`; the cache of prefixes is empty, for both versions drop it on falling
        asleep.
        """
        if self._sleeps:
            # vLLM 0.24 maps memory back with the driver's own calls, for which what PyTorch caches
            # is not free.
            free_memory()
            self._llm.llm_engine.wake_up()

    def close(self) -> None:
        """Shut vLLM down; another engine may be built afterwards in the same process."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    @contextlib.contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        """After an error vLLM would go on with the unfinished requests in the next call, among that
        call's own.
        """
        try:
            yield
        except BaseException:
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise

    def _adapter(self, member: str | None) -> Any:
        if member is None:
            return None
        if member not in self._adapters:
            raise unknown_member(member, self._adapters)
        return self._adapters[member]

    def _params(self, sampling: Sampling, seed: int) -> Any:
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_generate_length,
            stop_token_ids=self._stop_token_ids,
            seed=seed,
            logprobs=0,
            detokenize=False,
            skip_clone=True,  # nobody else has it: vLLM's deep copy takes 80 µs a sample
        )


class WorkerExtension:
    """What our engine asks of vLLM's worker; vLLM makes it a base of its worker class, in whatever
    process that is.
    """

    model_runner: Any
    vllm_config: Any

    def add_adapter(
        self, adapter_id: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> bool:
        """What the worker does with an adapter's folder, from the tensors that would be in it; can
        it be updated?
        """
        manager = self.model_runner.lora_manager
        helper = PEFTHelper.from_dict(
            {**config, "vllm_max_position_embeddings": manager.max_position_embeddings}
        )
        helper.validate_legal(manager.lora_config)
        dtype = manager.lora_config.lora_dtype
        model = manager._adapter_manager.model
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        # Copies, for vLLM multiplies B by the scale in place.
        own = {
            name: tensor.to(manager.device, dtype, copy=True) for name, tensor in tensors.items()
        }
        adapter = manager._lora_model_cls.from_lora_tensors(
            adapter_id,
            own,
            helper,
            device=str(manager.device),
            dtype=dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=getattr(mapper, "get_rename_mapper", lambda: mapper)(),
            skip_prefixes=getattr(model, "lora_skip_prefixes", None),
        )
        manager._adapter_manager.add_adapter(adapter)
        manager._adapter_manager.activate_adapter(adapter_id)
        adapter.own_tensors, adapter.own_scale = own, helper.vllm_lora_scaling_factor
        served = {tensor.data_ptr() for lora in adapter.loras.values() for tensor in _parts(lora)}
        return all(tensor.data_ptr() in served for tensor in own.values())

    def update_adapter(self, adapter_id: int, tensors: dict[str, torch.Tensor]) -> None:
        """New values for the tensors that `add_adapter` was given."""
        manager = self.model_runner.lora_manager._adapter_manager
        adapter = manager.get_adapter(adapter_id)
        for name, tensor in tensors.items():
            own = adapter.own_tensors[name].copy_(tensor)
            if "lora_B" in name:
                own.mul_(adapter.own_scale)
        manager.deactivate_adapter(adapter_id)
        manager.activate_adapter(adapter_id)

    def modules_served(self, adapter_id: int) -> int:
        """How many of an adapter's modules vLLM applies: it packs q, k, v and gate, up, ignores
        others in silence.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        packed = [
            lora.lora_a
            for name, lora in manager.get_adapter(adapter_id).loras.items()
            if name in manager.modules
        ]
        return sum(
            sum(a is not None for a in lora_a) if isinstance(lora_a, list) else 1
            for lora_a in packed
        )

    def start_reload(self) -> None:
        """Make the model ready for new weights."""
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def reload_part(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Load some of the new weights, as from a checkpoint."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(weights)

    def finish_reload(self) -> None:
        """Serve the new weights."""
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_runner.model_config)
        # A head tied to the embedding has a packed copy of its own on a CPU, which vLLM's reloading
        # leaves as it was.
        head = getattr(model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)


# By importing this module, for that is all that the worker processes of tensor parallelism do with
# it.
grouped_lora.install()
if current_platform.is_cpu():
    # The sampler counts ranks with a compiled function: inductor would want a C++ compiler, and
    # seconds.
    type(current_platform).simple_compile_backend = "eager"


def _parts(lora: Any) -> Iterator[torch.Tensor]:
    """A's and B's of one of vLLM's layers, which may pack several."""
    for tensors in (lora.lora_a, lora.lora_b):
        yield from (
            one for one in (tensors if isinstance(tensors, list) else [tensors]) if one is not None
        )


def _sample(output: Any) -> Sample:
    token_ids = list(output.token_ids)
    logprobs = [
        position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)
    ]
    return Sample(token_ids, logprobs, output.finish_reason)


def _executor(tensor_parallel_size: int) -> str:
    """Where vLLM's workers run: this process, processes of its own, or this process as one of
    several ranks.

    Always named, for where Ray runs vLLM may choose Ray's, which needs a placement group of its
    own.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        if tensor_parallel_size > 1:
            raise UserError(
                "an engine inside each of several training ranks cannot be split",
                got=f"generator.inference_engine_tensor_parallel_size={tensor_parallel_size}",
                fix="set it to 1, or trainer.placement.colocate_all=false",
            )
        return "external_launcher"
    return "uni" if tensor_parallel_size == 1 else "mp"


def _set_environment(cpu_kv_cache_gb: int | None) -> None:
    """Read by vLLM when it starts: in this process, quiet, no usage report; threads of a CPU, cache
    for a GPU.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if cpu_kv_cache_gb is not None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_kv_cache_gb)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        return
    vllm_gpu.claim_cache_root()
    # The first model runner samples each sequence that has a seed with a kernel of its own, the
    # second one all in one. 0.24 uses the second one for a list of architectures, without Qwen2's,
    # though it honours LoRA, sleep, processed log-probabilities and engines in this process for
    # others too; 0.32 uses it wherever it can. A model that it does not serve is refused by name,
    # and VLLM_USE_V2_MODEL_RUNNER=0, set by the user, stays.
    if hasattr(vllm_defaults, "DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES"):
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")


@contextlib.contextmanager
def _vllms_own_determinism() -> Iterator[None]:
    """Inside, torch's switch for deterministic kernels is off: vLLM has its own,
    VLLM_BATCH_INVARIANT, and is made and tried with that one alone.
    """
    enabled, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds and draws from the process's generators; the trainer must not notice."""
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Starting vLLM on a CPU disables torch.set_num_threads and changes the environment of every
    child process.

    0.24 with batch-invariant kernels replaces torch.bmm by one without a gradient; that under the
    dispatcher stays.
    """
    set_num_threads, threads, bmm = torch.set_num_threads, torch.get_num_threads(), torch.bmm
    before = {
        name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    }
    try:
        with _random_state_kept():
            yield
    finally:
        torch.set_num_threads, torch.bmm = set_num_threads, bmm
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
