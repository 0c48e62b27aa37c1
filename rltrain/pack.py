"""Pack and Member: one frozen base and one rollout engine, and the runs that train adapters on them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from harness.errors import UserError
from harness.metrics import MetricsFile
from harness.rundir import RunDir
from harness.schema import Recipe, SyncMode
from harness.validate import engine_lora_rank
from rltrain import model as models
from rltrain import parallel
from rltrain.advantages import ADVANTAGES
from rltrain.engines.base import Engine, EngineOptions, build_engine, stop_token_ids
from rltrain.flops import measured_peak
from rltrain.objective import Objective
from rltrain.problems import Problem, load_problems
from rltrain.seeding import permutation, stream_seed
from rltrain.sync.base import Sync, build_sync

DEFAULT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class Timer:
    """Wall time of named spans, summed until taken."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside under `timing_s/<name>`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[f"timing_s/{name}"] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by metric name since the last call."""
        spent, self._spent = dict(self._spent), defaultdict(float)
        return spent


@dataclass(eq=False)
class Member:
    """One training run in a pack: its adapter's parameters, optimizer, data, counters and directory."""

    name: str
    recipe: Recipe
    run_dir: RunDir
    problems: list[Problem]
    held_out: list[Problem]
    num_dropped: int
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    reference: models.Reference | None
    sync: Sync
    objective: Objective = field(init=False)
    advantages: Any = field(init=False)
    metrics: MetricsFile = field(init=False)
    scheduler: torch.optim.lr_scheduler.LambdaLR = field(init=False)
    step: int = 0
    version: int = 0
    num_tokens: int = 0
    step_tokens: int = 0
    bad_steps: int = 0
    best: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.objective = Objective(self.recipe)
        self.advantages = ADVANTAGES[self.recipe.trainer.algorithm.advantage_estimator.name]
        self.metrics = MetricsFile(self.run_dir.metrics)

    @property
    def temperature(self) -> float:
        """The training samples' temperature."""
        return self.recipe.generator.sampling_params.temperature

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether updates see another policy than the one that sampled: several a step, or dropout."""
        trainer = self.recipe.trainer
        updates = trainer.update_epochs_per_batch * (trainer.train_batch_size // trainer.policy_mini_batch_size)
        return updates > 1 or trainer.policy.model.lora.dropout > 0

    @property
    def sync_tolerance(self) -> float:
        """The mean gap between engine and trainer that fails the run, in nats."""
        default = DEFAULT_TOLERANCE[parallel.dtype_of(self.recipe)]
        return self.recipe.trainer.sync_tolerance or default

    @property
    def total_steps(self) -> int:
        """`trainer.max_steps` if set, else whole batches in `trainer.epochs` passes over the data."""
        trainer = self.recipe.trainer
        per_epoch = len(self.problems) // trainer.train_batch_size
        return trainer.max_steps or trainer.epochs * per_epoch

    def batch_problems(self) -> list[Problem]:
        """The problems of the coming step: each epoch a new shuffle of the data, whole batches only."""
        size = self.recipe.trainer.train_batch_size
        epoch, batch = divmod(self.step, len(self.problems) // size)
        order = permutation(self.recipe.seed, "data", epoch, length=len(self.problems))
        return [self.problems[i] for i in order[batch * size : (batch + 1) * size]]


class Pack:
    """Members on one frozen base model and one rollout engine. A single run is a pack of one."""

    def __init__(
        self, recipe: Recipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: int = 1
    ) -> None:
        self.model: PreTrainedModel | PeftModel = base
        self.tokenizer = tokenizer
        self.device = parallel.device_of(recipe)
        self.members: list[Member] = []
        self.timer = Timer()
        self._shape = _shape(recipe)
        self._names = (f"member{i}" for i in itertools.count())
        self._used_up = False
        self.stop_token_ids = stop_token_ids(base, tokenizer)
        self.num_parameters = base.num_parameters()
        self.peak_flops = measured_peak(self.device, parallel.dtype_of(recipe))
        merged = recipe.trainer.policy.model.lora.sync is SyncMode.merge
        options = EngineOptions(
            model_path=models.model_folder(recipe.trainer.policy.model.path),
            dtype=parallel.dtype_of(recipe),
            stop_token_ids=self.stop_token_ids,
            max_lora_rank=0 if merged else engine_lora_rank(recipe),
            max_loras=room,
        )
        self.engine: Engine = build_engine(recipe, base, options)

    @classmethod
    def open(cls, recipe: Recipe, *, room: int = 1) -> Pack:
        """Load the base model and start the engine that a recipe asks for, with room for so many members at a time."""
        parallel.set_threads(recipe)
        return cls(recipe, *models.load_base(recipe), room)

    def can_hold(self, recipe: Recipe) -> bool:
        """Whether a run of this recipe can join: same base, engine and threads, and the base is still untrained."""
        return not self._used_up and self._shape == _shape(recipe)

    def join(self, recipe: Recipe, run_dir: RunDir) -> Member:
        """A new member with a fresh adapter (rank 0: the base's own weights become trainable)."""
        name = next(self._names)
        problems, dropped = load_problems(recipe, recipe.data.train_data, self.tokenizer)
        held_out, _ = load_problems(recipe, recipe.data.val_data, self.tokenizer)
        if len(problems) < recipe.trainer.train_batch_size:
            raise UserError(
                "too few prompts are short enough to fill a batch",
                got=f"{len(problems)} prompts, {dropped} dropped as longer than generator.max_input_length",
                allowed=f">= {recipe.trainer.train_batch_size} (trainer.train_batch_size)",
                fix="raise generator.max_input_length, or lower trainer.train_batch_size",
            )
        reference, parameters = self._trainable(name, recipe)
        settings = recipe.trainer.policy.optimizer_config
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=settings.lr, betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        member = Member(
            name=name, recipe=recipe, run_dir=run_dir, problems=problems, held_out=held_out, num_dropped=dropped,
            parameters=parameters, optimizer=optimizer, reference=reference,
            sync=build_sync(recipe.trainer.policy.model.lora.sync, _sync_root(recipe, run_dir)),
        )  # fmt: skip
        schedule = "constant_with_warmup" if settings.scheduler.name == "constant" else settings.scheduler.name
        member.scheduler = get_scheduler(schedule, optimizer, settings.num_warmup_steps, member.total_steps)
        self.members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """Take a member out: its adapter, optimizer and synced files go; its run directory stays."""
        self.members.remove(member)
        self.engine.drop_adapter(member.name)
        if isinstance(self.model, PeftModel):
            # A PeftModel without adapters cannot compute: with the last one the plain base comes back.
            if self.members:
                self.activate(self.members[0])
                self.model.delete_adapter(member.name)
            else:
                self.model = self.model.unload()
                self.engine.use_model(self.model)
        shutil.rmtree(_sync_root(member.recipe, member.run_dir), ignore_errors=True)

    def activate(self, member: Member) -> None:
        """Make a member's adapter the one that computes and trains."""
        if isinstance(self.model, PeftModel):
            self.model.set_adapter(member.name)

    @contextlib.contextmanager
    def engine_asleep(self) -> Iterator[None]:
        """The engine gives its device memory back while the trainer works (nothing to give on a CPU)."""
        self.engine.sleep()
        yield
        self.engine.wake()

    def served_as(self, member: Member) -> str | None:
        """The name the engine knows a member's adapter by; None where its weights are the engine's own."""
        lora = member.recipe.trainer.policy.model.lora
        merged = lora.sync is SyncMode.merge and not self.engine.shares_weights
        return None if merged or lora.rank == 0 else member.name

    def publish(self) -> None:
        """Every member's adapter to the engine, version + 1."""
        for member in self.members:
            self.publish_member(member)

    def publish_member(self, member: Member) -> None:
        """One member's adapter to the engine, version + 1."""
        member.version += 1
        with self.timer.span("sync"):
            member.sync.publish(self.engine, self.model, member.name, member.version)

    def close(self) -> None:
        """Give the engine's and the model's memory back."""
        for member in list(self.members):
            self.leave(member)
        self.engine.close()

    def _trainable(self, name: str, recipe: Recipe) -> tuple[models.Reference | None, dict[str, torch.nn.Parameter]]:
        wants_reference = recipe.trainer.algorithm.use_kl_loss
        if recipe.trainer.policy.model.lora.rank > 0:
            self.model = models.add_adapter(self.model, name, recipe, stream_seed(recipe.seed, "adapter"))
            self.engine.use_model(self.model)
            reference = models.AdapterOff(self.model) if wants_reference else None
            return reference, models.adapter_parameters(self.model, name)
        # Full fine-tuning changes the base under everyone's feet: it is alone, and the pack ends with it.
        self._used_up = True
        copy = models.FrozenCopy(self.model) if wants_reference else None
        self.model.requires_grad_(True)
        return copy, dict(self.model.named_parameters())


def _sync_root(recipe: Recipe, run_dir: RunDir) -> Path:
    """Where disk sync keeps a run's adapters: its own folder, so that runs cannot overwrite each other."""
    wanted = recipe.trainer.policy.model.lora.lora_sync_path
    if wanted is None:
        return run_dir.path / "sync"
    # Trials of different sweeps have the same names: the whole path tells them apart.
    own = hashlib.sha256(str(run_dir.path).encode()).hexdigest()[:8]
    return Path(wanted) / f"{run_dir.path.name}-{own}"


def _shape(recipe: Recipe) -> tuple[object, ...]:
    """What two runs must have in common to share a base and an engine."""
    model, generator = recipe.trainer.policy.model, recipe.generator
    lengths = [generator.max_input_length, generator.sampling_params.max_generate_length,
               generator.eval_sampling_params.max_generate_length]  # fmt: skip
    engine = [generator.backend, generator.gpu_memory_utilization, generator.cpu_kv_cache_gb, generator.max_num_seqs,
              generator.enforce_eager]  # fmt: skip
    rank = 0 if model.lora.rank == 0 else engine_lora_rank(recipe)
    return (model.path, parallel.dtype_of(recipe), parallel.device_of(recipe), recipe.trainer.num_threads,
            *lengths, *engine, model.lora.sync, rank)  # fmt: skip
