"""Export a run's policy as a PEFT adapter or a transformers model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.config.metrics import ACCURACY
from harness.config.schema import Recipe
from harness.config.validate import VLLM_LORA_RANKS
from harness.core.cli import invocation
from harness.core.errors import UserError
from harness.core.paths import locate, shown
from harness.records.files import verify_folder, whole_folder, write_json, write_text
from harness.records.manifest import digest_path
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status


@dataclass(frozen=True, slots=True)
class Export:
    """An export of the policy in `source` to the folder `output`, as a whole model if `merged`."""

    run_dir: RunDir
    recipe: Recipe
    manifest: dict[str, Any]
    source: Path
    merged: bool
    output: Path

    @property
    def is_adapter(self) -> bool:
        """Whether the run trained an adapter; full fine-tuning trained a whole model."""
        return self.recipe.trainer.policy.model.lora.rank > 0

    @property
    def base(self) -> str:
        """The base model for other programs: a local folder's absolute path, or a hub name."""
        path = self.recipe.trainer.policy.model.path
        folder = locate(path)
        return str(folder) if folder else path

    @property
    def evaluated(self) -> dict[str, float] | None:
        """The row of `metrics.jsonl` of the exported policy's evaluation; None if there is none."""
        rows = [
            row
            for row in MetricsFile(self.run_dir.metrics).rows()
            if ACCURACY in row and row["step"] > 0
        ]
        if self.source.name == "final":
            return rows[-1] if rows else None
        return max(rows, key=lambda row: row[ACCURACY], default=None)


def plan(
    directory: str | Path, output: str | Path, *, which: str = "final", merged: bool = False
) -> Export:
    """Check an export of a run's `final` or `best` policy; imports nothing heavy.

    Raises UserError for a directory that is no run, a run without that policy, a base model that is
    gone or has changed, a damaged policy, and an output folder that exists.
    """
    run_dir, output = RunDir(directory), Path(output).absolute()
    manifest = run_dir.read_manifest()
    recipe = recipes.read(run_dir.recipe)
    export = Export(run_dir, recipe, manifest, run_dir.adapter / which, merged, output)
    _check_policy(export)
    if export.is_adapter:
        _check_base(export)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(
            "the output exists already",
            got=shown(output),
            fix="name a folder that does not exist yet",
        )
    return export


def write(export: Export) -> None:
    """Write the export's folder, atomically; raise UserError when it cannot be written."""
    try:
        with whole_folder(export.output) as new:
            if not export.is_adapter:
                shutil.copytree(export.source, new, dirs_exist_ok=True)
            elif export.merged:
                _write_merged(export, new)
            else:
                _write_adapter(export, new)
            write_text(new / "README.md", _card(export))
    except OSError as error:
        raise UserError(
            "cannot write the output folder", got=f"{export.output}: {error.strerror or error}"
        ) from None


def _check_policy(export: Export) -> None:
    """Raise UserError where the run lacks the policy; `final` is written at the last step."""
    which, status = export.source.name, export.manifest["status"]
    if which == "final" and status != Status.COMPLETE.value:
        fix = None
        if _holds_policy(export.run_dir.adapter / "best"):
            fix = "--which best exports the best evaluated so far"
        elif status != Status.PRUNED.value:
            fix = f"resume it: {invocation('run')} --resume {shown(export.run_dir.path)}"
        raise UserError(
            f"the run is {status}: it has no final policy",
            got=shown(export.run_dir.path),
            allowed=f"a run that is {Status.COMPLETE.value}",
            fix=fix,
        )
    if not _holds_policy(export.source):
        raise UserError(
            f"the run has no {which} policy",
            got=f"{shown(export.source)} is not there, or not whole",
        )
    verify_folder(export.source)


def _holds_policy(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))


def _check_base(export: Export) -> None:
    """Raise UserError for a local base that has changed; a hub's model has no digest."""
    digest = export.manifest["model"]["digest"]
    path = export.recipe.trainer.policy.model.path
    if digest is None:
        return
    if locate(path) is None:
        raise UserError(
            "the run's base model is gone",
            got=path,
            fix="put the folder back, or run from where it was",
        )
    if digest_path(path) != digest:
        raise UserError(
            "the base model's files have changed since the run: the adapter would not fit",
            got=f"{path}: {digest_path(path)}",
            allowed=digest,
        )


def _write_adapter(export: Export, folder: Path) -> None:
    """Write the adapter, the name of its base, and the base's tokenizer."""
    shutil.copy(export.source / "adapter_model.safetensors", folder)
    config = json.loads((export.source / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": export.base})
    _load_tokenizer(export).save_pretrained(folder)


def _write_merged(export: Export, folder: Path) -> None:
    """Write base + scale * B A in the base's dtype."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rltrain.models.loading import NO_CODE
    from rltrain.sync.merge import merged_weights

    tokenizer = _load_tokenizer(export)
    try:
        base = AutoModelForCausalLM.from_pretrained(export.base, dtype="auto", **NO_CODE)
    except (OSError, ValueError) as error:
        raise _cannot_load(export, error) from None
    try:
        model = PeftModel.from_pretrained(base, str(export.source), torch_device="cpu")
    except Exception as error:  # a damaged adapter can raise anything
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UserError(
            "cannot load the run's adapter", got=f"{shown(export.source)}: {reason}"
        ) from error
    try:
        weights = dict(merged_weights(model, "default"))
    except UserError as error:
        raise UserError(
            error.what, got=error.got, fix="export the adapter: leave out --merged"
        ) from None
    model.unload().save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def _load_tokenizer(export: Export) -> Any:
    from transformers import AutoTokenizer

    from rltrain.models.loading import NO_CODE

    try:
        return AutoTokenizer.from_pretrained(export.base, **NO_CODE)
    except (OSError, ValueError) as error:
        raise _cannot_load(export, error) from None


def _cannot_load(export: Export, error: Exception) -> UserError:
    return UserError(
        "cannot load the base model", got=f"{export.base}: {str(error).strip().splitlines()[0]}"
    )


def _card(export: Export) -> str:
    """Return the model card: what this is, where it comes from, how to load it."""
    adapter = export.is_adapter and not export.merged
    header = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if locate(export.base) is None:
        header |= {"base_model": export.base}
    front = "\n".join(f"{key}: {value}" for key, value in header.items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(export).items())
    what = "A LoRA adapter" if adapter else "A model"
    return (
        f"---\n{front}\n---\n\n# {export.manifest['name']}\n\n"
        f"{what} trained by reinforcement learning with noregret.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        "## Loading\n\n`FOLDER` is this "
        f"folder.\n\n{_adapter_usage(export) if adapter else _MODEL_USAGE}"
    )


def _facts(export: Export) -> dict[str, str]:
    """Return the card's table: recipe, base, adapter, result, code."""
    recipe, manifest = export.recipe, export.manifest
    lora, evaluated = recipe.trainer.policy.model.lora, export.evaluated
    digest = manifest["model"]["digest"]
    facts = {
        "recipe": f"{manifest['recipe']['source']}, digest `{manifest['recipe']['digest']}`",
        "base model": f"`{recipe.trainer.policy.model.path}`"
        + ("" if digest is None else f", digest `{digest}`"),
        "training": f"{recipe.trainer.algorithm.advantage_estimator.name}, seed {recipe.seed}, "
        f"learning rate {recipe.trainer.policy.optimizer_config.lr:g}",
    }
    if export.is_adapter:
        config = json.loads((export.source / "adapter_config.json").read_text())
        targets = config["target_modules"]
        on = f"`{targets}`" if isinstance(targets, str) else ", ".join(targets)
        facts["LoRA"] = f"rank {lora.rank}, alpha {lora.alpha:g}, on {on}" + (
            ", merged" if export.merged else ""
        )
    start = manifest.get("adapter")
    if start is not None:
        facts["started from"] = f"`{start['path']}`, digest `{start['digest']}`"
    if evaluated is not None:
        facts["policy"] = (
            f"{export.source.name}: step {evaluated['step']}, of a run that is {manifest['status']}"
        )
        rows = MetricsFile(export.run_dir.metrics).rows()
        first = next((row for row in rows if ACCURACY in row), None)
        has_base = first is not None and first["step"] == 0
        facts["held-out accuracy"] = f"{evaluated[ACCURACY]:.3f}" + (
            f" ({'base' if start is None else 'start'} {first[ACCURACY]:.3f})"
            if first is not None and has_base
            else ""
        )
    for entry in manifest.get("resumed") or []:
        if "inputs" in entry:
            changes = "; ".join(f"`{change}`" for change in entry["different"])
            facts["changed inputs"] = f"after step {entry['inputs']['step']}: {changes}"
    git = manifest["git"]
    if git is not None:
        facts["noregret"] = f"commit {git['commit']}" + (", with changes" if git["dirty"] else "")
    facts["packages"] = ", ".join(
        f"{name} {version}" for name, version in manifest["packages"].items()
    )
    return facts


def _adapter_usage(export: Export) -> str:
    config = json.loads((export.source / "adapter_config.json").read_text())
    rank = export.recipe.trainer.policy.model.lora.rank
    room = next(room for room in VLLM_LORA_RANKS if room >= rank)
    serving = (
        f"```\nvllm serve {export.base} --enable-lora --max-lora-rank {room} "
        "--lora-modules noregret=FOLDER\n```"
    )
    if config.get("target_parameters"):
        serving = (
            "vLLM does not serve adapters on experts as PEFT stores them: export with `--merged` "
            "for it."
        )
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{export.base}", dtype="auto")
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

{serving}
"""


_MODEL_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

```
vllm serve FOLDER
```
"""
