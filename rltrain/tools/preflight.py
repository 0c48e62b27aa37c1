"""Checks of a run before anything heavy starts. Imports neither torch nor vllm nor ray."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from harness.config.schema import AdvantageEstimator, Backend, DType, Recipe, SyncMode
from harness.config.shapes import experts_of, read_config
from harness.config.validate import check_context, exclude_modules, sync_mode, target_modules
from harness.core import machine
from harness.core.cli import invocation
from harness.core.errors import UserError
from harness.core.paths import locate, shown
from rltrain.data.files import load_examples
from rltrain.distributed.placement import address_of, check_placement, uses_gpus
from rltrain.engines.arguments import check_engine_args
from rltrain.envs import Env, get_env
from rltrain.envs.problems import check_truth, messages, reward_of
from rltrain.models import adapter_start
from rltrain.models.targets import TO_SAFETENSORS, WITH_EXPERTS, check_adapters

HUB_SECONDS = 5.0
# Architectures that vLLM 0.32 serves without adapters.
WITHOUT_ADAPTERS = {
    "BloomForCausalLM",
    "FalconForCausalLM",
    "FalconMambaForCausalLM",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "Gemma3nForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "StableLmForCausalLM",
    "Zamba2ForCausalLM",
}


def check_run(recipe: Recipe) -> None:
    """Raise UserError for data, environment, model or placement that would fail the run later.

    It asks each environment for one prompt and one reward. It prints which columns of a data file
    are used where the recipe does not name them.
    """
    check_placement(recipe)
    _check_engine(recipe)
    _check_model(recipe, "trainer.policy.model.path", recipe.trainer.policy.model.path)
    _check_sync(recipe)
    if recipe.trainer.algorithm.advantage_estimator is AdvantageEstimator["gae"]:
        _check_critic(recipe)
    adapter_start.check(recipe)
    check_adapters(recipe)
    _check_sync_path(recipe)
    _check_resumption(recipe)
    get_env(recipe.environment.env_class)
    sizes: dict[str, int] = {}
    tried: dict[str, Env] = {}
    for key in ("train_data", "val_data"):
        paths = getattr(recipe.data, key)
        if not paths:
            raise UserError(
                f"data.{key} must name at least one file", fix=f"data.{key}=[FILE.parquet]"
            )
        examples = load_examples(paths, recipe.data, say=print)
        for example in examples:
            name = example.env_class or recipe.environment.env_class
            if name not in tried:
                tried[name] = get_env(name)
                messages(tried[name], example)
                reward_of(tried[name], example, example.ground_truth)
            check_truth(tried[name], example)
        sizes[key] = len(examples)
    check_batch(sizes["train_data"], recipe.trainer.train_batch_size)
    if address_of(recipe) is None:
        _check_hub(recipe)


def check_batch(problems: int, batch: int) -> None:
    """Raise UserError for training data that do not fill a batch."""
    if problems < batch:
        raise UserError(
            "data.train_data holds fewer problems than one batch",
            got=f"{problems} problems, trainer.train_batch_size={batch}",
            fix=f"trainer.train_batch_size={problems} or less",
        )


def _check_hub(recipe: Recipe) -> None:
    """Raise UserError for a hub's models when the hub cannot be reached.

    Its library would retry for a minute for each file. A cluster's machines have their own network
    and cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    roles = {"policy": recipe.trainer.policy.model.path}
    if recipe.trainer.algorithm.advantage_estimator is AdvantageEstimator["gae"]:
        roles["critic"] = recipe.trainer.critic.model.path or roles["policy"]
    for role, name in roles.items():
        if locate(name) is not None:
            continue
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else _unreachable(constants.ENDPOINT)
        )
        if why is not None and not (cached and constants.HF_HUB_OFFLINE):
            local = f"trainer.{role}.model.path=FOLDER names a local copy"
            raise UserError(
                f"trainer.{role}.model.path is a hub's, and the hub cannot be reached",
                got=f"{name}: {why}",
                allowed="a local folder with config.json, or a model in the hub's cache",
                fix=f"HF_HUB_OFFLINE=1 takes the copy in the cache, or {local}"
                if cached
                else local,
            )


def _unreachable(endpoint: str) -> str | None:
    """Return why a server does not answer; None where it answers anything."""
    try:
        urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS
        ).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{endpoint}: {getattr(error, 'reason', error)}"
    return None


def _check_engine(recipe: Recipe) -> None:
    """Raise UserError where vLLM could not start, or could not serve the adapters on a GPU.

    A cluster's machines have their own packages.
    """
    if recipe.generator.backend is not Backend.vllm:
        return
    check_engine_args(recipe)
    on_gpu, model = uses_gpus(recipe), recipe.trainer.policy.model
    if on_gpu and model.dtype is DType.float32 and sync_mode(model.lora) is not SyncMode.merge:
        raise UserError(
            "vLLM serves adapters on a GPU only in bfloat16",
            got="trainer.policy.model.dtype=float32",
            fix="trainer.policy.model.dtype=auto, trainer.policy.model.lora.sync=merge, or "
            "generator.backend=transformers",
        )
    if address_of(recipe) is not None:
        return
    if not machine.has_vllm():
        raise UserError(
            "vLLM is not installed",
            got="generator.backend=vllm",
            allowed="generator.backend=transformers, for a run of one process with "
            "trainer.placement.colocate_all=true",
            fix="make install, or make install-gpu"
            if machine.vllm_has_builds()
            else "use Linux: vLLM has no build for this system",
        )
    if machine.vllm_build() == "cuda" and not on_gpu:
        raise UserError(
            "this vLLM is built for CUDA: it cannot sample on a CPU",
            got="generator.backend=vllm, "
            f"trainer.placement.device={recipe.trainer.placement.device.name}",
            fix="generator.backend=transformers, or the CPU environment (make install)",
        )


def _check_model(recipe: Recipe, key: str, path: str) -> None:
    """Raise UserError unless a path is a text model's folder or looks like a hub's `owner/name`."""
    towers = [name for name in read_config(path) if name in ("vision_config", "audio_config")]
    if towers:
        raise UserError(
            f"{key} is a model of images or sound as well as text",
            got=f"{path}: its config.json has {towers[0]}",
            fix="use a model of text alone",
        )
    folder = locate(path)
    if folder is None:
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(
                f"{key} names no folder",
                got=path,
                allowed="a local folder with config.json, or a hub name owner/name",
                fix=f"{invocation('prepare')} model SOURCE --output FOLDER makes such a folder",
            )
        return
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        gguf = folder if folder.is_file() else next(folder.glob("*.gguf"), None)
        raise UserError(
            f"{key} holds no config.json",
            got=folder,
            fix=f"{invocation('prepare')} model {shown(gguf)} --output FOLDER" if gguf else None,
        ) from None
    except ValueError as error:
        raise UserError("the model's config.json is damaged", got=f"{folder}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(
            "the model's config.json is damaged",
            got=f"{folder}: no mapping, but {type(config).__name__}",
        )
    # GPT-2 calls it n_positions.
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(limit, int):
        check_context(recipe, limit)
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise UserError(
            f"{key} holds its weights as a pickle, which can run code when it is read: it "
            "is not loaded",
            got=next(folder.glob("*.bin")),
            allowed="*.safetensors",
            fix=TO_SAFETENSORS,
        )


def _check_sync_path(recipe: Recipe) -> None:
    path = recipe.trainer.policy.model.lora.lora_sync_path
    if path is None:
        return
    folder = Path(path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            "trainer.policy.model.lora.lora_sync_path cannot be written",
            got=path,
            fix="name another folder, or null for the run's own",
        )


def _check_resumption(recipe: Recipe) -> None:
    mode = recipe.trainer.resume_mode
    if mode not in (None, "none", "latest") and not os.path.isdir(mode):
        raise UserError(
            "trainer.resume_mode names no whole checkpoint",
            got=mode,
            allowed="latest, none, or a folder checkpoints/step_NNNNNN",
        )


def _check_critic(recipe: Recipe) -> None:
    critic = recipe.trainer.critic.model
    if critic.path is not None:
        _check_model(recipe, "trainer.critic.model.path", critic.path)
    targets = target_modules(recipe, critic.lora)
    if isinstance(targets, list) and "lm_head" in targets:
        raise UserError(
            "a critic has a value head in place of lm_head: an adapter there would never train",
            got=f"target_modules={targets}",
            fix="trainer.critic.model.lora.target_modules=all-linear",
        )


def _check_sync(recipe: Recipe) -> None:
    """Raise UserError for adapters that vLLM does not serve: on some models, embedding or head."""
    lora = recipe.trainer.policy.model.lora
    targets = target_modules(recipe, lora)
    if recipe.generator.backend is not Backend.vllm or sync_mode(lora) is SyncMode.merge:
        return
    path = recipe.trainer.policy.model.path
    architectures = WITHOUT_ADAPTERS.intersection(read_config(path).get("architectures") or ())
    if architectures:
        raise UserError(
            "vLLM serves no adapters on this architecture",
            got=f"{path}: {architectures.pop()}, sync={sync_mode(lora).name}",
            fix="trainer.policy.model.lora.sync=merge, or generator.backend=transformers",
        )
    mixture = experts_of(read_config(path)) is not None
    with_experts = targets in WITH_EXPERTS and exclude_modules(recipe, lora) not in WITH_EXPERTS
    if mixture and (with_experts or not uses_gpus(recipe)):
        raise UserError(
            "vLLM serves no adapters on the experts of a mixture as PEFT stores them, and none at "
            "all on a mixture on a CPU",
            got=f"trainer.target_modules={targets}, sync={sync_mode(lora).name}",
            fix="trainer.policy.model.lora.sync=merge, or generator.backend=transformers",
        )
    refused = sorted({"lm_head", "embed_tokens"} & set(targets if type(targets) is list else ()))
    if refused:
        raise UserError(
            "vLLM serves no adapter on these modules",
            got=f"trainer.target_modules={targets}",
            fix="trainer.policy.model.lora.sync=merge, or leave out " + ", ".join(refused),
        )
