"""Checkpoints of a member: written whole or not at all, independent of how many processes wrote them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.errors import UserError
from harness.rundir import write_json
from rltrain.pack import Member

COMPLETE = "COMPLETE"
_STEP = re.compile(r"step_(\d{6,})")


def save(member: Member) -> Path:
    """Write `checkpoints/step_NNNNNN/` and remove the oldest beyond `trainer.max_ckpts_to_keep`.

    Only what training changes is in it: adapter (or all weights, rank 0), optimizer, counters. Random streams, the
    data's order and the learning rate follow from seed and step, so there is no state of theirs to keep.
    """
    root = member.run_dir.checkpoints
    final = root / f"step_{member.step:06d}"
    temporary = root / f".tmp_{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in _named(member)}, temporary / "weights.safetensors")
    save_file(_optimizer_tensors(member), temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", {
        "step": member.step, "num_tokens": member.num_tokens, "bad_steps": member.bad_steps, "best": member.best,
    })  # fmt: skip
    (temporary / COMPLETE).touch()
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for _, old in _whole(root)[: -member.recipe.trainer.max_ckpts_to_keep]:
        shutil.rmtree(old)
    return final


def find(member: Member) -> Path | None:
    """The checkpoint that `trainer.resume_mode` names: the run's latest whole one, none, or the one at a path."""
    mode = member.recipe.trainer.resume_mode
    if mode == "none":
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
    weights = load_file(path / "weights.safetensors")
    own = dict(_named(member))
    if weights.keys() != own.keys() or any(weights[n].shape != p.shape for n, p in own.items()):
        raise UserError(
            "the checkpoint does not fit this recipe's adapter (rank, target modules)",
            got=path,
            fix="resume with the recipe it was written with, or start anew with trainer.resume_mode=none",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    _load_optimizer(member, load_file(path / "optimizer.safetensors"))
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    member.step, member.num_tokens = state["step"], state["num_tokens"]
    member.bad_steps, member.best = state["bad_steps"], state["best"]
    # The learning rate is a function of the step alone.
    member.scheduler.last_epoch = member.step
    for group, base, factor in zip(
        member.optimizer.param_groups, member.scheduler.base_lrs, member.scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(member.step)


def _named(member: Member) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters by a name without the member's own, so that a checkpoint fits whatever the member is called."""
    return [(name.replace(f".{member.name}.", "."), p) for name, p in member.parameters.items()]


def _optimizer_tensors(member: Member) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in _named(member):
        for key, value in member.optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().contiguous()
    return tensors


def _load_optimizer(member: Member, tensors: dict[str, torch.Tensor]) -> None:
    state = member.optimizer.state_dict()
    for index, (name, _) in enumerate(_named(member)):
        own = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if key.rsplit("/", 1)[0] == name}
        if own:
            state["state"][index] = own
    member.optimizer.load_state_dict(state)


def _whole(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / COMPLETE).is_file()]
    return sorted(found)
