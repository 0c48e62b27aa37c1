"""vLLM's GPU worker with a KV cache no larger than the engine can fill. Imports vllm."""

from __future__ import annotations

from vllm.v1.worker import gpu_worker


class Worker(gpu_worker.Worker):
    """vLLM's worker, which leaves GPU memory free that a full batch cannot use.

    `kv_cache_memory_bytes` would set a size as well, but vLLM then skips measuring what its model
    and activations leave of `gpu_memory_utilization`, and a size that is too large ends in an
    out-of-memory error.
    """

    def determine_available_memory(self) -> int:
        """Return the bytes for keys and values: as measured, or what `max_num_seqs` sequences need.

        One sequence is added for vLLM's empty block and for blocks that are not freed at once.
        """
        available = int(super().determine_available_memory())
        specs = self.get_kv_cache_spec().values()
        per_sequence = sum(spec.max_memory_usage_bytes(self.vllm_config) for spec in specs)
        sequences = self.vllm_config.scheduler_config.max_num_seqs + 1
        return min(available, sequences * per_sequence)
