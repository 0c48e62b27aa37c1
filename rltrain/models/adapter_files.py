"""Adapters on disk: what a folder, a checkpoint or a hub name holds, and whether it is sound.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import recipe as recipes
from harness.config.validate import BASE_CHANGING_INITS, exclude_modules, target_modules
from harness.core.errors import UserError
from harness.core.paths import locate
from harness.records.files import SUMS, verify_folder
from harness.records.run_dir import RunDir, adapter_folder
from rltrain.models.targets import (
    Modules,
    adapted,
    read_header,
    resolve,
    stored_modules,
    stored_shapes,
)

KEY = "trainer.policy.model.lora.adapter_path"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ALLOWED = "a PEFT folder, a run's directory, a checkpoint in it, or a hub name owner/name"
# Entries of PEFT's configuration that leave an adapter the plain LoRA that is trained here, or that
# are judged by themselves. Any other one must be unset.
_PLAIN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias"),
    *("target_modules", "exclude_modules", "init_lora_weights", "fan_in_fan_out"),
    *("megatron_core", "megatron_config", "qalora_group_size", "runtime_config", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_WHY = {
    "use_dora": "DoRA has a magnitude per output beside A and B",
    "modules_to_save": "it replaces modules of the base",
    "trainable_token_indices": "it replaces rows of the embedding",
    "rank_pattern": "its modules differ in rank",
    "alpha_pattern": "its modules differ in alpha",
    "lora_bias": "it adds a bias",
}
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PREFIX = re.compile(r"^(model|transformer)\.")
_DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_BF16_EXPONENT = 0x7F80


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter that a recipe names: its weights, and PEFT's configuration of it."""

    path: str
    weights: Path
    config: dict[str, Any]

    @property
    def rank(self) -> int:
        """The rank, of all modules."""
        return int(self.config["r"])

    @property
    def alpha(self) -> float:
        """Alpha, where the update is alpha / rank * B A."""
        return float(self.config["lora_alpha"])

    @property
    def targets(self) -> tuple[Any, Any]:
        """The modules with an adapter, and those left out, as PEFT has them."""
        return self.config["target_modules"], self.config.get("exclude_modules")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file; `start` and `end` count bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def find(path: str) -> StoredAdapter:
    """Return the adapter at a path, or with a hub's name, which is downloaded if need be.

    Raises UserError where there is none, and for one that is no plain LoRA adapter.
    """
    folder = adapter_folder(path) or _download(path)
    if (folder / "state.json").is_file() and (folder / "weights.safetensors").is_file():
        return _of_checkpoint(path, folder)
    if not (folder / CONFIG).is_file():
        raise _no_adapter(path, folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{KEY}: its {CONFIG} is damaged", got=f"{folder}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{KEY}: its {CONFIG} is damaged", got=f"{folder}: it is no object")
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    return StoredAdapter(path, folder / WEIGHTS, _plain(path, config))


def _download(path: str) -> Path:
    """Return the folder of a hub's adapter after its download; raise UserError without."""
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(
            f"{KEY} names no adapter",
            got=path,
            allowed=ALLOWED,
            fix="a run that started from it has a copy, adapter/start in its directory",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"{KEY} is no folder here, and cannot be had from the hub",
            got=f"{path}: {next(iter(str(error).splitlines()), type(error).__name__)}",
            allowed=ALLOWED,
            fix=f"{KEY}=FOLDER names a local copy",
        ) from None


def _of_checkpoint(path: str, folder: Path) -> StoredAdapter:
    """Return the adapter in a run's checkpoint, whose settings are in the run's recipe."""
    run_dir = RunDir(folder.parents[1])
    if not run_dir.recipe.is_file():
        raise UserError(
            f"{KEY} is a checkpoint outside of its run, whose recipe says what it holds",
            got=folder,
            allowed=ALLOWED,
        )
    recipe = recipes.read(run_dir.recipe)
    lora = recipe.trainer.policy.model.lora
    if lora.rank == 0:
        raise UserError(f"{KEY} is a checkpoint of full fine-tuning", got=folder, allowed=ALLOWED)
    targets, excluded = target_modules(recipe, lora), exclude_modules(recipe, lora)
    known = stored_modules(recipe.trainer.policy.model.path)
    if known is not None:
        targets, excluded = resolve(targets, known), resolve(excluded, known)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": recipe.trainer.policy.model.path,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets,
        "exclude_modules": excluded,
    }
    return StoredAdapter(path, folder / "weights.safetensors", config)


def _no_adapter(path: str, folder: Path) -> UserError:
    """Return the error for a folder without an adapter, with what it holds instead."""
    if (folder / "config.json").is_file():
        fix = f"trainer.policy.model.path={folder} trains a new adapter on it"
        return UserError(f"{KEY} holds a whole model, not an adapter", got=folder, fix=fix)
    run_dir = RunDir(locate(path) or path)
    if not run_dir.manifest.exists():
        return UserError(f"{KEY} holds no {CONFIG}", got=folder, allowed=ALLOWED)
    others = [run_dir.adapter / "best", *sorted(run_dir.checkpoints.glob("step_*"), reverse=True)]
    there = [other for other in others if other.is_dir()]
    return UserError(
        f"{KEY} is a run without a final adapter",
        got=path,
        fix=f"name another of its adapters: {there[0]}" if there else "let the run end first",
    )


def _no_weights(folder: Path) -> UserError:
    if not (folder / PICKLE).exists():
        return UserError(f"{KEY} holds no {WEIGHTS}", got=folder)
    return UserError(
        f"{KEY} holds its weights as a pickle, which can run code when it is read",
        got=folder / PICKLE,
        allowed=WEIGHTS,
        fix='for weights you trust: python -c "from peft import AutoPeftModelForCausalLM as M; '
        "M.from_pretrained('FOLDER').save_pretrained('FOLDER')\"",
    )


def _plain(path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration of a plain LoRA adapter, its scale as alpha / rank.

    Raises UserError for another kind of adapter.
    """
    name = f"{KEY} is no plain LoRA adapter"
    if config.get("peft_type") != "LORA":
        raise UserError(name, got=f"{path}: peft_type={config.get('peft_type')}", allowed="LORA")
    others = {key: value for key, value in config.items() if key not in _PLAIN and value}
    if config.get("bias", "none") != "none":
        others["bias"] = config["bias"]
    for key, value in others.items():
        why = _WHY.get(key, "only A and B of each module are trained here")
        raise UserError(f"{name}: {why}", got=f"{path}: {key}={value}", allowed=f"no {key}")
    init = str(config.get("init_lora_weights"))
    if init.startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"{name}: its init changed the base weights, which this run would not have",
            got=f"{path}: init_lora_weights={init}",
            fix="convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)",
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    targets = config.get("target_modules")
    numbers = type(rank) is int and isinstance(alpha, int | float)
    if not numbers or min(rank, alpha) <= 0 or not isinstance(targets, str | list) or not targets:
        got = f"{path}: r={rank}, lora_alpha={alpha}, target_modules={targets}"
        raise UserError(f"{KEY}: its {CONFIG} is damaged", got=got)
    if config.get("use_rslora"):
        # alpha / sqrt(rank) must be the same number as a / rank for some a.
        if math.isqrt(rank) ** 2 != rank:
            raise UserError(
                f"{name}: rsLoRA scales by alpha / sqrt(rank), which alpha / rank equals exactly "
                "only for a square rank",
                got=f"{path}: use_rslora=true, r={rank}",
                allowed="use_rslora=false, or a rank of 1, 4, 16, 64, 256",
            )
        alpha *= math.isqrt(rank)
    return {**config, "lora_alpha": alpha, "use_rslora": False}


def check(start: StoredAdapter, model: str) -> None:
    """Raise UserError for an adapter that is damaged, or does not fit the base model.

    A base without files here is compared when it is loaded.
    """
    if (start.weights.parent / SUMS).exists():
        verify_folder(start.weights.parent)
    tensors = _stored_tensors(start.weights)
    sizes = _sizes(start, tensors)
    known = stored_modules(model)
    if known is not None:
        _check_fits(start, sizes, stored_shapes(model), model)
        _check_complete(start, sizes, known)
    _check_finite(start, tensors)


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return what a safetensors file holds, by name; raises UserError for a damaged file."""
    try:
        begin, entries = read_header(file)
        tensors = {
            name: StoredTensor(
                value["dtype"],
                tuple(value["shape"]),
                *(begin + offset for offset in value["data_offsets"]),
            )
            for name, value in entries.items()
        }
        missing = max((tensor.end for tensor in tensors.values()), default=0) - file.stat().st_size
        problem = f"{missing} bytes are missing" if missing > 0 else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise UserError(f"{KEY}: its weights are damaged", got=f"{file}: {problem}")
    return tensors


def _sizes(start: StoredAdapter, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of each adapted module, by the module's name.

    Raises UserError for tensors that are not the A and B of the configuration's rank.
    """
    rank, parts = start.rank, {"A": dict[str, int](), "B": dict[str, int]()}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UserError(
                f"{KEY} holds more than A and B of linear layers: such as an embedding or a bias",
                got=f"{start.weights}: {name}",
                allowed="base_model.model.MODULE.lora_A.weight and .lora_B.weight",
            )
        module, part = match.groups()
        wide = [n for n in tensor.shape if n != rank] or [rank]
        expected = (rank, wide[0]) if part == "A" else (wide[0], rank)
        if tensor.shape != expected or tensor.dtype not in _DTYPES:
            raise UserError(
                f"{KEY} holds a tensor of another shape or type than its {CONFIG} says",
                got=f"{start.weights}: {name} is {tensor.dtype} {list(tensor.shape)}, r={rank}",
                allowed=f"{', '.join(_DTYPES)}; A [r, inputs], B [outputs, r]",
            )
        parts[part][module] = wide[0]
    halves = sorted(parts["A"].keys() ^ parts["B"].keys())
    if halves or not tensors:
        got = f"{len(halves)} modules with A or B alone, such as {halves[0]}" if halves else "none"
        raise UserError(f"{KEY} lacks tensors", got=f"{start.weights}: {got}")
    return {module: (parts["A"][module], parts["B"][module]) for module in parts["A"]}


def _check_fits(
    start: StoredAdapter,
    sizes: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, tuple[int, ...]],
    model: str,
) -> None:
    """Raise UserError where the base lacks an adapted module, or has one of other sizes."""
    of_base = {
        _PREFIX.sub("", name.removesuffix(".weight")): shape for name, shape in shapes.items()
    }
    for module, (inputs, outputs) in sizes.items():
        shape = of_base.get(_PREFIX.sub("", module))
        if module == "lm_head" and shape is None:
            continue  # a tied head is not in the file
        # A convolution of GPT-2 is stored as [inputs, outputs].
        if shape is None or sorted(shape) != sorted((inputs, outputs)):
            there = "no such module" if shape is None else f"weights {list(shape)}"
            raise UserError(
                f"{KEY} was trained on another base model",
                got=f"{start.path}: {module} has {inputs} inputs and {outputs} outputs; {model} "
                f"has {there}",
                allowed="an adapter of this base",
                fix=f"its {CONFIG} names {start.config.get('base_model_name_or_path')} as its base",
            )


def _check_complete(
    start: StoredAdapter, sizes: Mapping[str, tuple[int, int]], known: Modules
) -> None:
    """Raise UserError where the tensors are not those of the modules that the adapter targets."""
    targeted = {_PREFIX.sub("", module) for module in adapted(known, *start.targets)}
    stored = {_PREFIX.sub("", module) for module in sizes}
    for modules, problem in (
        (targeted - stored, "lacks tensors of modules that it targets"),
        (stored - targeted, "holds tensors of modules that it does not target"),
    ):
        if modules:
            raise UserError(
                f"{KEY} {problem}",
                got=f"{start.weights}: {len(modules)} modules, such as {min(modules)}",
                allowed=f"target_modules={start.targets[0]}",
            )


def _check_finite(start: StoredAdapter, tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        values = np.fromfile(start.weights, _DTYPES[tensor.dtype], count, offset=tensor.start)
        if tensor.dtype == "BF16":
            bad = int(((values & _BF16_EXPONENT) == _BF16_EXPONENT).sum())
        else:
            bad = int((~np.isfinite(values)).sum())
        if bad:
            raise UserError(
                f"{KEY} holds weights that are NaN or infinite",
                got=f"{start.weights}: {bad} of {count} in {name}",
            )
