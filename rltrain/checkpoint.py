"""Checkpoints of a member: written whole or not at all, independent of how many processes wrote
them.
"""

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

from harness.core.errors import UserError
from harness.records.files import damage, remove_folder, whole_folder
from harness.records.run_dir import RunDir
from rltrain.algorithms.learner import Learner
from rltrain.distributed.process_group import Ranks, full, like
from rltrain.member import Member

COMPLETE = "COMPLETE"
STATE = "state.json"
_STEP = re.compile(r"step_(\d{6,})")
_FILES = {"policy": ("weights", "optimizer"), "critic": ("critic", "critic_optimizer")}


def save(member: Member, ranks: Ranks) -> None:
    """Write `checkpoints/step_NNNNNN/` and remove the oldest beyond `trainer.max_ckpts_to_keep`.

    Only what training changes is in it: adapters (or all weights, rank 0), value head, optimizers,
    counters. Random streams, the data's order and the learning rate follow from seed and counters,
    so there is no state of theirs.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for learner in member.learners:
        weights, optimizer = _FILES[learner.name]
        tensors[weights] = {name: full(p.detach()) for name, p in _named(learner)}
        tensors[optimizer] = {
            name: full(value) for name, value in _optimizer_tensors(learner).items()
        }
    state = {
        "step": member.step,
        "batches": member.batches,
        "num_tokens": member.num_tokens,
        "best": member.best,
        "bad_steps": {learner.name: learner.bad_steps for learner in member.learners},
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
    """The checkpoint to go on from: the run's own latest that is sound, else the one
    `trainer.resume_mode` names.

    One of the run's own that is named is gone back to. What is damaged, and what comes after the
    step gone on from, is said and set aside. Raises UserError for a named one that is not sound.
    For the one process that writes the run.
    """
    run_dir, mode = member.run_dir, member.recipe.trainer.resume_mode or "none"
    run_dir.tidy()
    if mode == "latest":
        return _latest_sound(member)
    own = _steps(run_dir.checkpoints)
    named = None if mode == "none" else _asked_for(member, Path(mode).resolve())
    if named is not None and named not in own:
        return _latest_sound(member) or named
    for later in own[own.index(named) + 1 if named else 0 :]:
        run_dir.set_aside(later, f"trainer.resume_mode={mode}")
    return named


def _latest_sound(member: Member) -> Path | None:
    """The run's latest checkpoint that is as it was written, like its rows and the best adapter it
    knows of.
    """
    run_dir, found, faults = member.run_dir, None, []
    lost_rows, lost_best = member.metrics.damage(), math.inf
    for path in reversed(_steps(run_dir.checkpoints)):
        why = damage(path)
        if why is None:
            state = json.loads((path / STATE).read_text())
            rows = member.metrics.damage(state["metrics"])
            lost_rows = lost_rows or rows
            if lost_best == math.inf and state["best"] is not None and _best_is_lost(run_dir):
                lost_best = state["best"]["step"]
            # The best adapter of a later step is made again on the way to it.
            why = rows or (
                f"it needs adapter/best, of step {lost_best}"
                if state["step"] >= lost_best
                else None
            )
        if why is None:
            found = path
            break
        faults.append(path)
        run_dir.set_aside(path, why)
    if lost_rows is not None and run_dir.metrics.exists():
        run_dir.set_aside(run_dir.metrics, lost_rows, copy=True)
    if faults:
        print(f"going on from {found.name if found else 'step 0'}", file=sys.stderr, flush=True)
    return found


def _best_is_lost(run_dir: RunDir) -> bool:
    """Whether the best adapter is not as it was written; it is set aside then."""
    best = run_dir.adapter / "best"
    why = damage(best)
    if why is not None and best.exists():
        run_dir.set_aside(best, why)
    return why is not None


def _asked_for(member: Member, path: Path) -> Path:
    """The checkpoint that `trainer.resume_mode` names, if it is sound."""
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
    """Put a member where a checkpoint left it; raises UserError when the checkpoint is of another
    shape.
    """
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    read: list[tuple[Learner, dict[str, torch.Tensor]]] = []
    for learner in member.learners:
        file = path / f"{_FILES[learner.name][0]}.safetensors"
        weights = load_file(file) if file.is_file() else {}
        own = dict(_named(learner))
        if weights.keys() != own.keys() or any(weights[n].shape != p.shape for n, p in own.items()):
            raise UserError(
                f"the checkpoint does not fit this recipe's {learner.name} (rank, target modules)",
                got=path,
                fix="resume with the recipe it was written with, or start anew with "
                "trainer.resume_mode=none",
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
    """Parameters by a name without the adapter's own, so that a checkpoint fits whatever the member
    is called.
    """
    return [
        (name.replace(f".{learner.adapter}.", "."), p) for name, p in learner.parameters.items()
    ]


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
                kind: value if value.dim() == 0 else like(value, parameter)
                for kind, value in by_name[name].items()
            }


def _steps(root: Path) -> list[Path]:
    """The folders of checkpoints, earliest first."""
    found = (
        [(int(m[1]), p) for p in root.iterdir() if (m := _STEP.fullmatch(p.name))]
        if root.is_dir()
        else []
    )
    return [path for _, path in sorted(found)]
