"""Run a sweep in which trials fail, hang and compute nonsense.

The other trials complete, and no process is left.
"""

from __future__ import annotations

from multiprocessing import resource_tracker
from pathlib import Path

import pandas as pd
import psutil  # type: ignore[import-untyped]
import pytest

from analysis.experiment import Experiment
from harness import sweep
from harness.records.run_dir import RunDir, Status
from tests.faults.cases import ALONE, ENVIRONMENTS, FAILURES
from tests.faults.compare import rows, study
from tests.faults.conftest import Record

DATA, LR = "data.train_data", "trainer.policy.optimizer_config.lr"
RATES = [1e-4 * (index + 1) for index in range(len(ENVIRONMENTS))]


def processes(rays_folder: Path) -> set[int]:
    """Return processes below this one, and those that Ray started for this test."""
    rays = [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if str(rays_folder) in " ".join(p.info["cmdline"] or [])
    ]
    return {p.pid for p in psutil.Process().children(recursive=True)} | set(rays)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_failed_trials_do_not_disturb_others(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record: Record,
    rays_folder: Path,
) -> None:
    held_out, training = (
        pd.read_parquet(tiny_model_dir / "data" / f"{name}.parquet").head(8)
        for name in ("validation", "train")
    )
    held_out.to_parquet(tmp_path / "validation.parquet")
    for environment in dict.fromkeys(ENVIRONMENTS):
        training.assign(env_class=f"tests.faults.environments.{environment}").to_parquet(
            tmp_path / f"{environment}.parquet"
        )
    recipe = tmp_path / "failures.yaml"
    files = {environment: f"[{tmp_path}/{environment}.parquet]" for environment in ENVIRONMENTS}
    first = [
        f"{{{DATA}: {files[environment]}, {LR}: {rate}}}"
        for environment, rate in zip(ENVIRONMENTS, RATES, strict=True)
    ]
    recipe.write_text(
        f"""
defaults: [quickstart, _self_]
data: {{train_data: {files["good"]}, val_data: [{tmp_path}/validation.parquet]}}
trainer:
  {{train_batch_size: 2, policy_mini_batch_size: 2, max_steps: 2, eval_interval: 1,
    ckpt_path: {tmp_path}, run_name: failures}}
generator: {{backend: transformers, n_samples_per_prompt: 2}}
sweep:
  num_trials: {len(ENVIRONMENTS)}
  seeds: [0]
  sampler: random
  pruner: null
  max_concurrent: 1
  stall_seconds: 60
  first_trials: [{", ".join(first)}]
  space:
    trainer.policy.model.lora.rank: null
    trainer.policy.model.lora.alpha: null
    trainer.target_modules: null
    {DATA}: {{choices: [{", ".join(files.values())}]}}
    {LR}: {{low: 1.0e-5, high: 1.0e-2, log: true}}
"""
    )
    resource_tracker.ensure_running()  # the report's process pool starts the tracker, which stays
    before = processes(rays_folder)
    assert sweep.main([str(recipe)]) == 0
    assert processes(rays_folder) <= before

    table = Experiment.open(tmp_path / "failures").trials.set_index("number")
    assert [table.status[number] == "COMPLETE" for number in range(10)] == [
        environment == "good" for environment in ENVIRONMENTS
    ]
    reasons = {
        number: str(table.reason[number])
        for number in range(10)
        if table.status[number] != "COMPLETE"
    }
    assert list(reasons) == [1, 3, 5, 7]
    assert reasons[1].startswith(
        "the reward of tests.faults.environments.raises raised LookupError: no score for"
    )
    assert (
        reasons[3] == "no report for 60 s (sweep.stall_seconds): it hung and was ended; see log.txt"
    )
    assert reasons[7].startswith("the reward of tests.faults.environments.nan returned nan (float)")
    sweep_dir = RunDir(tmp_path / "failures")
    assert "hangs.py" in sweep_dir.trial(3).log.read_text()  # where it hung
    assert sweep_dir.status is Status.COMPLETE
    assert [trial["state"] for trial in study(sweep_dir)] == [
        "COMPLETE" if environment == "good" else "FAIL" for environment in ENVIRONMENTS
    ]
    page = (sweep_dir.report / "index.html").read_text()
    output = capsys.readouterr().out
    for reason in reasons.values():
        assert reason[:40] in page
        assert reason[:40] in output
    assert "6 complete, 0 pruned, 4 failed" in output
    for number, environment in enumerate(ENVIRONMENTS):
        if environment == "good":
            assert [row["step"] for row in rows(sweep_dir.trial(number))] == [0, 1, 2]
        else:
            record(FAILURES[environment], ALONE, 0)
