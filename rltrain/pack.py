"""A pack: a frozen base model, a rollout engine, and members that train adapters on them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil  # type: ignore[import-untyped]
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.config.schema import AdvantageEstimator, KLReference, LoRA, Recipe, SyncMode
from harness.config.validate import engine_lora_rank, sync_mode
from harness.core.errors import UserError
from harness.records.run_dir import RunDir
from rltrain.algorithms.critic import Critic
from rltrain.algorithms.policy import Policy
from rltrain.data.seeding import stream_seed
from rltrain.distributed import placement
from rltrain.distributed.device_memory import release
from rltrain.distributed.process import exits_are_failures
from rltrain.distributed.process_group import Ranks
from rltrain.engines.base import Engine, EngineOptions, Sample, stop_token_ids
from rltrain.engines.distributed import place_engine
from rltrain.envs.problems import Problem, load_problems
from rltrain.member import Member, sync_tolerance, total_steps
from rltrain.models import adapter_start, loading, memory
from rltrain.models.flops import measured_peak
from rltrain.models.logprobs import (
    AdapterOff,
    FrozenAdapter,
    FrozenModel,
    Reference,
    computing_dtype,
)
from rltrain.sync.registry import build_sync

P = ParamSpec("P")
T = TypeVar("T")


class Pack:
    """Members on one frozen base model and one rollout engine; a run alone is a pack of one.

    With several ranks each holds the pack, its base sharded, and all make the same calls in the
    same order.

    Attributes:
        isolates_failures: whether a member's failure is kept in `failures` and the others continue.
        base_samples: completions of untrained members, by what they were asked.
        tried_tokens: tokens of the largest micro-batch that was tried on this GPU.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int,
        ranks: Ranks,
    ) -> None:
        self.model: PreTrainedModel | PeftModel = base
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.device = placement.device_of(recipe)
        self.members: list[Member] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self.isolates_failures = False
        self.failures: dict[Member, Exception] = {}
        self.base_samples: dict[str, list[list[Sample]]] = {}
        self.tried_tokens = 0
        self._slots = slots
        self._names = (f"member{i}" for i in itertools.count())
        self._problems: dict[tuple[str | int, ...], tuple[list[Problem], int]] = {}
        self.stop_token_ids = stop_token_ids(base, tokenizer)
        self.pad_id = self.stop_token_ids[0]
        self.active_parameters = loading.active_parameters(base)
        self.vocabulary_size = base.get_input_embeddings().weight.shape[0]
        dtype = placement.dtype_of(recipe)
        self.peak_flops = measured_peak(self.device, dtype) * ranks.size
        # Before the engine, which takes the memory that is left: a base that is to be sharded must
        # not be whole on each GPU then.
        ranks.shard(base, computing_dtype(base))
        merged = sync_mode(recipe.trainer.policy.model.lora) is SyncMode.merge
        options = EngineOptions(
            model_path=loading.model_folder(recipe.trainer.policy.model.path),
            dtype=dtype,
            stop_token_ids=self.stop_token_ids,
            max_lora_rank=0 if merged else engine_lora_rank(recipe),
            max_loras=slots,
        )
        self.engine: Engine = place_engine(recipe, base, options, ranks)

    @classmethod
    def open(cls, recipe: Recipe, *, slots: int = 1, ranks: Ranks | None = None) -> Pack:
        """Load the recipe's base model and start its engine, for at most `slots` members."""
        placement.prepare_process(recipe)
        return cls(recipe, *loading.load_base(recipe), slots, ranks or Ranks())

    def add(self, recipe: Recipe, run_dir: RunDir) -> Member:
        """Add a member with its adapter, fresh or a stored one, and, for PPO, a fresh critic.

        At rank 0 the base's own weights become trainable. Raises UserError for too few prompts, and
        for an adapter to start from that cannot be used.
        """
        name = next(self._names)
        problems, dropped = self._load_problems(recipe, recipe.data.train_data)
        held_out, _ = self._load_problems(recipe, recipe.data.val_data)
        if len(problems) < recipe.trainer.train_batch_size:
            raise UserError(
                "too few prompts are short enough to fill a batch",
                got=f"{len(problems)} prompts, {dropped} dropped as longer than "
                "generator.max_input_length",
                allowed=f">= {recipe.trainer.train_batch_size} (trainer.train_batch_size)",
                fix="raise generator.max_input_length, or lower trainer.train_batch_size",
            )
        steps = total_steps(recipe, len(problems))
        start = self.ranks.once(lambda: adapter_start.keep(recipe, run_dir))
        policy = self._policy(name, recipe, steps, start)
        has_critic = recipe.trainer.algorithm.advantage_estimator is AdvantageEstimator["gae"]
        sync = build_sync(
            sync_mode(recipe.trainer.policy.model.lora),
            _sync_folder(recipe, run_dir),
            self.ranks.once,
        )
        member = Member(
            name=name,
            recipe=recipe,
            run_dir=run_dir,
            problems=problems,
            held_out=held_out,
            num_dropped=dropped,
            policy=policy,
            critic=self._critic(f"{name}_critic", recipe, steps) if has_critic else None,
            sync=sync,
            max_tokens=self._max_tokens(recipe, run_dir),
        )
        self.members.append(member)
        return member

    def remove(self, member: Member) -> None:
        """Remove a member's adapters, optimizers and synced files; its run directory stays."""
        self.members.remove(member)
        self.engine.drop_adapter(member.name)
        if isinstance(self.model, PeftModel):
            # A PeftModel cannot compute without adapters: with the last one it is unwrapped.
            if self.members:
                self.members[0].policy.activate()
                for model in member.trained_models:
                    if model.model is self.model:
                        self.model.delete_adapter(model.adapter)
                if isinstance(member.policy.reference, FrozenAdapter):
                    self.model.delete_adapter(member.policy.reference.adapter)
            else:
                self.model = self.model.unload()
                self.engine.use_model(self.model)
        if self.ranks.first:
            shutil.rmtree(_sync_folder(member.recipe, member.run_dir), ignore_errors=True)

    @contextlib.contextmanager
    def engine_asleep(self) -> Iterator[None]:
        """Have the engine release its GPU memory inside, for the trainer to use."""
        self.engine.sleep()
        try:
            yield
        finally:
            self.engine.wake()

    def served_as(self, member: Member) -> str | None:
        """Return the adapter's name in the engine; None where the weights are the engine's own."""
        lora = member.recipe.trainer.policy.model.lora
        merged = sync_mode(lora) is SyncMode.merge and not self.engine.shares_weights
        return None if merged or lora.rank == 0 else member.name

    def isolate(
        self, member: Member, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Return `work(...)`, done for a member; None where it fails or the member has failed.

        The error is kept in `failures`, or raised where failures are not isolated.
        """
        if member in self.failures:
            return None
        try:
            with exits_are_failures():
                return work(*args, **kwargs)
        except torch.AcceleratorError:
            raise  # this process cannot use the GPU any more
        except Exception as error:
            if not self.isolates_failures:
                raise
            release(error)
            for model in member.trained_models:
                model.optimizer.zero_grad()
            self.failures[member] = error
            self.model.eval()  # whatever mode the failed member left
            return None

    def publish(self, members: Sequence[Member]) -> None:
        """Send these members' adapters to the engine, as a new version each."""
        for member in members:
            self.isolate(member, self.publish_member, member)

    def publish_member(self, member: Member) -> None:
        """Send one member's adapter to the engine, as a new version."""
        member.version += 1
        with self.span("sync"):
            member.sync.publish(self.engine, self.model, member.name, member.version)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the wall time inside to `timing_s/<name>`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[f"timing_s/{name}"] += time.perf_counter() - start

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds of all spans since the last call, by metric name."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def close(self) -> None:
        """Release the memory of engine and model."""
        for member in list(self.members):
            self.remove(member)
        self.engine.close()

    def _load_problems(self, recipe: Recipe, paths: Sequence[str]) -> tuple[list[Problem], int]:
        """Load problems, once for all members that read the same files in the same way."""
        columns = (recipe.data.question_column or "", recipe.data.answer_column or "")
        limit = recipe.generator.max_input_length
        key: tuple[str | int, ...] = (*paths, *columns, recipe.environment.env_class, limit)
        if key not in self._problems:
            self._problems[key] = load_problems(recipe, paths, self.tokenizer)
        return self._problems[key]

    def _max_tokens(self, recipe: Recipe, run_dir: RunDir) -> int | None:
        """Return the most tokens of a micro-batch: the recipe's number, or an estimate for `auto`.

        Fewer where one of the run has been out of memory before.
        """
        limit = recipe.trainer.max_tokens_per_microbatch
        if limit == "auto":
            shape = memory.shape_of(recipe.trainer.policy.model.path)
            on_gpu = self.device.type == "cuda"
            if shape is None:  # an architecture without a memory model
                limit = memory.ROOM_TOKENS if on_gpu else memory.MOST_TOKENS_CPU
            else:
                estimate = memory.tokens_that_fit(
                    recipe, shape, self._free_bytes, on_gpu=on_gpu, members=self._slots
                )
                limit = min(self.ranks.all_objects(estimate))
        manifest = run_dir.read_manifest() if run_dir.manifest.exists() else {}
        events = manifest.get("out_of_memory", [])
        return events[-1]["tokens"] if events else limit

    @functools.cached_property
    def _free_bytes(self) -> int:
        """Memory for the trainer beside the base model, while the engine sleeps."""
        with self.engine_asleep():
            if self.device.type != "cuda":
                return int(psutil.virtual_memory().available) // self.ranks.size
            free, _ = torch.cuda.mem_get_info(self.device)
            reserved = torch.cuda.memory_reserved(self.device)
            return free + reserved - torch.cuda.memory_allocated(self.device)

    def _policy(self, name: str, recipe: Recipe, steps: int, start: Path | None) -> Policy:
        algorithm, lora = recipe.trainer.algorithm, recipe.trainer.policy.model.lora
        wants_reference = algorithm.use_kl_loss or algorithm.use_kl_in_reward
        reference: Reference | None = None
        if lora.rank > 0:
            self._add_adapter(name, recipe, lora, start)
            parameters = loading.adapter_parameters(self.model, name)
            reference = AdapterOff(self.model) if wants_reference else None
            # Without an adapter to start from, the start is the base.
            from_start = recipe.trainer.reference is KLReference.start and start is not None
            if wants_reference and from_start:
                frozen_name = f"{name}_start"
                self._add_adapter(frozen_name, recipe, lora, start)
                reference = FrozenAdapter(self.model, frozen_name, name)
        else:
            # Full fine-tuning changes the base: its member is alone in the pack.
            if wants_reference:
                path = recipe.trainer.policy.model.path
                frozen = self._load_model(path, recipe, key="trainer.policy.model.path")
                reference = FrozenModel(frozen)
            parameters = dict(self.model.requires_grad_(True).named_parameters())
        tolerance = sync_tolerance(recipe)
        return Policy(name, self.model, parameters, recipe, reference, steps, tolerance)

    def _critic(self, name: str, recipe: Recipe, steps: int) -> Critic:
        """Return a critic: an adapter on the policy's base if it can share that, else its own."""
        critic, policy = recipe.trainer.critic.model, recipe.trainer.policy.model
        path = critic.path or policy.path
        same_base = loading.model_folder(path) == loading.model_folder(policy.path)
        if same_base and critic.lora.rank > 0 and policy.lora.rank > 0:
            self._add_adapter(name, recipe, critic.lora)
            parameters = loading.adapter_parameters(self.model, name)
            return Critic(name, self.model, parameters, recipe, steps)
        full = critic.lora.rank == 0
        base: Any = self._load_model(path, recipe, key="trainer.critic.model.path", full=full)
        if full:
            parameters = {
                parameter_name: parameter.requires_grad_(True)
                for parameter_name, parameter in base.named_parameters()
                if not parameter_name.startswith("lm_head.")
            }
        else:
            config = loading.lora_config(recipe, critic.lora)
            base = loading.add_adapter(base, name, config, _adapter_seed(recipe, name))
            parameters = loading.adapter_parameters(base, name)
        return Critic(name, base, parameters, recipe, steps)

    def _load_model(
        self, path: str, recipe: Recipe, *, key: str, full: bool = False
    ) -> PreTrainedModel:
        model = loading.load_model(path, recipe, key=key, full=full)
        self.ranks.shard(model, computing_dtype(model))
        return model

    def _add_adapter(
        self, name: str, recipe: Recipe, lora: LoRA, start: Path | None = None
    ) -> None:
        config = loading.lora_config(recipe, lora)
        self.model = loading.add_adapter(self.model, name, config, _adapter_seed(recipe, name))
        if start is not None:
            loading.load_adapter(self.model, name, start)
        self.engine.use_model(self.model)


def _adapter_seed(recipe: Recipe, name: str) -> int:
    """Return the seed of A, which depends on the run's seed, not on the member's name."""
    return stream_seed(recipe.seed, "critic_adapter" if name.endswith("_critic") else "adapter")


def _sync_folder(recipe: Recipe, run_dir: RunDir) -> Path:
    """Return the run's own folder for disk sync, so that runs do not overwrite each other."""
    root = recipe.trainer.policy.model.lora.lora_sync_path
    if root is None:
        return run_dir.path / "sync"
    # Trials of different sweeps have the same names: the whole path tells them apart.
    digest = hashlib.sha256(str(run_dir.path).encode()).hexdigest()[:8]
    return Path(root) / f"{run_dir.path.name}-{digest}"
