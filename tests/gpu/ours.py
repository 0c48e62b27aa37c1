"""All of the trainer that GPU tests and measurements use, so that a change needs one edit."""

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

# About the log-probability of every token under a random model. Agreement of engine and trainer is
# not checked for it.
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
    """Return overrides for a run of one update a step on a generated model and problems.

    `others`: more keys, with two underscores for each dot.
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
    """Return the recipe of that name with overrides, for one run."""
    recipe = recipes.load(name, keys)
    recipe.sweep, recipe.expect = None, {}
    return recipe


def quickstart(device: str, *keys: str) -> Recipe:
    """Return `recipes/quickstart.yaml` on a device, with the transformers engine."""
    return compose(
        "quickstart",
        [f"trainer.placement.device={device}", "generator.backend=transformers", *keys],
    )


def new_run(folder: Path, recipe: Recipe) -> RunDir:
    """Create a fresh run directory."""
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
    """Open a pack with these members and publish their adapters; close it at the end."""
    from rltrain.pack import Pack

    pack = Pack.open(members[0], slots=room or len(members))
    try:
        yield (
            pack,
            [join(pack, recipe, folder / str(index)) for index, recipe in enumerate(members)],
        )
    finally:
        pack.close()


def join(pack: Any, recipe: Recipe, folder: Path) -> Any:
    """Add a member to the pack and publish its adapter."""
    member = pack.add(recipe, new_run(folder, recipe))
    pack.publish_member(member)
    return member


def publish(pack: Any, member: Any) -> None:
    """Send the member's current adapter to the engine."""
    pack.publish_member(member)


def asleep(pack: Any) -> contextlib.AbstractContextManager[None]:
    """Have the engine release its memory, as in a training step."""
    context: contextlib.AbstractContextManager[None] = pack.engine_asleep()
    return context


def step(pack: Any, members: Sequence[Any]) -> dict[Any, Row]:
    """Take one training step of these members; return the metrics of each."""
    from rltrain.step import train_step

    return dict(train_step(pack, members))


def synthetic(pack: Any) -> contextlib.AbstractContextManager[Any]:
    """Replace the engine's samples by random tokens of full length.

    The rest of a step is then the trainer's work.
    """
    from rltrain.engines.base import Sample

    def generate(requests: Sequence[Any]) -> list[list[Any]]:
        return [[draw(request, index) for index in range(request.n)] for request in requests]

    def draw(request: Any, index: int) -> Any:
        numbers, length = (
            random.Random(f"{request.seed}/{index}"),
            request.sampling.max_generate_length,
        )
        return Sample(
            [numbers.randrange(10, 800) for _ in range(length)], [GUESS] * length, "length"
        )

    return mock.patch.object(pack.engine, "generate", generate)


def real_engine(pack: Any) -> contextlib.AbstractContextManager[Any]:
    """Undo `synthetic`, which sets an attribute of the engine."""
    return mock.patch.object(
        pack.engine, "generate", type(pack.engine).generate.__get__(pack.engine)
    )


def sample(
    pack: Any, member: Any, prompts: Sequence[Sequence[int]], n: int, longest: int
) -> list[list[Any]]:
    """Return samples `[P][G]` from the engine at temperature 1, with token_ids and logprobs."""
    from harness.config.schema import Sampling
    from rltrain.engines.base import Request

    sampling = Sampling(max_generate_length=longest)
    requests = [
        Request(ids, n, seed, sampling, pack.served_as(member)) for seed, ids in enumerate(prompts)
    ]
    samples: list[list[Any]] = pack.engine.generate(requests)
    return samples


def batch_of(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Any:
    """Return a batch with a prompt for each completion."""
    from rltrain.data.batch import collate

    guesses = [[GUESS] * len(ids) for ids in completions]
    return collate(prompts, completions, guesses, pad_id=0)


def logprobs(pack: Any, member: Any, batch: Any) -> Any:
    """Return log-probabilities `[B, T]` of a batch's completions under a member's policy.

    The result has a graph for gradients.
    """
    from rltrain.models.logprobs import token_logprobs

    member.policy.activate()
    return token_logprobs(pack.model, batch, 1.0)


def adapter(member: Any) -> dict[str, Any]:
    """Return a member's trained parameters by name."""
    parameters: dict[str, Any] = member.policy.parameters
    return parameters


def shake(member: Any, seed: int = 0) -> None:
    """Set an adapter to random weights that do not depend on the device.

    B is not zero, like after training.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter(member).values():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def gradients(pack: Any, member: Any, batch: Any) -> dict[str, Any]:
    """Return gradients of the mean log-probability of a batch's completions, by parameter."""
    import torch

    parameters = adapter(member)
    values = logprobs(pack, member, batch).sum() / batch.mask.sum()
    result = torch.autograd.grad(values, list(parameters.values()))
    return dict(zip(parameters, result, strict=True))


def plain_logprobs(pack: Any, member: Any, prompt: Sequence[int], completion: Sequence[int]) -> Any:
    """Return log-probabilities `[T]` of one sequence by transformers' forward pass.

    Nothing is packed, shared or chunked.
    """
    import torch

    member.policy.activate()
    ids = torch.tensor([[*prompt, *completion]], device=pack.device)
    with torch.no_grad():
        logits = pack.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def optimize(pack: Any, member: Any, gradients: Mapping[str, Any]) -> Row:
    """Take one optimizer step with these gradients, clipping included; return its metrics."""
    for name, parameter in adapter(member).items():
        parameter.grad = gradients[name].to(parameter.device, parameter.dtype)
    row: Row = member.policy.optimize(pack.ranks)
    return row


def contain_failures(pack: Any) -> dict[Any, Exception]:
    """Isolate failures of members; return the dictionary to which errors are added by member."""
    pack.isolates_failures = True
    failures: dict[Any, Exception] = pack.failures
    return failures


@contextlib.contextmanager
def fails_to_update(member: Any, error: Exception) -> Iterator[None]:
    """Make a member's optimizer raise."""
    with mock.patch.object(member.policy.optimizer, "step", side_effect=error):
        yield


def train(
    recipe: Recipe, folder: Path, *, until: Callable[[Row], bool] = lambda row: False
) -> list[Row]:
    """Train a run in this process, to its end or until `until(row)`; return its rows with times."""
    from rltrain.worker_group import train_run

    rows: list[Row] = []
    with contextlib.closing(train_run(recipe, new_run(folder, recipe))) as reports:  # type: ignore[type-var]
        for report in reports:
            rows.append(dict(report.metrics))
            if until(rows[-1]):
                break
    return rows


def first_difference(one: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """Return where two runs' rows first differ, and the largest difference of a metric.

    Only steps of both runs are compared.
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
    """Return overrides for the first problems of the embedded task."""
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
    """Return the bytes of live tensors.

    A GPU's allocator counts them; on a CPU Python finds them.
    """
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated())
    # Of the exact types: libraries keep tensors of subclasses that hold no memory.
    storages = [
        one.untyped_storage()
        for one in gc.get_objects()
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
