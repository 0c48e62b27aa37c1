"""Sizes, folders, a clock and a record for one section of the measurements."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.benchmarks.side_by_side import peak_memory_gb
from tests.gpu import ours
from tests.gpu.shapes import Shape, tiny, write_model, write_problems

T = TypeVar("T")
S = TypeVar("S")


@dataclass
class Bench:
    """One section: its device, sizes, folders and record."""

    device: str
    scratch: Path
    record: Path
    end: float
    """When its time is over, by `time.monotonic`."""
    model: Path | None = None
    data: Path | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    peak: float = 0.0

    def run(self, work: Callable[[Bench], None]) -> None:
        """Run the section; an exception is recorded as its last error."""
        try:
            work(self)
        except Exception as error:
            self._fail("the section", error)
        self.peak = max(self.peak, self.peak_gb())
        self._write()

    def size(self, large: T, small: S) -> T | S:
        """Return the first on a GPU, the second on a CPU."""
        return large if self.device == "cuda" else small

    def folder(self, name: str) -> Path:
        """Create a new folder for the section."""
        path = self.scratch / f"{self.record.stem}-{name.replace(' ', '_')}"
        path.mkdir(parents=True)
        return path

    def write_model(self, name: str, shape: Shape) -> Path:
        """Return the folder of a random model of that shape, or on a CPU of a similar tiny one.

        All sections share the folder.
        """
        folder = write_model(self.scratch / name, self.size(shape, tiny(shape)), self.device)
        self.free()
        return folder

    def write_problems(self, tokens: int) -> Path:
        """Return a file of problems with prompts of this many tokens; all sections share it."""
        return write_problems(self.scratch, tokens)

    def recipe(
        self, model: Path, prompts: int, samples: int, prompt: int, completion: int, **keys: Any
    ) -> Any:
        """A recipe of that many sequences a step on a model; `keys` as for `ours.overrides`."""
        return ours.compose(
            "base",
            ours.overrides(
                model,
                self.write_problems(prompt),
                self.device,
                prompts=prompts,
                samples=samples,
                prompt=prompt,
                completion=completion,
                **keys,
            ),
        )

    def left(self) -> float:
        """Return the seconds left to the section."""
        return self.end - time.monotonic()

    def note(self, name: str, value: Any) -> None:
        """Record a value and write the record, so that a killed section keeps its results."""
        self.seen[name] = value
        self._write()

    def part(self, name: str, work: Callable[[], T], *, keep_cache: bool = False) -> T | None:
        """Record what a part returns; one that fails is recorded with its traceback.

        Other parts still run. With `keep_cache` PyTorch keeps its free memory for the next part,
        which is timed in the same pack.
        """
        start, value = time.perf_counter(), None
        try:
            value = work()
        except Exception as error:
            self._fail(name, error)
        else:
            self.note(name, value)
        if value is None or not keep_cache:
            self.free()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        return value

    def _fail(self, name: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self.errors.append(f"{name}: {why}")
        self.note(
            name, {"error": why, "traceback": "".join(traceback.format_exception(error))[-6000:]}
        )

    def _write(self) -> None:
        content = {"peak_gb": self.peak, "seen": self.seen, "errors": self.errors}
        self.record.write_text(json.dumps(content, indent=1, default=str) + "\n")

    def free(self) -> None:
        """Release unused memory, and reset its peak."""
        gc.collect()
        self._reset_peak()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        self.peak = max(self.peak, self.peak_gb())
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        """Return GiB on the device: of tensors, of PyTorch's cache, and of all processes."""
        if self.device == "cpu":
            return {"allocated_gb": round(ours.live_bytes("cpu") / 2**30, 4)}
        import torch

        free, total = torch.cuda.mem_get_info()
        amounts = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free
        return {
            f"{name}_gb": round(amount / 2**30, 3)
            for name, amount in zip(("allocated", "reserved", "used"), amounts, strict=True)
        }

    def timed(self, work: Callable[[], T]) -> tuple[T, float, float]:
        """Return the result of `work`, its seconds, and the peak memory in GiB.

        On a CPU the peak is that of the process so far.
        """
        self.wait()
        self._reset_peak()
        start = time.perf_counter()
        value = work()
        self.wait()
        return value, time.perf_counter() - start, self.peak_gb()

    def peak_gb(self) -> float:
        """Return the peak memory in GiB: allocated on a GPU, else of the process."""
        if self.device == "cuda":
            import torch

            return round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return round(peak_memory_gb(), 3)

    def peak_flops(self) -> float:
        """Return FLOP/s of the fastest of a few bfloat16 products of 8192 x 8192 matrices.

        On a CPU the matrices are 512 x 512.
        """
        import torch

        size = self.size(8192, 512)
        left = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        seconds = [self.timed(lambda: left @ left)[1] for _ in range(self.size(10, 3))]
        return float(2 * size**3 / min(seconds))


def card(bench: Bench) -> None:
    """Record the device's name and memory, and the speed of its matrix products."""
    import torch

    if bench.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        bench.note("name", properties.name)
        bench.note("memory_gb", round(properties.total_memory / 2**30, 1))
        bench.note("capability", f"{properties.major}.{properties.minor}")
        bench.note("cuda", torch.version.cuda)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,power.limit,clocks.max.sm",
            "--format=csv,noheader",
        ]
        if shutil.which(query[0]):
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
            bench.note("driver, power limit, clock", done.stdout.strip())
    bench.note("bf16_tflops", round(bench.peak_flops() / 1e12, 3))


def flops_per_token(shape: Shape, length: float) -> float:
    """Return FLOPs a token of a forward pass and a backward pass of activations.

    Products of LoRA are left out; `length` tokens are visible. 4 a weight, embeddings counted once,
    as the head; 6 x heads x head size x length a layer for causal attention.
    """
    heads = shape.num_attention_heads * shape.head_dim
    attention = 2 * shape.hidden_size * (heads + shape.num_key_value_heads * shape.head_dim)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size
    return 4.0 * weights + 6.0 * shape.num_hidden_layers * heads * length


def quiet() -> None:
    """Keep progress bars and known warnings out of a section's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
