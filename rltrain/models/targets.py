"""Check an adapter's target modules by the names in the model's files. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import LoRA, Recipe
from harness.config.validate import exclude_modules, num_processes, target_modules
from harness.core.errors import UserError, nearest
from harness.core.paths import locate_folder

# The named sets, by what a layer calls the modules that hold its projections: `self_attn` and `mlp`
# in Llama's family, `attn` and `mlp` in GPT-2, `attention` and `mlp` in GPT-NeoX.
MODULE_SETS = {
    "attention": ("attn.", "attention."),
    "mlp": ("mlp.", "feed_forward.", "moe."),
    "experts": (),
}
# The sets that have the experts of a mixture, which are parameters of a module, not modules.
WITH_EXPERTS = ("all-linear", "mlp", "experts")
# How to convert a model's pickled weights.
TO_SAFETENSORS = (
    'for weights you trust: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').save_pretrained('FOLDER')\", and remove the .bin files"
)
# Matrices that `all-linear` leaves out: embeddings and the head.
UNTARGETED = {"embed_tokens", "wte", "wpe", "lm_head"}
LARGEST_HEADER = 100 * 2**20  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class Modules:
    """A model's modules by full name: those with a weight matrix, and all others.

    `experts` are parameters that hold the matrices of several experts; in files, each expert's.
    """

    matrices: frozenset[str]
    others: frozenset[str]
    experts: frozenset[str] = frozenset()


def stored_modules(path: str) -> Modules | None:
    """Return a local model's modules from its safetensors headers; None where there are none."""
    shapes = stored_shapes(path)
    if not shapes:
        return None
    experts = {name for name in shapes if ".experts." in name}
    matrices = {
        name.removesuffix(".weight")
        for name in shapes.keys() - experts
        if len(shapes[name]) > 1 and name.endswith(".weight")
    }
    matrices.add("lm_head")  # not in the file where it is tied to the embedding
    others = {name.rpartition(".")[0] for name in shapes.keys() - experts} - matrices
    return modules(matrices, others, experts)


def stored_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a local model's tensors by name, from its safetensors headers."""
    folder = locate_folder(path, "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("model*.safetensors")) if folder is not None else ():
        # Loading reports a damaged file.
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            _, tensors = read_header(file)
            shapes |= {name: tuple(value["shape"]) for name, value in tensors.items()}
    return shapes


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a safetensors file begin, and its tensors' entries by name.

    A damaged file raises OSError, ValueError, AttributeError, TypeError or RecursionError.
    """
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header: Any = json.loads(content.read(size)) if size <= LARGEST_HEADER else None
    return 8 + size, {name: value for name, value in header.items() if name != "__metadata__"}


def modules(
    matrices: Collection[str], others: Collection[str], experts: Collection[str] = ()
) -> Modules:
    """Return the modules with a matrix, and the others with all parents of either."""
    parents = {
        name[: dot.start()] for name in (*matrices, *others) for dot in re.finditer(r"\.", name)
    }
    return Modules(
        frozenset(matrices), frozenset({*others, *parents} - {*matrices, ""}), frozenset(experts)
    )


def resolve(targets: Any, known: Modules) -> Any:
    """Return a named set's modules as names for PEFT; other targets are returned as they are.

    A name is the last part of a module's name, with its parent's where a module outside of the set
    has the same last part (GPT-2 has a `c_proj` in attention and one in the MLP). A mixture's MLP
    is its experts, which `adapted_experts` returns: PEFT would adapt the router with them.
    """
    if known.experts and targets in WITH_EXPERTS:
        return resolve("attention", known) if targets == "all-linear" else []
    if not isinstance(targets, str) or targets not in MODULE_SETS:
        return targets
    inside = {name for name in known.matrices if any(p in name for p in MODULE_SETS[targets])}
    outside = {name.rpartition(".")[2] for name in known.matrices - inside}
    parts = [name.split(".") for name in inside]
    return sorted({".".join(part[-2:] if part[-1] in outside else part[-1:]) for part in parts})


def adapted_experts(targets: Any, excluded: Any, known: Modules) -> list[str]:
    """Return the last parts of the names of the expert parameters that get an adapter."""
    if targets not in WITH_EXPERTS or excluded in WITH_EXPERTS:
        return []
    return sorted({".".join(name.split(".")[-2:]) for name in known.experts})


def check_adapters(recipe: Recipe, known: Modules | None = None) -> None:
    """Raise UserError for targets or exclusions that name no module of their model.

    `known` are the policy's modules, by default those of its files. A critic's own model is known
    by its files alone.
    """
    trainer = recipe.trainer
    policy = known or stored_modules(trainer.policy.model.path)
    roles = {"policy": policy}
    if trainer.algorithm.advantage_estimator.name == "gae":
        same = trainer.critic.model.path in (None, trainer.policy.model.path)
        roles["critic"] = policy if same else stored_modules(str(trainer.critic.model.path))
    for role, model in roles.items():
        lora = getattr(trainer, role).model.lora
        if model is None or lora.rank == 0:
            continue
        for name, value in (
            ("target", target_modules(recipe, lora)),
            ("exclude", exclude_modules(recipe, lora)),
        ):
            common = getattr(lora, f"{name}_modules") is None
            key = (
                f"trainer.{name}_modules" if common else f"trainer.{role}.model.lora.{name}_modules"
            )
            check_modules(key, value, model)
        targets, excluded = target_modules(recipe, lora), exclude_modules(recipe, lora)
        if adapted_experts(targets, excluded, model):
            _check_experts(recipe, role, lora, targets, model)


def _check_experts(recipe: Recipe, role: str, lora: LoRA, targets: str, known: Modules) -> None:
    """Raise UserError for settings, and for models, with which PEFT does not adapt all experts."""
    fix = "trainer.target_modules=attention"
    dense = sorted(name for name in known.matrices if name.endswith("mlp.down_proj"))
    shared = sorted(name for name in known.matrices if "shared_expert" in name)
    if targets != "experts" and (dense or shared):
        raise UserError(
            "PEFT cannot adapt a mixture's other MLPs beside its experts",
            got=f"trainer.target_modules={targets}, {[*dense, *shared][0]}",
            allowed="experts, attention, or a list of names",
        )
    if lora.dropout > 0:
        raise UserError(
            "adapters on the experts of a mixture have no dropout",
            got=f"trainer.{role}.model.lora.dropout={lora.dropout:g}",
            fix=f"trainer.{role}.model.lora.dropout=0, or {fix}",
        )
    if num_processes(recipe) > 1:
        raise UserError(
            "adapters on the experts of a mixture are trained by one process",
            got=f"{num_processes(recipe)} processes",
            fix=f"trainer.placement.policy_num_gpus_per_node=1, or {fix}",
        )


def check_modules(key: str, value: Any, known: Modules) -> None:
    """Raise UserError for `target_modules` or `exclude_modules` that match no module of the model.

    Matching is PEFT's: a text is a regex of a module's whole name, a list's element its end.
    """
    if value is None or value == "all-linear" or (value in ("mlp", "experts") and known.experts):
        return
    names = resolve(value, known) or [value]
    parts = [names] if isinstance(names, str) else list(names)
    misses = [
        part for part in parts if not any(_matches(names, part, name) for name in known.matrices)
    ]
    exclude = key.endswith("exclude_modules")
    leaves = sorted(
        {name.rsplit(".", 1)[-1] for name in known.matrices} - {"embed_tokens", "wte", "wpe"}
    )
    if misses:
        near = {miss: nearest(miss, (*leaves, *MODULE_SETS, "all-linear")) for miss in misses}
        guesses = [f"{guess} for {miss}" for miss, guess in near.items() if guess and guess != miss]
        guesses += [
            f"{miss} alone, not in a list"
            for miss in misses
            if isinstance(value, list) and miss in (*MODULE_SETS, "all-linear")
        ]
        if isinstance(value, str) and value in leaves:
            guesses = [f"[{value}], a list; a text is a regex of the whole name"]
        raise UserError(
            f"{key} names no module of the model",
            got=", ".join(misses),
            allowed=f"{'' if exclude else 'all-linear, '}a regex of whole names, or a list "
            "of these: "
            f"{', '.join(leaves)}",
            fix=f"did you mean {', '.join(guesses)}?" if guesses else None,
        )
    wrong = sorted(
        name for name in known.others if any(_matches(names, part, name) for part in parts)
    )
    if wrong and not exclude:
        raise UserError(
            f"{key} names modules that have no matrix to adapt",
            got=f"{wrong[0]}, {len(wrong)} in all",
            allowed=", ".join(leaves),
            fix="name the layers in them",
        )


def adapted(known: Modules, targets: Any, exclude: Any) -> set[str]:
    """Return the modules of `known` that an adapter with these targets and exclusions changes.

    `all-linear` stands for all matrices but the embedding and the head.
    """
    names, left_out = resolve(targets, known), resolve(exclude, known)
    if names == "all-linear":
        names = sorted({name.rsplit(".", 1)[-1] for name in known.matrices} - UNTARGETED)
    named, excluded = ([v] if isinstance(v, str) else list(v or ()) for v in (names, left_out))
    return {
        module
        for module in known.matrices
        if any(_matches(names, part, module) for part in named)
        and not any(_matches(left_out, part, module) for part in excluded)
    }


def _matches(names: str | Sequence[str], part: str, module: str) -> bool:
    if not isinstance(names, str):
        return module == part or module.endswith(f".{part}")
    # A file's names may lack the prefix that the whole model has.
    return any(
        re.fullmatch(part, f"{body}{module}") is not None for body in ("", "model.", "transformer.")
    )
