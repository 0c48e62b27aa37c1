"""Load base models and put LoRA adapters on them through PEFT."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from harness.config.schema import LoRA, Recipe
from harness.config.shapes import experts_of, rank_on_experts
from harness.config.validate import check_context, exclude_modules, num_processes, target_modules
from harness.core.errors import UserError
from harness.core.paths import locate
from rltrain.distributed.placement import device_of, dtype_of
from rltrain.models import adapter_files, attention
from rltrain.models.lora import LoRALinear, base_model
from rltrain.models.memory import checkpoints
from rltrain.models.targets import (
    TO_SAFETENSORS,
    Modules,
    adapted_experts,
    check_adapters,
    check_modules,
    modules,
    resolve,
)

# Modules with a matrix that PEFT adapts; a mixture's router is none of them.
ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
# PEFT's pattern of the names of experts' parameters.
EXPERTS = r"experts\.\w+"
# Python code in a model's folder or repository is never run, and transformers does not ask.
NO_CODE = {"trust_remote_code": False}


def model_folder(path: str) -> str:
    """Return a local folder's absolute path; a hub name is returned as it is."""
    folder = locate(path)
    return str(folder) if folder else path


def load_base(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the frozen base model and its tokenizer.

    Raises UserError when they cannot be loaded or there is no chat template.
    """
    path = recipe.trainer.policy.model.path
    full = recipe.trainer.policy.model.lora.rank == 0
    model = load_model(path, recipe, key="trainer.policy.model.path", full=full)
    check_adapters(recipe, modules_of(model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(path), **NO_CODE)
    except Exception as error:  # tokenizers raises nothing narrower
        raise cannot_load("trainer.policy.model.path", path, error) from error
    _check_tokenizer(tokenizer, model, path)
    check_context(recipe, getattr(model.config, "max_position_embeddings", sys.maxsize))
    return model, tokenizer


def _check_tokenizer(tokenizer: Any, model: PreTrainedModel, path: str) -> None:
    """Raise UserError for a tokenizer without a chat template, or with tokens the model lacks."""
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template", got=path, fix="use an instruction-tuned model"
        )
    last, rows = (
        max(tokenizer.get_vocab().values(), default=-1),
        model.get_input_embeddings().weight.shape[0],
    )
    if not tokenizer("one and two")["input_ids"] or last >= rows:
        raise UserError(
            "the tokenizer is not the model's",
            got=f"{path}: {last + 1} tokens, {rows} embeddings",
            fix="put the model's own tokenizer files into its folder",
        )


def load_model(path: str, recipe: Recipe, *, key: str, full: bool) -> PreTrainedModel:
    """Load a causal language model, frozen and in eval mode, on the recipe's device.

    For `full` fine-tuning the weights are float32, whatever dtype the model computes in
    (`precision`): a bfloat16 weight has 8 bits, and most updates of a fine-tuning learning rate are
    smaller than its last bit. Raises UserError naming `key`.
    """
    dtype = torch.float32 if full else dtype_of(recipe)
    try:
        config = AutoConfig.from_pretrained(model_folder(path), **NO_CODE)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if kind is not None and not kind._supports_sdpa:
            raise UserError(
                f"{key} has an attention that the trainer does not compute",
                got=f"{path}: {kind.__name__}",
                allowed="an architecture for which transformers has SDPA",
            )
        model, info = AutoModelForCausalLM.from_pretrained(
            model_folder(path),
            dtype=dtype,
            attn_implementation=attention.NAME,
            output_loading_info=True,
            use_safetensors=True,
            **NO_CODE,
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise cannot_load(key, path, error) from error
    if info["missing_keys"]:
        raise UserError(
            f"{key} lacks weights of its architecture: they would be random",
            got=f"{path}: {len(info['missing_keys'])} missing, "
            f"{sorted(info['missing_keys'])[0]} first",
            fix="check config.json against the weights",
        )
    _switch_off_dropout(model)
    model.computes_in = dtype_of(recipe)
    model.requires_grad_(False).eval()
    if num_processes(recipe) == 1:  # else FSDP moves each rank's shard: no GPU holds it whole
        model.to(device_of(recipe))
    _check_finite(key, path, model)
    if checkpoints(recipe, on_gpu=device_of(recipe).type == "cuda"):
        # Restoring the random state costs time, and only dropout uses it.
        dropout = any(
            role.model.lora.dropout > 0 for role in (recipe.trainer.policy, recipe.trainer.critic)
        )
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": dropout})
        # Without reentrant checkpoints the frozen embedding's output needs no gradient.
        model.disable_input_require_grads()
    return model


def _switch_off_dropout(model: PreTrainedModel) -> None:
    """Set the base's dropout to 0: training would see other log-probabilities than sampling."""
    for owner in (model.config, *model.modules()):
        for name, value in list(vars(owner).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(owner, torch.nn.Dropout))
            if is_rate and isinstance(value, float):
                setattr(owner, name, 0.0)


@torch.no_grad()
def _check_finite(key: str, path: str, model: PreTrainedModel) -> None:
    """Raise UserError for weights that are NaN or infinite: all log-probabilities would be NaN."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(parameter)).sum())
            raise UserError(
                f"{key} holds weights that are NaN or infinite",
                got=f"{path}: {bad} of {parameter.numel()} in {name}",
                fix="use another copy of the model: nothing can be trained from these weights",
            )


def cannot_load(key: str, path: str, error: Exception) -> UserError:
    """Return the error for a model that cannot be loaded; `key` says what named it."""
    first = first_line(error)
    if "no file named" in first and "safetensors" in first:
        return UserError(
            f"{key} holds no weights as safetensors",
            got=f"{path}: {first}",
            allowed="*.safetensors: a pickle can run code when it is read",
            fix=TO_SAFETENSORS,
        )
    return UserError(
        f"cannot load {key}",
        got=f"{path}: {type(error).__name__}: {first}",
        allowed="a local folder or a hub name",
    )


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text."""
    return next(iter(str(error).strip().splitlines()), "")


def lora_config(recipe: Recipe, lora: LoRA) -> LoraConfig:
    """Return PEFT's configuration of an adapter of the recipe's policy or critic."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        rank_pattern={} if lora.expert_rank is None else {EXPERTS: lora.expert_rank},
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(recipe, lora),
        exclude_modules=exclude_modules(recipe, lora),
        init_lora_weights=True if lora.init_method == "kaiming" else "gaussian",
    )
    config._register_custom_module({torch.nn.Linear: LoRALinear})
    return config


def add_adapter(
    model: PreTrainedModel | PeftModel, name: str, config: LoraConfig, seed: int
) -> PeftModel:
    """Put a new adapter on the base; `seed` initialises its A.

    Raises UserError when a target names no module.
    """
    known = modules_of(model)
    check_modules("trainer.target_modules", config.target_modules, known)
    check_modules("trainer.exclude_modules", config.exclude_modules, known)
    experts = adapted_experts(config.target_modules, config.exclude_modules, known)
    config.target_parameters = experts or None
    if experts:
        _, active = experts_of(base_model(model).config.to_dict()) or (1, 1)
        config.rank_pattern = {EXPERTS: rank_on_experts(config.r, active)} | config.rank_pattern
    else:
        config.rank_pattern = {}
    config.target_modules = resolve(config.target_modules, known)
    config.exclude_modules = resolve(config.exclude_modules, known)
    # GPT-2 stores its weights as [in, out].
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 looks for the pattern of experts' ranks among modules alone, and applies it.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys")
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            # PEFT names the base only in the first adapter's configuration.
            config.base_model_name_or_path = model.get_base_model().name_or_path
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
            # PEFT enables them where layers are checkpointed.
            model.get_base_model().disable_input_require_grads()
    return model


def modules_of(model: Any) -> Modules:
    """Return a model's modules, ignoring the adapters on it."""
    named = {
        name.replace(".base_layer", ""): module
        for name, module in base_model(model).named_modules()
    }
    named = {name: module for name, module in named.items() if ".lora_" not in name}
    matrices = {name for name, module in named.items() if isinstance(module, ADAPTABLE)}
    experts = {
        f"{name}.{leaf}"
        for name, module in named.items()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }
    return modules(matrices, named.keys() - matrices, experts)


def active_parameters(model: PreTrainedModel) -> int:
    """Return the parameters that compute one token: of a mixture's experts the active ones."""
    experts, active = experts_of(model.config.to_dict()) or (1, 1)
    parameters = list(model.parameters())
    in_experts = sum(parameter.numel() for parameter in parameters if parameter.ndim == 3)
    return (
        sum(parameter.numel() for parameter in parameters)
        - in_experts
        + (in_experts // experts * active)
    )


def adapter_layers(model: torch.nn.Module, name: str) -> dict[str, LoraLayer]:
    """Return the LoRA layers that have an adapter, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}


def adapter_parameters(model: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """Return an adapter's parameters by full name, in a fixed order."""
    pattern = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
    return {n: p for n, p in model.named_parameters() if pattern.search(n)}


@torch.no_grad()
def load_adapter(model: torch.nn.Module, name: str, folder: Path) -> None:
    """Give an adapter the weights in a PEFT folder; raises UserError where they are others'."""
    stored = load_file(folder / adapter_files.WEIGHTS)
    parameters = {
        full.replace(f".{name}.", "."): p for full, p in adapter_parameters(model, name).items()
    }
    others = parameters.keys() ^ stored.keys()
    others |= {n for n in parameters.keys() & stored if parameters[n].shape != stored[n].shape}
    if others:
        raise UserError(
            f"{adapter_files.KEY} does not fit the base model",
            got=f"{len(others)} tensors are missing, too many or of another shape, such as "
            f"{min(others)}",
            allowed=f"{len(parameters)} tensors of the modules that it targets",
        )
    for stored_name, parameter in parameters.items():
        parameter.copy_(stored[stored_name])


@torch.no_grad()
def adapter_statistics(model: torch.nn.Module, name: str) -> dict[str, float]:
    """Return the norms of A and B and the mean effective rank of BA.

    The effective rank is the exponential of the entropy of the normalised singular values.
    """
    square_a = square_b = 0.0
    ranks = []
    for layer in adapter_layers(model, name).values():
        a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
        square_a += float(a.square().sum())
        square_b += float(b.square().sum())
        # PEFT's layout of all experts' matrices: [E * r, in] and [out, r * E].
        experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
        for each_a, each_b in zip(
            a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).unbind(2), strict=True
        ):
            # BA has the singular values of the small matrix R_B R_A^T.
            small = torch.linalg.qr(each_b).R @ torch.linalg.qr(each_a.T).R.T
            values = torch.linalg.svdvals(small)
            if float(values.sum()) > 0:
                share = values / values.sum()
                ranks.append(float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum())))
    return {
        "lora/norm_A": square_a**0.5,
        "lora/norm_B": square_b**0.5,
        "lora/effective_rank": sum(ranks) / len(ranks) if ranks else 0.0,
    }
