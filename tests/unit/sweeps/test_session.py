"""Test starting and resuming a sweep: its checks, and what a resumed sweep may change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.config import recipe as recipes
from harness.config.digest import is_recipe_digest
from harness.core.errors import UserError
from harness.core.locks import held
from harness.records import manifest
from harness.records.run_dir import Status
from sweeps import session as sessions
from sweeps.session import Session
from sweeps.study import trials
from sweeps.study.sizing import num_packs
from sweeps.study.study import Study
from tests.unit.sweeps.curves import LR, RANK

Start = Callable[..., Session]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe that passes the checks: the model's config.json and data files exist."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    rows = [
        {
            "prompt": [{"role": "user", "content": "1 + 1?"}],
            "env_class": "gsm8k",
            "reward_spec": {"method": "rule", "ground_truth": "2"},
        }
    ] * 4
    pd.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    pd.DataFrame(rows).to_parquet(tmp_path / "more.parquet")
    recipe = {
        "defaults": ["base", "_self_"],
        "data": {
            "train_data": [str(tmp_path / "data.parquet")],
            "val_data": [str(tmp_path / "more.parquet")],
        },
        "trainer": {
            "policy": {"model": {"path": str(tmp_path / "model")}},
            "placement": {"device": "cpu"},
            "max_steps": 4,
            "train_batch_size": 4,
            "policy_mini_batch_size": 4,
            "ckpt_path": str(tmp_path / "runs"),
        },
        "sweep": {
            "num_trials": 3,
            "space": {RANK: {"choices": [1, 8]}, LR: {"low": 1e-5, "high": 1e-3, "log": True}},
        },
    }
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(recipe))
    return file


@pytest.fixture
def begun(recipe_file: Path) -> Session:
    """A sweep with one trial that has started."""
    session = sessions.start(str(recipe_file), ["trainer.run_name=first"])
    assert Study(session.sweep_dir.journal, session.plan).ask() is not None
    session.sweep_dir.move_to(Status.RUNNING)
    return session


def test_a_sweeps_directory(recipe_file: Path) -> None:
    session = sessions.start(str(recipe_file), ["trainer.run_name=first"])
    assert session.sweep_dir.path == recipe_file.parent / "runs" / "first"
    manifest = session.sweep_dir.read_manifest()
    assert (manifest["kind"], manifest["status"]) == ("sweep", "CREATED")
    assert manifest["recipe"]["source"] == str(recipe_file)
    assert session.plan.recipe.trainer.num_threads == os.cpu_count()
    with pytest.raises(UserError, match="--resume"):
        sessions.start(str(recipe_file), ["trainer.run_name=first"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_data=[nowhere.parquet]", "data file not found"),
        ("trainer.policy.model.path=nowhere/at/all", "names no folder"),
        ("environment.env_class=gsm9k", "gsm8k"),
        ("trainer.placement.device=cuda", "not enough GPUs"),
        (f"sweep.space.{RANK}.choices=[1,1]", "the same choice twice"),
        ("sweep.metric=eval/acuracy", "did you mean eval/accuracy?"),
        ("sweep.pruner.name=hyperbnd", "did you mean hyperband?"),
    ],
)
def test_errors_are_raised_before_anything_starts(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr("rltrain.distributed.placement.visible_gpus", lambda: 0)
    with pytest.raises(UserError) as caught:
        sessions.start(str(recipe_file), [override])
    assert message in str(caught.value)
    assert not (recipe_file.parent / "runs").exists()


def test_packs_need_their_gpus(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sweeps.session", "rltrain.distributed.placement"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: 1)
    cuda = "trainer.placement.device=cuda"
    assert sessions.start(str(recipe_file), [cuda, "trainer.run_name=one"])
    with pytest.raises(UserError, match="2 asked, 1 there"):
        sessions.start(str(recipe_file), [cuda, "trainer.run_name=two", "sweep.max_concurrent=2"])


def test_there_is_a_pack_per_gpu_and_their_number_stays(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sweeps.session", "rltrain.distributed.placement"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: 2)
    begun = sessions.start(
        str(recipe_file), ["trainer.placement.device=cuda", "trainer.run_name=two"]
    )
    assert num_packs(begun.plan.recipe) == 2
    for module in ("sweeps.session", "rltrain.distributed.placement"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: 1)
    same = ["trainer.placement.device=cuda", "trainer.run_name=two"]
    with pytest.raises(UserError, match=r"2 asked, 1 there(.|\n)*sweep.max_concurrent=null"):
        sessions.resume(None, str(recipe_file), same)
    fewer = sessions.resume(str(begun.sweep_dir.path), None, ["sweep.max_concurrent=null"])
    assert num_packs(fewer.plan.recipe) == 1


def test_resume_by_directory(begun: Session) -> None:
    again = sessions.resume(str(begun.sweep_dir.path), None, [])
    assert again.sweep_dir.path == begun.sweep_dir.path
    assert again.plan.recipe == begun.plan.recipe


def test_resume_by_recipe_and_name(begun: Session, recipe_file: Path) -> None:
    again = sessions.resume(
        None, str(recipe_file), ["trainer.run_name=first", "sweep.num_trials=5"]
    )
    assert again.sweep_dir.path == begun.sweep_dir.path
    assert again.plan.num_configurations == 5
    with pytest.raises(UserError, match="runs/first"):
        sessions.resume(None, str(recipe_file), [])


def test_a_resumed_sweep_keeps_its_threads(
    begun: Session, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 999)
    again = sessions.resume(str(begun.sweep_dir.path), str(recipe_file), [])
    assert again.plan.recipe.trainer.num_threads == begun.plan.recipe.trainer.num_threads != 999


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=8", "trainer.max_steps: 4 -> 8"),
        ("seed=3", "seed: 0 -> 3"),
        (f"sweep.first_trials=[{{{RANK}:8}}]", "sweep.first_trials"),
    ],
)
def test_another_recipe_is_not_resumed(begun: Session, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        sessions.resume(str(begun.sweep_dir.path), None, [override])
    assert message in str(caught.value)


def test_another_space_is_not_resumed(begun: Session) -> None:
    again = sessions.resume(str(begun.sweep_dir.path), None, [f"sweep.space.{RANK}.choices=[1,16]"])
    with pytest.raises(UserError, match=r"choices: 1, 8 -> choices: 1, 16"):
        sessions.run(again)
    assert begun.sweep_dir.status is Status.RUNNING


def test_only_sweeps_are_resumed(begun: Session, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest"):
        sessions.resume(str(tmp_path), None, [])
    begun.sweep_dir.update(kind="run")
    with pytest.raises(UserError, match="the directory of a run"):
        sessions.resume(str(begun.sweep_dir.path), None, [])
    with pytest.raises(UserError, match="which sweep"):
        sessions.resume(None, None, [])


def test_a_sweep_runs_in_one_process_at_a_time(begun: Session) -> None:
    with held(begun.sweep_dir.path / ".lock") as owned:
        assert owned
        with pytest.raises(UserError, match="another process"):
            sessions.run(begun)


def test_of_two_starts_with_the_same_name_one_fails(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, made = manifest.build, list[Session]()

    def start_other_first(*args: Any, **values: Any) -> dict[str, Any]:
        # The other start happens after this one has checked that there is no such sweep.
        monkeypatch.setattr(manifest, "build", build)
        made.append(sessions.start(str(recipe_file), ["trainer.run_name=first", "seed=4"]))
        return build(*args, **values)

    monkeypatch.setattr(manifest, "build", start_other_first)
    with pytest.raises(UserError, match="this directory exists"):
        sessions.start(str(recipe_file), ["trainer.run_name=first", "seed=3"])
    stored = recipes.read(made[0].sweep_dir.recipe)
    assert stored.seed == 4
    assert is_recipe_digest(made[0].sweep_dir.read_manifest()["recipe"]["digest"], stored)


def test_a_sweep_with_nothing_left_starts_nothing(begun: Session) -> None:
    study = Study(begun.sweep_dir.journal, begun.plan)
    while (trial := study.ask()) is not None:
        study.complete(trial.number, 0.5, 4)
    again = sessions.run(sessions.resume(str(begun.sweep_dir.path), None, []))
    assert again.num_left == 0
    sessions.conclude(begun, again, None)
    manifest = begun.sweep_dir.read_manifest()
    assert (manifest["status"], manifest["result"]["counts"]) == (
        "COMPLETE",
        {"COMPLETE": 3, "PRUNED": 0, "FAIL": 0},
    )


def change(data: Path) -> None:
    """Remove the last row of a data file."""
    pd.read_parquet(data).iloc[:-1].to_parquet(data)


def records(session: Session) -> list[dict[str, Any]]:
    return [session.sweep_dir.trial(number).read_manifest() for number in range(3)]


def test_a_sweep_does_not_go_on_with_changed_data(recipe_file: Path, begun: Session) -> None:
    change(recipe_file.parent / "more.parquet")
    again = sessions.resume(str(begun.sweep_dir.path), None, [], 1)
    before = begun.sweep_dir.manifest.read_bytes()
    with pytest.raises(
        UserError,
        match=r"the inputs of this sweep have changed since it began\n"
        r"(.|\n)*data .*more\.parquet: sha256:",
    ):
        sessions.run(again)
    assert begun.sweep_dir.manifest.read_bytes() == before
    assert Study(begun.sweep_dir.journal, begun.plan).num_to_confirm == 0


def test_a_sweep_goes_on_with_changed_data_where_that_is_allowed(
    recipe_file: Path, begun: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    change(recipe_file.parent / "more.parquet")
    again = sessions.resume(str(begun.sweep_dir.path), None, [], changed_inputs=True)
    study = Study(begun.sweep_dir.journal, begun.plan)
    sessions._check_inputs(again, study)
    assert "note: continuing with changed inputs: data " in capsys.readouterr().out
    sessions._check_inputs(
        sessions.resume(str(begun.sweep_dir.path), None, []), study
    )  # asked once for each change
    assert capsys.readouterr().out == ""


def test_a_finished_sweep_needs_no_data(recipe_file: Path, begun: Session) -> None:
    study = Study(begun.sweep_dir.journal, begun.plan)
    while (trial := study.ask()) is not None:
        study.complete(trial.number, 0.5, 4)
    change(recipe_file.parent / "more.parquet")
    assert sessions.run(sessions.resume(str(begun.sweep_dir.path), None, [])).finished
    for allowed in (False, True):
        with pytest.raises(UserError, match="chosen on other inputs"):
            sessions.run(
                sessions.resume(str(begun.sweep_dir.path), None, [], 1, changed_inputs=allowed)
            )


def test_trials_record_which_inputs_they_were_trained_on(recipe_file: Path, begun: Session) -> None:
    plan, sweep_dir = begun.plan, begun.sweep_dir
    study = Study(sweep_dir.journal, plan)
    asked = [study.ask() for _ in range(3)]
    ended, trained, _ = [
        trials.create(plan, trial, sweep_dir)[0] for trial in asked if trial is not None
    ]
    for run_dir in (ended, trained):
        run_dir.move_to(Status.RUNNING)
        (run_dir.checkpoints / "step_000002").mkdir(parents=True)
    ended.move_to(Status.COMPLETE)
    kept = ended.manifest.read_bytes()
    data = recipe_file.parent / "more.parquet"
    was = manifest.digest_path(str(data))
    change(data)
    assert [change.was[:19] for change in trials.changed_inputs(sweep_dir)] == [str(was)[:19]]
    trials.accept_inputs(sweep_dir)
    assert ended.manifest.read_bytes() == kept
    assert trials.changed_inputs(sweep_dir) == []
    assert [record["inputs"] for record in records(begun)] == [[1], [1, 2], [2]]
    digests = [record["data"][str(data)] for record in records(begun)]
    assert digests == [was, *[manifest.digest_path(str(data))] * 2]
    assert sweep_dir.read_manifest()["inputs"] == [1, 2]
    assert trials.outdated_trials(sweep_dir) == {0, 1}
    # Further trials have the new inputs. A trial that has ended keeps its first ones.
    change(data)
    trials.accept_inputs(sweep_dir)
    assert [record["inputs"] for record in records(begun)] == [[1], [1, 2, 3], [3]]
    assert trials.outdated_trials(sweep_dir) == {0, 1}


def test_data_files_that_are_an_axis_are_compared_too(recipe_file: Path) -> None:
    """The data of some trials changed; the others' did not."""
    folder = recipe_file.parent
    axis = [
        f"sweep.space.{LR}=null",
        f"sweep.space.{RANK}=null",
        "sweep.sampler=grid",
        "sweep.seeds=[0,1]",
        f"sweep.space={{data.train_data: {{choices: [[{folder}/data.parquet], [{folder}/other.parquet]]}}}}",  # noqa: E501
    ]
    pd.read_parquet(folder / "data.parquet").to_parquet(folder / "other.parquet")
    session = sessions.start(str(recipe_file), ["trainer.run_name=axis", *axis])
    study = Study(session.sweep_dir.journal, session.plan)
    for _ in range(3):
        trial = study.ask()
        assert trial is not None
        run_dir = trials.create(session.plan, trial, session.sweep_dir)[0]
        run_dir.move_to(Status.RUNNING)
        run_dir.move_to(Status.COMPLETE)
    pd.read_parquet(folder / "other.parquet").iloc[::-1].to_parquet(folder / "other.parquet")
    (changed,) = trials.changed_inputs(session.sweep_dir)
    assert "other.parquet" in changed.what
    trials.accept_inputs(session.sweep_dir)
    on_other = [
        record["trial"]["params"]["data.train_data"][0].endswith("other.parquet")
        for record in records(session)
    ]
    assert [record["inputs"] for record in records(session)] == [
        [1] if other else [2] for other in on_other
    ]
    assert 0 < sum(on_other) < 3
