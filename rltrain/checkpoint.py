"""Checkpoints of a member: written whole or not at all, independent of how many processes wrote them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.errors import UserError
from harness.rundir import whole_folder, write_json
from rltrain.learner import Learner
from rltrain.member import Member
from rltrain.ranks import Ranks, full, like

COMPLETE = "COMPLETE"
_STEP = re.compile(r"step_(\d{6,})")
_FILES = {"policy": ("weights", "optimizer"), "critic": ("critic", "critic_optimizer")}


def save(member: Member, ranks: Ranks) -> None:
    """Write `checkpoints/step_NNNNNN/` and remove the oldest beyond `trainer.max_ckpts_to_keep`.

    Only what training changes is in it: adapters (or all weights, rank 0), value head, optimizers, counters. Random
    streams, the data's order and the learning rate follow from seed and counters, so there is no state of theirs.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for learner in member.learners:
        weights, optimizer = _FILES[learner.name]
        tensors[weights] = {name: full(p.detach()) for name, p in _named(learner)}
        tensors[optimizer] = {name: full(value) for name, value in _optimizer_tensors(learner).items()}
    state = {
        "step": member.step, "batches": member.batches, "num_tokens": member.num_tokens, "best": member.best,
        "bad_steps": {learner.name: learner.bad_steps for learner in member.learners},
    }  # fmt: skip
    ranks.once(lambda: _write(member, tensors, state))


def _write(member: Member, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> None:
    root = member.run_dir.checkpoints
    for left_by_a_kill in root.glob(".step_*"):
        shutil.rmtree(left_by_a_kill)
    with whole_folder(root / f"step_{member.step:06d}") as new:
        for name, values in tensors.items():
            save_file({key: value.cpu().contiguous() for key, value in values.items()}, new / f"{name}.safetensors")
        write_json(new / "state.json", state)
        (new / COMPLETE).touch()
    for _, old in _whole(root)[: -member.recipe.trainer.max_ckpts_to_keep]:
        shutil.rmtree(old)


def find(member: Member) -> Path | None:
    """The checkpoint that `trainer.resume_mode` names: the run's latest whole one, none, or the one at a path."""
    mode = member.recipe.trainer.resume_mode
    if mode is None or mode == "none":
        return None
    if mode == "latest":
        whole = _whole(member.run_dir.checkpoints)
        return whole[-1][1] if whole else None
    path = Path(mode)
    if not (path / COMPLETE).is_file():
        raise UserError("trainer.resume_mode names no whole checkpoint", got=mode,
                        allowed="latest, none, or a folder checkpoints/step_NNNNNN")  # fmt: skip
    return path


def load(member: Member, path: Path) -> None:
    """Put a member where a checkpoint left it; raises UserError when the checkpoint is of another shape."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    read: list[tuple[Learner, dict[str, torch.Tensor]]] = []
    for learner in member.learners:
        file = path / f"{_FILES[learner.name][0]}.safetensors"
        weights = load_file(file) if file.is_file() else {}
        own = dict(_named(learner))
        if weights.keys() != own.keys() or any(weights[n].shape != p.shape for n, p in own.items()):
            raise UserError(
                f"the checkpoint does not fit this recipe's {learner.name} (rank, target modules)",
                got=path,
                fix="resume with the recipe it was written with, or start anew with trainer.resume_mode=none",
            )
        read.append((learner, weights))
    for learner, weights in read:
        with torch.no_grad():
            for name, parameter in _named(learner):
                parameter.copy_(like(weights[name], parameter))
        _load_optimizer(learner, load_file(path / f"{_FILES[learner.name][1]}.safetensors"))
        learner.bad_steps = state["bad_steps"][learner.name]
        learner.set_step(state["step"])
    member.step, member.batches = state["step"], state["batches"]
    member.num_tokens, member.best = state["num_tokens"], state["best"]


def _named(learner: Learner) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters by a name without the adapter's own, so that a checkpoint fits whatever the member is called."""
    return [(name.replace(f".{learner.adapter}.", "."), p) for name, p in learner.parameters.items()]


def _optimizer_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in _named(learner)
        for key, value in learner.optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(learner: Learner, tensors: dict[str, torch.Tensor]) -> None:
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in _named(learner):
        if name in by_name:
            # AdamW counts steps in a tensor on the CPU; the moments lie as the parameter does.
            learner.optimizer.state[parameter] = {
                kind: value if value.dim() == 0 else like(value, parameter) for kind, value in by_name[name].items()
            }


def _whole(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / COMPLETE).is_file()]
    return sorted(found)
