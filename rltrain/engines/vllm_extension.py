"""The part of the vLLM engine that runs in vLLM's worker processes."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from rltrain.engines.cpu import grouped_lora

# On import: the worker processes of tensor parallelism do nothing else with this module.
grouped_lora.install()
if current_platform.is_cpu():
    # The sampler counts ranks with a compiled function: inductor would need a C++ compiler and
    # seconds.
    type(current_platform).simple_compile_backend = "eager"


class WorkerExtension:
    """Methods that the engine calls on vLLM's workers.

    vLLM makes this a base class of its worker class, in whichever process that runs.
    """

    model_runner: Any
    vllm_config: Any

    def add_adapter(
        self, adapter_id: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> bool:
        """Add an adapter from its tensors, as the worker does from a folder.

        Returns whether `update_adapter` can replace its values later.
        """
        manager = self.model_runner.lora_manager
        helper = PEFTHelper.from_dict(
            {**config, "vllm_max_position_embeddings": manager.max_position_embeddings}
        )
        helper.validate_legal(manager.lora_config)
        dtype = manager.lora_config.lora_dtype
        model = manager._adapter_manager.model
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        # Copies: vLLM multiplies B by the scale in place.
        copies = {
            name: tensor.to(manager.device, dtype, copy=True) for name, tensor in tensors.items()
        }
        adapter = manager._lora_model_cls.from_lora_tensors(
            adapter_id,
            copies,
            helper,
            device=str(manager.device),
            dtype=dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=getattr(mapper, "get_rename_mapper", lambda: mapper)(),
            skip_prefixes=getattr(model, "lora_skip_prefixes", None),
        )
        manager._adapter_manager.add_adapter(adapter)
        manager._adapter_manager.activate_adapter(adapter_id)
        adapter.updatable_tensors, adapter.scale = copies, helper.vllm_lora_scaling_factor
        served = {
            tensor.data_ptr()
            for lora in adapter.loras.values()
            for part in (lora.lora_a, lora.lora_b)
            for tensor in (part if isinstance(part, list) else [part])
            if tensor is not None
        }
        return all(tensor.data_ptr() in served for tensor in copies.values())

    def update_adapter(self, adapter_id: int, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the values of the tensors that `add_adapter` was given."""
        manager = self.model_runner.lora_manager._adapter_manager
        adapter = manager.get_adapter(adapter_id)
        for name, tensor in tensors.items():
            served = adapter.updatable_tensors[name].copy_(tensor)
            if "lora_B" in name:
                served.mul_(adapter.scale)
        manager.deactivate_adapter(adapter_id)
        manager.activate_adapter(adapter_id)

    def modules_served(self, adapter_id: int) -> int:
        """Return how many of an adapter's modules vLLM applies.

        vLLM packs q, k, v and gate, up, and silently ignores modules that it does not support.
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
        """Prepare the model for new weights."""
        model = self.model_runner.get_model()
        if current_platform.is_cpu():
            # vLLM 0.32 packs a mixture's experts for a CPU only where it makes their kernel.
            for module in model.modules():
                if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
                    module.quant_method.moe_kernel = None
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def reload_part(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Load some of the new weights, as from a checkpoint."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(weights)

    def finish_reload(self) -> None:
        """Serve the new weights."""
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_runner.model_config)
        # On a CPU a head tied to the embedding has a packed copy, which vLLM's reloading does not
        # update.
        head = getattr(model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)
