"""Pack: one frozen base and one rollout engine, and the members that train adapters on them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import psutil  # type: ignore[import-untyped]
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.config.schema import AdvantageEstimator, LoRA, Recipe, SyncMode
from harness.config.validate import engine_lora_rank, sync_mode
from harness.core.errors import UserError
from harness.records.run_dir import RunDir
from rltrain.algorithms.critic import Critic
from rltrain.algorithms.policy import Policy
from rltrain.data.seeding import stream_seed
from rltrain.distributed import placement as parallel
from rltrain.distributed.device_memory import release
from rltrain.distributed.process import exits_are_failures
from rltrain.distributed.process_group import Ranks
from rltrain.engines.base import Engine, EngineOptions, Sample, stop_token_ids
from rltrain.engines.distributed import place_engine
from rltrain.envs.problems import Problem, load_problems
from rltrain.member import Member, sync_tolerance, total_steps
from rltrain.models import loading as models
from rltrain.models import memory
from rltrain.models.flops import measured_peak
from rltrain.models.logprobs import AdapterOff, FrozenModel, Reference, computing_dtype
from rltrain.sync.base import build_sync
from rltrain.timer import Timer

P = ParamSpec("P")
T = TypeVar("T")


class Pack:
    """Members on one frozen base model and one rollout engine. A single run is a pack of one.

    With several `ranks` every one of them holds the pack, its base sharded; they make the same
    calls in the same order.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        room: int,
        ranks: Ranks,
    ) -> None:
        self.model: PreTrainedModel | PeftModel = base
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.device = parallel.device_of(recipe)
        self.members: list[Member] = []
        self.timer = Timer()
        self._names = (f"member{i}" for i in itertools.count())
        self.contains_failures = False
        """Whether a member that fails leaves the others' step going on."""
        self.failures: dict[Member, Exception] = {}
        self.base_samples: dict[str, list[list[Sample]]] = {}
        """What untrained members answered, by what they were asked."""
        self.tried_tokens = 0
        """Tokens of the largest pass that was made to see whether it fits."""
        self._problems: dict[tuple[str | int, ...], tuple[list[Problem], int]] = {}
        self.stop_token_ids = stop_token_ids(base, tokenizer)
        self.num_parameters = base.num_parameters()
        self.vocabulary = base.get_input_embeddings().weight.shape[0]
        self.peak_flops = measured_peak(self.device, parallel.dtype_of(recipe)) * ranks.size
        # First, for the engine takes what memory is left; a base that is sharded must not be whole
        # on each GPU then.
        ranks.shard(base, computing_dtype(base))
        merged = sync_mode(recipe.trainer.policy.model.lora) is SyncMode.merge
        options = EngineOptions(
            model_path=models.model_folder(recipe.trainer.policy.model.path),
            dtype=parallel.dtype_of(recipe),
            stop_token_ids=self.stop_token_ids,
            max_lora_rank=0 if merged else engine_lora_rank(recipe),
            max_loras=room,
        )
        self.engine: Engine = place_engine(recipe, base, options, ranks)
        self._room = room

    @classmethod
    def open(cls, recipe: Recipe, *, room: int = 1, ranks: Ranks | None = None) -> Pack:
        """Load the base model and start the engine that a recipe asks for, with room for so many
        members at a time.
        """
        parallel.prepare_process(recipe)
        return cls(recipe, *models.load_base(recipe), room, ranks or Ranks())

    def join(self, recipe: Recipe, run_dir: RunDir) -> Member:
        """A new member with a fresh adapter (rank 0: the base's own weights become trainable) and
        critic, if any.
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
        policy = self._policy(name, recipe, steps)
        gae = recipe.trainer.algorithm.advantage_estimator is AdvantageEstimator["gae"]
        root = _sync_root(recipe, run_dir)
        member = Member(
            name=name,
            recipe=recipe,
            run_dir=run_dir,
            problems=problems,
            held_out=held_out,
            num_dropped=dropped,
            policy=policy,
            critic=self._critic(f"{name}_critic", recipe, steps) if gae else None,
            sync=build_sync(sync_mode(recipe.trainer.policy.model.lora), root, self.ranks.once),
            max_tokens=self._max_tokens(recipe, run_dir),
        )
        self.members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """Take a member out: its adapters, optimizers and synced files go; its run
        directory stays.
        """
        self.members.remove(member)
        self.engine.drop_adapter(member.name)
        if isinstance(self.model, PeftModel):
            # A PeftModel without adapters cannot compute: with the last one the plain base comes
            # back.
            if self.members:
                self.members[0].policy.activate()
                for learner in (member.policy, member.critic):
                    if learner is not None and learner.model is self.model:
                        self.model.delete_adapter(learner.adapter)
            else:
                self.model = self.model.unload()
                self.engine.use_model(self.model)
        if self.ranks.first:
            shutil.rmtree(_sync_root(member.recipe, member.run_dir), ignore_errors=True)

    @contextlib.contextmanager
    def engine_asleep(self) -> Iterator[None]:
        """The engine gives its device memory back while the trainer works (nothing to give on a
        CPU).
        """
        self.engine.sleep()
        yield
        self.engine.wake()

    def served_as(self, member: Member) -> str | None:
        """The name the engine knows a member's adapter by; None where its weights are the engine's
        own.
        """
        lora = member.recipe.trainer.policy.model.lora
        merged = sync_mode(lora) is SyncMode.merge and not self.engine.shares_weights
        return None if merged or lora.rank == 0 else member.name

    def attempt(
        self, member: Member, work: Callable[Concatenate[Pack, P], T], *args: P.args, **kw: P.kwargs
    ) -> T | None:
        """`work(pack, ...)` for a member; None where that fails or has failed in this step, noted
        in `failures`.

        Where `contains_failures` is not set the error is raised.
        """
        if member in self.failures:
            return None
        try:
            with exits_are_failures():
                return work(self, *args, **kw)
        except torch.AcceleratorError:
            raise  # the GPU is of no more use to this process
        except Exception as error:
            if not self.contains_failures:
                raise
            release(error)
            for learner in member.learners:
                learner.optimizer.zero_grad()
            self.failures[member] = error
            self.model.eval()  # the others' passes are not to be in the mode that this one left
            return None

    def publish(self, members: Sequence[Member]) -> None:
        """These members' adapters to the engine, version + 1."""
        for member in members:
            self.attempt(member, Pack.publish_member, member)

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

    def _load_problems(self, recipe: Recipe, paths: Sequence[str]) -> tuple[list[Problem], int]:
        """`load_problems`, read and tokenised once for all members that ask for the same."""
        columns = (recipe.data.question_column or "", recipe.data.answer_column or "")
        limit = recipe.generator.max_input_length
        key: tuple[str | int, ...] = (*paths, *columns, recipe.environment.env_class, limit)
        if key not in self._problems:
            self._problems[key] = load_problems(recipe, paths, self.tokenizer)
        return self._problems[key]

    def _max_tokens(self, recipe: Recipe, run_dir: RunDir) -> int | None:
        """Tokens of a pass, at most: what the recipe says, or what fits; less where a pass of the
        run did not.
        """
        wanted = recipe.trainer.max_tokens_per_microbatch
        if wanted == "auto":
            shape, gpu = (
                memory.shape_of(recipe.trainer.policy.model.path),
                self.device.type == "cuda",
            )
            if (
                shape is None
            ):  # a model of a kind not reckoned with: where this is too many, a pass shows it
                wanted = memory.ROOM_TOKENS if gpu else memory.MOST_TOKENS_CPU
            else:
                fits = memory.tokens_that_fit(
                    recipe, shape, self._free_bytes, on_gpu=gpu, members=self._room
                )
                wanted = min(self.ranks.all_objects(fits))
        failed = (
            run_dir.read_manifest().get("out_of_memory", []) if run_dir.manifest.exists() else []
        )
        return failed[-1]["tokens"] if failed else wanted

    @functools.cached_property
    def _free_bytes(self) -> int:
        """Memory that the trainer may take beside the base model, while the engine sleeps."""
        with self.engine_asleep():
            if self.device.type != "cuda":
                return int(psutil.virtual_memory().available) // self.ranks.size
            free, _ = torch.cuda.mem_get_info(self.device)
            return (
                free
                + torch.cuda.memory_reserved(self.device)
                - torch.cuda.memory_allocated(self.device)
            )

    def _policy(self, name: str, recipe: Recipe, steps: int) -> Policy:
        algorithm, lora = recipe.trainer.algorithm, recipe.trainer.policy.model.lora
        wants_reference = algorithm.use_kl_loss or algorithm.use_kl_in_reward
        reference: Reference | None = None
        if lora.rank > 0:
            self._add_adapter(name, recipe, lora)
            parameters = models.adapter_parameters(self.model, name)
            reference = AdapterOff(self.model) if wants_reference else None
        else:
            # Full fine-tuning changes the base under everyone's feet: it is alone, and the pack
            # ends with it.
            if wants_reference:
                path = recipe.trainer.policy.model.path
                reference = FrozenModel(
                    self._another_base(path, recipe, key="trainer.policy.model.path")
                )
            parameters = dict(self.model.requires_grad_(True).named_parameters())
        return Policy(
            name, self.model, parameters, recipe, reference, steps, sync_tolerance(recipe)
        )

    def _critic(self, name: str, recipe: Recipe, steps: int) -> Critic:
        """The critic's adapter on the policy's base where it has the same path and stays as it is,
        else on its own.
        """
        critic, policy = recipe.trainer.critic.model, recipe.trainer.policy.model
        path = critic.path or policy.path
        same = models.model_folder(path) == models.model_folder(policy.path)
        if same and critic.lora.rank > 0 and policy.lora.rank > 0:
            self._add_adapter(name, recipe, critic.lora)
            return Critic(
                name, self.model, models.adapter_parameters(self.model, name), recipe, steps
            )
        full = critic.lora.rank == 0
        base: Any = self._another_base(path, recipe, key="trainer.critic.model.path", full=full)
        if not full:
            base = models.add_adapter(
                base, name, models.lora_config(recipe, critic.lora), _adapter_seed(recipe, name)
            )
            return Critic(name, base, models.adapter_parameters(base, name), recipe, steps)
        parameters = {
            n: p.requires_grad_(True)
            for n, p in base.named_parameters()
            if not n.startswith("lm_head.")
        }
        return Critic(name, base, parameters, recipe, steps)

    def _another_base(
        self, path: str, recipe: Recipe, *, key: str, full: bool = False
    ) -> PreTrainedModel:
        base = models.load_model(path, recipe, key=key, full=full)
        self.ranks.shard(base, computing_dtype(base))
        return base

    def _add_adapter(self, name: str, recipe: Recipe, lora: LoRA) -> None:
        config = models.lora_config(recipe, lora)
        self.model = models.add_adapter(self.model, name, config, _adapter_seed(recipe, name))
        self.engine.use_model(self.model)


def _adapter_seed(recipe: Recipe, name: str) -> int:
    """A's stream depends on the run's seed and on whose adapter it is, not on the member's name."""
    return stream_seed(recipe.seed, "critic_adapter" if name.endswith("_critic") else "adapter")


def _sync_root(recipe: Recipe, run_dir: RunDir) -> Path:
    """Where disk sync keeps a run's adapters: its own folder, so that runs cannot overwrite each
    other.
    """
    wanted = recipe.trainer.policy.model.lora.lora_sync_path
    if wanted is None:
        return run_dir.path / "sync"
    # Trials of different sweeps have the same names: the whole path tells them apart.
    own = hashlib.sha256(str(run_dir.path).encode()).hexdigest()[:8]
    return Path(wanted) / f"{run_dir.path.name}-{own}"
