"""Completion tokens a second of rollouts of the quickstart's model with rank-8 adapters.

Compared are vllm, vllm with its LoRA operations ("vllm stock") and with none ("vllm without LoRA",
the bound), our decode loop on the trainer's modules ("transformers"), and transformers' `generate`
on them ("generate"), which TRL's trainers call.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.records.run_dir import RunDir
from tests.benchmarks.side_by_side import write_record

REPEATS = 3
SAMPLES_PER_PROMPT = 8
ADAPTERS = 8
WAYS = ("vllm", "vllm stock", "vllm without LoRA", "transformers", "generate")


def main() -> None:
    """Measure, print, and write `docs/benchmarks/rollout.json`."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        packs = {backend: _open(backend, Path(scratch)) for backend in ("vllm", "transformers")}
        variants = _variants(packs)
        rows: list[dict[str, Any]] = [
            {
                "samples": samples,
                "adapters": adapters,
                "engine": variant,
                "seconds": [],
                "cpu_seconds": [],
                "tokens": [],
            }
            for samples in (64, 128, 512)
            for adapters in (1, ADAPTERS)
            for variant in WAYS
            if adapters == 1 or (samples == 512 and variant != "generate")
        ]
        # One warm-up round, then alternating, so that a slow minute of the machine affects all
        # variants.
        for repeat in range(REPEATS + 1):
            for row in rows:
                start, cpu = time.perf_counter(), time.process_time()
                tokens = variants[row["engine"]](row["samples"], row["adapters"])
                if repeat:
                    row["seconds"].append(round(time.perf_counter() - start, 4))
                    row["cpu_seconds"].append(round(time.process_time() - cpu, 4))
                    row["tokens"].append(tokens)
    for row in rows:
        for what, seconds in (
            ("tokens_per_second", "seconds"),
            ("tokens_per_cpu_second", "cpu_seconds"),
        ):
            row[what] = round(
                statistics.median(n / s for n, s in zip(row["tokens"], row[seconds], strict=True))
            )
        print(
            f"{row['engine']:>12}  {row['samples']:>4} samples  {row['adapters']} adapters  "
            f"{row['tokens_per_second']:>7} tokens/s  {row['tokens_per_cpu_second']:>7} a "
            "CPU-second"
        )
    write_record("rollout", __doc__, repeats=REPEATS, threads=1, rows=rows)


def _open(backend: str, scratch: Path) -> tuple[Any, list[Any]]:
    """Return a pack and its members, B not zero."""
    import torch

    from rltrain.pack import Pack

    recipe = recipes.load(
        "quickstart", [f"generator.backend={backend}", "generator.max_num_seqs=512"]
    )
    pack = Pack.open(recipe, slots=ADAPTERS)
    members = []
    for index in range(ADAPTERS):
        run_dir = RunDir(scratch / backend / str(index))
        run_dir.create("", {})
        members.append(pack.add(recipe, run_dir))
    torch.manual_seed(0)
    with torch.no_grad():
        for member in members:
            for name, parameter in member.policy.parameters.items():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=1e-3)
    pack.publish(members)
    return pack, members


def _variants(packs: dict[str, tuple[Any, list[Any]]]) -> dict[str, Callable[[int, int], int]]:
    """Return each variant: a function of (samples, adapters) that returns the number of tokens."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def ours(backend: str) -> Callable[[int, int], int]:
        pack, members = packs[backend]
        return lambda samples, adapters: _rollout(pack, members[:adapters], samples)

    llm: Any = packs["vllm"][0].engine._llm
    wrappers = llm.collective_rpc(
        lambda worker: list(
            worker.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
        )
    )[0]

    class NoLoRA(PunicaWrapperCPU):
        """Leaves out the adapters' products: an upper bound on the speed of any LoRA operations."""

        def add_lora_linear(self, *_: Any, **__: Any) -> None:
            pass

    def with_wrapper(kind: type) -> Callable[[int, int], int]:
        def variant(samples: int, adapters: int) -> int:
            kinds = [type(wrapper) for wrapper in wrappers]
            for wrapper in wrappers:
                wrapper.__class__ = kind
            try:
                return ours("vllm")(samples, adapters)
            finally:
                for wrapper, original in zip(wrappers, kinds, strict=True):
                    wrapper.__class__ = original

        return variant

    pack, members = packs["transformers"]
    return {
        "vllm": ours("vllm"),
        "vllm stock": with_wrapper(PunicaWrapperCPU),
        "vllm without LoRA": with_wrapper(NoLoRA),
        "transformers": ours("transformers"),
        "generate": lambda samples, _: _generate(pack, members[0], samples),
    }


def _requests(pack: Any, members: Sequence[Any], samples: int) -> list[Any]:
    """Return requests for some samples of as many prompts for each member."""
    from rltrain.rollout import request

    prompts = samples // len(members) // SAMPLES_PER_PROMPT
    return [
        request(
            pack,
            member,
            problem,
            member.recipe.generator.sampling_params,
            SAMPLES_PER_PROMPT,
            "bench",
            index,
        )
        for member in members
        for index, problem in enumerate(member.problems[:prompts])
    ]


def _rollout(pack: Any, members: Sequence[Any], samples: int) -> int:
    groups = pack.engine.generate(_requests(pack, members, samples))
    return sum(len(sample.token_ids) for group in groups for sample in group)


def _generate(pack: Any, member: Any, samples: int) -> int:
    """Run `generate` of the PEFT model with the adapter, on left-padded prompts."""
    import torch

    requests = _requests(pack, [member], samples)
    prompts = [list(request.prompt_token_ids) for request in requests for _ in range(request.n)]
    width, eos = max(map(len, prompts)), pack.stop_token_ids[0]
    ids = torch.tensor([[eos] * (width - len(prompt)) + prompt for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(width) >= (width - lengths)[:, None]).long()
    sampling = requests[0].sampling
    member.policy.activate()
    with torch.no_grad():
        sequences = pack.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            max_new_tokens=sampling.max_generate_length,
            eos_token_id=list(pack.stop_token_ids),
            pad_token_id=eos,
        )[:, width:]
    ended = torch.isin(sequences, torch.tensor(pack.stop_token_ids)).cumsum(1)
    before_the_end = ended - torch.isin(sequences, torch.tensor(pack.stop_token_ids)).long() == 0
    return int(before_the_end.sum())


if __name__ == "__main__":
    main()
