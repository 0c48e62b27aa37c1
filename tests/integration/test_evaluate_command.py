"""The evaluate command: the scores that a run's own evaluations have, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from harness.core.errors import UserError
from harness.core.paths import PROJECT
from harness.evaluate import main
from harness.records.run_dir import RunDir
from tests.integration.training import MakeRecipe, MakeRun, rows, train_run

LORA = "trainer.policy.model.lora"
FAST = "trainer.policy.optimizer_config.lr=3e-3"


@pytest.mark.parametrize(
    "policy", ["adapter", pytest.param("full fine-tuning", marks=pytest.mark.slow)]
)
def test_base_and_policy_score_as_in_the_run(
    policy: str,
    small_recipe: MakeRecipe,
    new_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = [f"{LORA}.rank=0", "trainer.policy.optimizer_config.lr=3e-4"]
    recipe = small_recipe(FAST, *(full if policy == "full fine-tuning" else []))
    run = new_run(recipe, "run")
    train_run(recipe, run)
    (held_out,), output = recipe.data.val_data, tmp_path / "scores"
    other = tmp_path / "other.parquet"
    pd.read_parquet(PROJECT / held_out).head(8).to_parquet(other)
    arguments = ["--data", held_out, str(other), "--output", str(output)]
    assert main([str(run.path), *arguments]) == 0

    first, second = json.loads((output / "scores.json").read_text())
    scored = [row["eval/accuracy"] for row in rows(run) if "eval/accuracy" in row]
    assert first["base"][0] == pytest.approx(scored[0])
    assert first["final"][0] == pytest.approx(scored[-1])
    assert first["difference"][0] == pytest.approx(scored[-1] - scored[0])
    assert (first["data"], second["problems"]) == (held_out, 8)
    for name in ("base", "final", "difference"):
        value, low, high = second[name]
        assert low <= value <= high
    name = Path(held_out).stem
    for policy_name, step in (("base", 0), ("final", recipe.trainer.max_steps or 0)):
        kept = pd.read_parquet(run.eval_samples(step))["completion"]
        completions = pd.read_parquet(output / f"{name}-{policy_name}.parquet")["completion"]
        assert completions.tolist()[: len(kept)] == kept.tolist()
    assert f"final {first['final'][0]:.3f} [" in capsys.readouterr().out


def test_bad_input_is_refused_before_a_model_is_loaded(
    small_recipe: MakeRecipe, new_run: MakeRun, tmp_path: Path
) -> None:
    recipe = small_recipe(FAST, "trainer.max_steps=1", "trainer.eval_before_train=false")
    run = new_run(recipe, "run")
    train_run(recipe, run)
    (held_out,), output = recipe.data.val_data, tmp_path / "scores"

    def refused(message: str, *arguments: str, directory: RunDir = run) -> None:
        with pytest.raises(UserError, match=message):
            main([str(directory.path), *arguments])
        assert not output.exists()

    to = ["--output", str(output)]
    refused("nowhere.parquet", "--data", "nowhere.parquet", *to)
    refused("the same name", "--data", held_out, held_out, *to)
    refused("unknown", "trainer.polisy=1", "--data", held_out, *to)
    refused("exists already", "--data", held_out, "--output", str(tmp_path))
    shutil.rmtree(run.adapter / "final")
    refused("has no final policy", "--data", held_out, *to)
