"""Checkpoints and adapters of a member, written whole or not at all, whatever the ranks."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.config.metrics import ACCURACY
from harness.core.errors import UserError
from harness.records.files import damage, remove_folder, whole_folder
from harness.records.run_dir import RunDir
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.distributed import placement
from rltrain.distributed.process_group import Ranks, full, like
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.sync.disk import write_adapter
from rltrain.sync.merge import merged_weights

COMPLETE = "COMPLETE"
STATE = "state.json"
_STEP = re.compile(r"step_(\d{6,})")
_FILES = {"policy": ("weights", "optimizer"), "critic": ("critic", "critic_optimizer")}


def save(member: Member, ranks: Ranks) -> None:
    """Write `checkpoints/step_NNNNNN/` and remove the oldest beyond `trainer.max_ckpts_to_keep`.

    It holds what training changes: adapters (or all weights, rank 0), value head, optimizers and
    counters. Random streams, the data's order and the learning rate follow from seed and counters.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for model in member.trained_models:
        weights, optimizer = _FILES[model.name]
        tensors[weights] = {name: full(p.detach()) for name, p in _named(model)}
        tensors[optimizer] = {
            f"{name}/{kind}": full(value.detach())
            for name, parameter in _named(model)
            for kind, value in model.optimizer.state.get(parameter, {}).items()
        }
    state = {
        "step": member.step,
        "batches": member.batches,
        "num_tokens": member.num_tokens,
        "best": member.best,
        "bad_steps": {model.name: model.bad_steps for model in member.trained_models},
    }
    ranks.once(lambda: _write(member, tensors, state))


def _write(
    member: Member, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> None:
    root = member.run_dir.checkpoints
    with whole_folder(root / f"step_{member.step:06d}") as new:
        for name, values in tensors.items():
            save_file(
                {key: value.cpu().contiguous() for key, value in values.items()},
                new / f"{name}.safetensors",
            )
        # A checkpoint is of use with the rows that were logged before it, and no others.
        (new / STATE).write_text(
            json.dumps({**state, "metrics": member.metrics.mark()}, indent=2) + "\n"
        )
        (new / COMPLETE).touch()
    for old in _steps(root)[: -member.recipe.trainer.max_ckpts_to_keep]:
        remove_folder(old)


def find(member: Member) -> Path | None:
    """Return the checkpoint to resume from; None to start at step 0.

    It is the run's latest sound one, else the one that `trainer.resume_mode` names. Naming one of
    the run's own goes back to it. Damaged and later ones are set aside, with a message. Raises
    UserError where the named one is damaged. Only the process that writes the run may call this.
    """
    run_dir, mode = member.run_dir, member.recipe.trainer.resume_mode or "none"
    run_dir.tidy()
    if mode == "latest":
        return _latest_sound(member)
    steps = _steps(run_dir.checkpoints)
    named = None if mode == "none" else _asked_for(member, Path(mode).resolve())
    if named is not None and named not in steps:
        return _latest_sound(member) or named
    for later in steps[steps.index(named) + 1 if named else 0 :]:
        run_dir.set_aside(later, f"trainer.resume_mode={mode}")
    return named


def _latest_sound(member: Member) -> Path | None:
    """Return the latest checkpoint that is undamaged, with its rows and its best adapter."""
    run_dir, sound, damaged = member.run_dir, None, []
    lost_rows, lost_best = member.metrics.damage(), math.inf
    for path in reversed(_steps(run_dir.checkpoints)):
        why = damage(path)
        if why is None:
            state = json.loads((path / STATE).read_text())
            rows = member.metrics.damage(state["metrics"])
            lost_rows = lost_rows or rows
            if lost_best == math.inf and state["best"] is not None and _best_is_lost(run_dir):
                lost_best = state["best"]["step"]
            # A best adapter of a later step will be written again when that step is reached.
            needs_best = state["step"] >= lost_best
            why = rows or (f"it needs adapter/best, of step {lost_best}" if needs_best else None)
        if why is None:
            sound = path
            break
        damaged.append(path)
        run_dir.set_aside(path, why)
    if lost_rows is not None and run_dir.metrics.exists():
        run_dir.set_aside(run_dir.metrics, lost_rows, copy=True)
    if damaged:
        print(f"resuming from {sound.name if sound else 'step 0'}", file=sys.stderr, flush=True)
    return sound


def _best_is_lost(run_dir: RunDir) -> bool:
    """Return whether `adapter/best` is damaged; set it aside then."""
    best = run_dir.adapter / "best"
    why = damage(best)
    if why is not None and best.exists():
        run_dir.set_aside(best, why)
    return why is not None


def _asked_for(member: Member, path: Path) -> Path:
    """Return the checkpoint that `trainer.resume_mode` names; raise UserError if damaged."""
    fix = "name another, or resume with trainer.resume_mode=latest; nothing was changed"
    if not path.is_dir() or not (path / STATE).exists():
        raise UserError(
            "trainer.resume_mode names no whole checkpoint",
            got=path,
            allowed="latest, none, or a folder checkpoints/step_NNNNNN",
        )
    why = damage(path)
    if why is None and path.parent == member.run_dir.checkpoints:
        why = member.metrics.damage(json.loads((path / STATE).read_text())["metrics"])
    if why is not None:
        raise UserError(
            "trainer.resume_mode names a damaged checkpoint", got=f"{path}: {why}", fix=fix
        )
    return path


def load(member: Member, path: Path) -> None:
    """Load a checkpoint into a member; raises UserError when its shapes do not fit."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    read: list[tuple[TrainedModel, dict[str, torch.Tensor]]] = []
    for model in member.trained_models:
        file = path / f"{_FILES[model.name][0]}.safetensors"
        weights = load_file(file) if file.is_file() else {}
        parameters = dict(_named(model))
        if weights.keys() != parameters.keys() or any(
            weights[n].shape != p.shape for n, p in parameters.items()
        ):
            raise UserError(
                f"the checkpoint does not fit this recipe's {model.name} (rank, target modules)",
                got=path,
                fix="resume with the recipe it was written with, or start anew with "
                "trainer.resume_mode=none",
            )
        read.append((model, weights))
    for model, weights in read:
        with torch.no_grad():
            for name, parameter in _named(model):
                parameter.copy_(like(weights[name], parameter))
        _load_optimizer(model, load_file(path / f"{_FILES[model.name][1]}.safetensors"))
        model.bad_steps = state["bad_steps"][model.name]
        model.set_step(state["step"])
    member.step, member.batches = state["step"], state["batches"]
    member.num_tokens, member.best = state["num_tokens"], state["best"]


def _named(model: TrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Return parameters by name without the adapter's, which differs from pack to pack."""
    return [(name.replace(f".{model.adapter}.", "."), p) for name, p in model.parameters.items()]


def _load_optimizer(model: TrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in _named(model):
        if name in by_name:
            # AdamW counts steps in a tensor on the CPU; the moments lie as the parameter does.
            model.optimizer.state[parameter] = {
                kind: value if value.dim() == 0 else like(value, parameter)
                for kind, value in by_name[name].items()
            }


def _steps(root: Path) -> list[Path]:
    """Return the folders of checkpoints, earliest first."""
    if not root.is_dir():
        return []
    steps = [(int(m[1]), path) for path in root.iterdir() if (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(steps)]


def keep_adapter(pack: Pack, member: Member, accuracy: float) -> None:
    """Write `adapter/best` when the score is the best so far, and `adapter/final` at the end."""
    folders = []
    if member.best is None or accuracy > member.best[ACCURACY]:
        member.best = {"step": member.step, ACCURACY: accuracy}
        folders.append("best")
    if member.done:
        folders.append("final")
    for folder in folders:
        _write_policy(pack, member, member.run_dir.adapter / folder)


def restore_final_adapter(pack: Pack, member: Member) -> None:
    """Write `adapter/final` again where it is damaged, after a kill behind the last checkpoint."""
    run_dir, final = member.run_dir, member.run_dir.adapter / "final"
    why = pack.ranks.once(lambda: damage(final))
    if why is None:
        return
    if pack.ranks.first and final.exists():
        run_dir.set_aside(final, why)
    _write_policy(pack, member, final)


def _write_policy(pack: Pack, member: Member, folder: Path) -> None:
    """Write the adapter in PEFT's format, or at rank 0 the whole model in transformers'."""
    if member.recipe.trainer.policy.model.lora.rank > 0:
        write_adapter(pack.model, member.name, folder, pack.ranks.once)
        return
    dtype = placement.dtype_of(member.recipe)
    weights = {name: w.to(dtype) for name, w in merged_weights(pack.model, member.name)}

    def write() -> None:
        with whole_folder(folder) as new:
            pack.model.save_pretrained(new, state_dict=weights)
            pack.tokenizer.save_pretrained(new)

    pack.ranks.once(write)
