"""One contender of bench_head in a separate process: time and memory of forward and backward."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from harness.records.files import write_json
from rltrain.models import logprobs
from tests.benchmarks.side_by_side import memory_gb, peak_memory_gb, worker_files

REPEATS = 3


def main() -> None:
    """Compute as the spec says and write the result.

    It has seconds of a pass, GiB above the inputs, and a digest of the results.
    """
    spec, result = worker_files()
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    tokens, vocabulary, hidden = spec["tokens"], spec["vocabulary"], spec["hidden"]
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    states = torch.randn(tokens, hidden, requires_grad=True)
    chosen, weights = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens)
    if spec["how"] == "all rows at once":
        logprobs.LOGITS_BYTES = 4 * tokens * vocabulary
    compute = _with_autograd if spec["how"] == "PyTorch's autograd" else logprobs.chosen_logprobs
    before, seconds, values = memory_gb(), [], torch.empty(0)
    for _ in range(REPEATS):
        states.grad = None
        start = time.perf_counter()
        values = compute(states, head, chosen, 1.0)
        (values[:, 0] * weights).sum().backward()
        seconds.append(time.perf_counter() - start)
    gradient = states.grad
    assert gradient is not None
    write_json(
        result,
        {
            "pass_s": round(median(seconds), 3),
            "memory_gb": round(peak_memory_gb() - before, 3),
            "logprobs": float(values[:, 0].double().sum()),
            "entropies": float(values[:, 1].double().sum()),
            "gradient": float((gradient.double() * states.detach()).sum()),
        },
    )


def _with_autograd(
    states: torch.Tensor, head: Any, chosen: torch.Tensor, temperature: float
) -> torch.Tensor:
    logprobs = torch.log_softmax(head(states) / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return torch.stack([logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1), entropy], dim=1)


if __name__ == "__main__":
    main()
