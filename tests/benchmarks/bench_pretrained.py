"""One GRPO run of a pretrained model, SmolLM2-135M-Instruct, by TRL + PEFT and by ours.

As bench_single_run, on recipes/smollm2_instructions.yaml: same base, data, reward, batch, learning
rate and LoRA; 64 completions of at most 64 tokens a step. `make smollm2` first.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.bench_single_run import Setup, compare


def our_variants(engine: str) -> dict[str, dict[str, Any]]:
    """Return our settings that change only the speed, for an engine."""
    budget = "trainer.max_tokens_per_microbatch="
    return {
        "as it comes": {"engine": engine, "overrides": []},
        "1024 tokens a micro-batch": {"engine": engine, "overrides": [f"{budget}1024"]},
    }


SETUP = Setup(
    recipe="smollm2_instructions",
    lr=3e-4,
    variants={
        "TRL": {
            "8 a device": {"per_device": 8},
            "16 a device": {"per_device": 16},
            "64 a device": {"per_device": 64},
        },
        "ours, transformers": our_variants("transformers"),
        "ours, vllm": our_variants("vllm"),
    },
    steps={64: 4},
    tried={64: 2},
    warm_up=1,
    accuracy_completions=64,
    accuracy_steps=24,
    keep_every=4,
    samples=1,
    accuracies=(0.3, 0.4, 0.5),
    seeds=(0,),
)


def main() -> None:
    """Measure, print, and write `docs/benchmarks/pretrained.json`."""
    compare("pretrained", __doc__, SETUP)


if __name__ == "__main__":
    main()
