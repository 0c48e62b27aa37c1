"""Everything that the GPU tests and measurements use of the trainer, so that a change there is met
in one file.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from harness.config import recipe as recipes
from harness.config.metrics import without_timings
from harness.config.schema import Recipe
from harness.records import manifest
from harness.records.run_dir import RunDir
from tests.gpu.shapes import TINY_GSM

# What a random model says of every token, roughly; the proof that the engine sampled this policy is
# not wanted of it.
GUESS = -11.0
LORA = "trainer.policy.model.lora"
RANK, ALPHA, LR = f"{LORA}.rank", f"{LORA}.alpha", "trainer.policy.optimizer_config.lr"
DTYPE = "trainer.policy.model.dtype"
TOKENS, CHECKPOINTING = "trainer.max_tokens_per_microbatch", "trainer.gradient_checkpointing"
Row = Mapping[str, float]


def overrides(
    model: Path,
    data: Path,
    device: str,
    *,
    prompts: int,
    samples: int,
    prompt: int,
    completion: int,
    **others: Any,
) -> list[str]:
    """A run of one update a step on a model and problems of our own; `others`: more keys, dots as
    two underscores.
    """
    keys = {
        "trainer.policy.model.path": model,
        "data.train_data": f"[{data}]",
        "data.val_data": f"[{data}]",
        "trainer.placement.device": device,
        DTYPE: "bfloat16",
        "trainer.train_batch_size": prompts,
        "trainer.policy_mini_batch_size": prompts,
        "trainer.max_steps": 10_000,
        "trainer.eval_before_train": "false",
        "trainer.eval_interval": 0,
        "trainer.ckpt_interval": 0,
        "trainer.sync_tolerance": 1e9,
        RANK: 32,
        ALPHA: 32,
        "generator.backend": "transformers",
        "generator.n_samples_per_prompt": samples,
        "generator.max_input_length": prompt,
        "generator.max_num_seqs": 512,
        "generator.sampling_params.max_generate_length": completion,
        "generator.eval_sampling_params.max_generate_length": completion,
    }
    keys |= {name.replace("__", "."): value for name, value in others.items()}
    return [f"{key}={value}" for key, value in keys.items()]


def compose(name: str, keys: Sequence[str]) -> Recipe:
    """The recipe of that name with overrides, for one run."""
    recipe = recipes.load(name, keys)
    recipe.sweep, recipe.expect = None, {}
    return recipe


def quickstart(device: str, *keys: str) -> Recipe:
    """`recipes/quickstart.yaml` on a device, with the engine that needs no vLLM."""
    return compose(
        "quickstart",
        [f"trainer.placement.device={device}", "generator.backend=transformers", *keys],
    )


def new_run(folder: Path, recipe: Recipe) -> RunDir:
    """A fresh run directory."""
    run_dir = RunDir(folder)
    run_dir.create(
        recipes.to_yaml(recipe),
        manifest.build(recipe, kind="run", name=folder.name, source="tests.gpu"),
    )
    return run_dir


@contextlib.contextmanager
def opened(
    members: Sequence[Recipe], folder: Path, room: int | None = None
) -> Iterator[tuple[Any, list[Any]]]:
    """A pack with these members, their adapters published; closed in the end."""
    from rltrain.pack import Pack

    pack = Pack.open(members[0], slots=room or len(members))
    try:
        yield (
            pack,
            [join(pack, recipe, folder / str(place)) for place, recipe in enumerate(members)],
        )
    finally:
        pack.close()


def join(pack: Any, recipe: Recipe, folder: Path) -> Any:
    """Put a member into the pack and publish its adapter."""
    member = pack.add(recipe, new_run(folder, recipe))
    pack.publish_member(member)
    return member


def publish(pack: Any, member: Any) -> None:
    """Give the engine the member's adapter as it is now."""
    pack.publish_member(member)


def asleep(pack: Any) -> contextlib.AbstractContextManager[None]:
    """The engine gives its memory back, as while the trainer works in a step."""
    context: contextlib.AbstractContextManager[None] = pack.engine_asleep()
    return context


def step(pack: Any, members: Sequence[Any]) -> dict[Any, Row]:
    """One training step of these members; each one's metrics."""
    from rltrain.step import train_step

    return dict(train_step(pack, members))


def synthetic(pack: Any) -> contextlib.AbstractContextManager[Any]:
    """Let the engine give random tokens of full length at once: what remains of a step is the
    trainer's work.
    """
    from rltrain.engines.base import Sample

    def generate(requests: Sequence[Any]) -> list[list[Any]]:
        return [[draw(request, place) for place in range(request.n)] for request in requests]

    def draw(request: Any, place: int) -> Any:
        numbers, length = (
            random.Random(f"{request.seed}/{place}"),
            request.sampling.max_generate_length,
        )
        return Sample(
            [numbers.randrange(10, 800) for _ in range(length)], [GUESS] * length, "length"
        )

    return mock.patch.object(pack.engine, "generate", generate)


def real_engine(pack: Any) -> contextlib.AbstractContextManager[Any]:
    """Undo `synthetic`, which stands in the way as the engine's own attribute."""
    return mock.patch.object(
        pack.engine, "generate", type(pack.engine).generate.__get__(pack.engine)
    )


def sample(
    pack: Any, member: Any, prompts: Sequence[Sequence[int]], n: int, longest: int
) -> list[list[Any]]:
    """Samples `[P][G]` from the engine, at temperature 1; each has token_ids and logprobs."""
    from harness.config.schema import Sampling
    from rltrain.engines.base import Request

    sampling = Sampling(max_generate_length=longest)
    requests = [
        Request(ids, n, seed, sampling, pack.served_as(member)) for seed, ids in enumerate(prompts)
    ]
    samples: list[list[Any]] = pack.engine.generate(requests)
    return samples


def batch_of(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Any:
    """A batch, a prompt for each completion."""
    from rltrain.data.batch import collate

    guesses = [[GUESS] * len(ids) for ids in completions]
    return collate(prompts, completions, guesses, pad_id=0)


def logprobs(pack: Any, member: Any, batch: Any) -> Any:
    """Log-probabilities `[B, T]` of a batch's completions under a member's policy, with their
    graph.
    """
    from rltrain.models.logprobs import token_logprobs

    member.policy.activate()
    return token_logprobs(pack.model, batch, 1.0)


def adapter(member: Any) -> dict[str, Any]:
    """A member's trained parameters by name."""
    parameters: dict[str, Any] = member.policy.parameters
    return parameters


def shake(member: Any, seed: int = 0) -> None:
    """Give an adapter weights that a device has no part in: B is not zero, as after some
    training.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter(member).values():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def gradients(pack: Any, member: Any, batch: Any) -> dict[str, Any]:
    """Gradients of the mean log-probability of a batch's completions, by parameter."""
    import torch

    parameters = adapter(member)
    values = logprobs(pack, member, batch).sum() / batch.mask.sum()
    found = torch.autograd.grad(values, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def plain_logprobs(pack: Any, member: Any, prompt: Sequence[int], completion: Sequence[int]) -> Any:
    """The same of one sequence by transformers' own forward pass: nothing packed, shared or
    chunked, `[T]`.
    """
    import torch

    member.policy.activate()
    ids = torch.tensor([[*prompt, *completion]], device=pack.device)
    with torch.no_grad():
        logits = pack.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def optimize(pack: Any, member: Any, gradients: Mapping[str, Any]) -> Row:
    """One optimizer step with these gradients, clipping included; its metrics."""
    for name, parameter in adapter(member).items():
        parameter.grad = gradients[name].to(parameter.device, parameter.dtype)
    row: Row = member.policy.optimize(pack.ranks)
    return row


def contain_failures(pack: Any) -> dict[Any, Exception]:
    """Let a member that fails leave the others' step going on; who failed, and why, is found in the
    result.
    """
    pack.isolates_failures = True
    failures: dict[Any, Exception] = pack.failures
    return failures


@contextlib.contextmanager
def fails_to_update(member: Any, error: Exception) -> Iterator[None]:
    """Let a member's optimizer raise."""
    with mock.patch.object(member.policy.optimizer, "step", side_effect=error):
        yield


def train(
    recipe: Recipe, folder: Path, *, until: Callable[[Row], bool] = lambda row: False
) -> list[Row]:
    """Train a run in this process, to its end or to a step whose row ends it; its rows, times
    included.
    """
    from rltrain.worker_group import train_run

    rows: list[Row] = []
    with contextlib.closing(train_run(recipe, new_run(folder, recipe))) as reports:  # type: ignore[type-var]
        for report in reports:
            rows.append(dict(report.metrics))
            if until(rows[-1]):
                break
    return rows


def first_difference(one: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """Where two runs' rows first differ, and the largest difference of a metric at all, over the
    steps both have.
    """
    from rltrain.tools.compare import compare_rows

    theirs = {int(row["step"]): without_timings(dict(row)) for row in other}
    departures = [
        departure
        for row in one
        if int(row["step"]) in theirs
        for departure in compare_rows(
            int(row["step"]), without_timings(dict(row)), theirs[int(row["step"])]
        )
    ]
    largest = max(departures, key=lambda departure: departure.size, default=None)
    return {
        "steps_compared": len({int(row["step"]) for row in one} & set(theirs)),
        "same_bits": not departures,
        "first": str(departures[0]) if departures else None,
        "largest": str(largest) if largest else None,
    }


def tiny_gsm_data(folder: Path, train: int, validation: int) -> list[str]:
    """Overrides for the first problems of the embedded task."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", validation)):
        frame = pd.read_parquet(TINY_GSM / "data" / f"{name}.parquet")
        frame.head(rows).to_parquet(folder / f"{name}.parquet")
    return [
        f"data.train_data=[{folder}/train.parquet]",
        f"data.val_data=[{folder}/validation.parquet]",
    ]


def live_bytes(device: str) -> int:
    """Bytes of tensors that are alive: what the allocator counts on a GPU, what Python reaches on a
    CPU.
    """
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated())
    # Of the exact types: libraries keep tensors of others that hold no memory.
    storages = [
        one.untyped_storage()
        for one in gc.get_objects()
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
