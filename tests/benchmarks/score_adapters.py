"""Held-out accuracy of adapters of any trainer.

One engine and one evaluation score all of them with the same random numbers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.records.run_dir import RunDir
from tests.benchmarks.side_by_side import worker_files


def main() -> None:
    """Write the accuracy of each adapter of the spec, in order."""
    spec, result = worker_files()
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    from rltrain.pack import Pack

    with tempfile.TemporaryDirectory() as scratch:
        # 8 is the recipes' rank.
        largest = max(8, *(config(adapter)["r"] for adapter in spec["adapters"]))
        shared = [
            "generator.backend=transformers",
            "generator.max_num_seqs=512",
            f"generator.eval_n_samples_per_prompt={spec['samples']}",
            f"generator.max_lora_rank={largest}",
            f"trainer.num_threads={spec['threads']}",
        ]
        pack = Pack.open(recipes.load(spec["recipe"], shared))
        scores = [
            accuracy(pack, one, spec["recipe"], shared, Path(scratch) / str(i))
            for i, one in enumerate(spec["adapters"])
        ]
        pack.close()
    result.write_text(json.dumps({"accuracy": scores}))


def config(adapter: dict[str, str]) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter."""
    content: dict[str, Any] = json.loads(
        (Path(adapter["folder"]) / "adapter_config.json").read_text()
    )
    return content


def accuracy(
    pack: Any, adapter: dict[str, str], source: str, shared: list[str], folder: Path
) -> float:
    """Return the mean reward of an adapter on the held-out problems.

    The adapter joins the pack and is removed.
    """
    import torch
    from safetensors.torch import load_file

    from rltrain.evaluate import evaluate

    peft = config(adapter)
    recipe = recipes.load(
        source,
        [
            *shared,
            f"trainer.policy.model.lora.rank={peft['r']}",
            f"trainer.policy.model.lora.alpha={peft['lora_alpha']}",
            f"trainer.target_modules=[{','.join(sorted(peft['target_modules']))}]",
        ],
    )
    run_dir = RunDir(folder)
    run_dir.create("", {})
    member = pack.add(recipe, run_dir)
    weights = load_file(
        adapter.get("weights") or Path(adapter["folder"]) / "adapter_model.safetensors"
    )
    with torch.no_grad():
        for name, parameter in member.policy.parameters.items():
            parameter.copy_(weights.pop(name.replace(f".{member.name}.", ".")))
    if weights:
        raise ValueError(
            f"{adapter['folder']} holds more than its configuration says: {sorted(weights)[0]} ..."
        )
    pack.publish_member(member)
    metrics, _ = evaluate(pack, [member])[member]
    pack.remove(member)
    return round(metrics["eval/accuracy"], 4)


if __name__ == "__main__":
    main()
