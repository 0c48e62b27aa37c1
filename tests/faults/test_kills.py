"""Kill runs by SIGKILL at many moments; resumed, they equal an undisturbed run to the bit."""

from __future__ import annotations

import dataclasses

import pytest

from harness.records.run_dir import RunDir
from tests.faults.cases import CHAINS, SAME, VLLM_KILLS, Kill
from tests.faults.compare import differences, lost_steps
from tests.faults.conftest import Record, Runs, UndisturbedRun


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "chain", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, len(CHAINS)))]
)
def test_killed_run_equals_undisturbed_run(
    chain: int, runs: Runs, undisturbed: UndisturbedRun, record: Record
) -> None:
    run = runs.get(f"killed{chain}")
    for kill in CHAINS[chain]:
        _run_until_kill(kill, run, runs, undisturbed.seconds)
    last = runs.resume(run)
    assert last.status == 0, last.output
    assert differences(undisturbed.run, run) == []
    assert not run.aside.exists()
    for kill in CHAINS[chain]:
        record(f"SIGKILL: {kill.phase}", SAME, lost_steps(undisturbed.run, run))


VLLM = ["generator.backend=vllm", "trainer.policy.model.lora.sync=disk", "trainer.max_steps=2"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_killed_during_a_sync_to_vllm_equals_undisturbed_run(
    runs: Runs, record: Record
) -> None:
    vllm = dataclasses.replace(runs, overrides=[*runs.overrides, *VLLM])
    killed, undisturbed = vllm.get("vllm_killed"), vllm.get("vllm_undisturbed")
    for kill in VLLM_KILLS:
        _run_until_kill(kill, killed, vllm, 0.0)
    for outcome in (vllm.resume(killed), vllm.start("vllm_undisturbed")):
        assert outcome.status == 0, outcome.output
    assert differences(undisturbed, killed) == []
    for kill in VLLM_KILLS:
        record(f"SIGKILL: {kill.phase}", SAME, lost_steps(undisturbed, killed))


def _run_until_kill(kill: Kill, run: RunDir, runs: Runs, seconds: float) -> None:
    """Start or resume the run, up to a kill."""
    fault = dataclasses.replace(kill.fault, seconds=kill.fault.seconds * seconds)
    begun = run.manifest.exists()
    outcome = runs.resume(run, fault) if begun else runs.start(run.path.name, fault=fault)
    assert outcome.killed, f"{kill} did not strike: {outcome.output}"
    assert outcome.moment
    assert "Traceback" not in outcome.output
