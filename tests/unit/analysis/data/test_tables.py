from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.data.columns import param_columns
from analysis.data.records import OTHER_INPUTS, UNREADABLE
from analysis.data.tables import Tables, load, write_results
from analysis.experiment import Experiment
from harness.core.errors import UserError
from harness.records.run_dir import Status
from tests.unit.analysis.synthetic import (
    ALPHA,
    BASE,
    LR,
    PROBLEMS,
    RANK,
    TARGETS,
    Sweep,
    Trial,
    example,
    params,
    rewrite_manifest,
    write_run,
    write_sweep,
)

METRIC = "eval/accuracy"


def load_trials(directory: Path) -> pd.DataFrame:
    """A row per trial of a sweep, or a run's one row."""
    return Experiment.open(directory).trials


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three sound trials."""
    trials = [Trial(i, 0, params(8, 1e-3), 0.5 + i / 10) for i in range(3)]
    return write_sweep(tmp_path_factory.mktemp("sound"), Sweep(trials, seeds=[0]))


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy of that sweep, for a test to damage."""
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def test_a_row_per_trial_with_its_facts(sweep_dir: Path) -> None:
    trials = load_trials(sweep_dir)
    assert trials["number"].tolist() == list(range(12))
    assert trials["configuration"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert trials["seed"].tolist() == [0, 1] * 6
    assert param_columns(trials) == [RANK, ALPHA, LR, TARGETS]
    assert trials["run_dir"].tolist() == [f"trials/{i:04d}" for i in range(12)]
    row = trials.iloc[4]
    assert (row[RANK], row[LR], row[TARGETS]) == (8, 1e-3, "all-linear")
    assert row[METRIC] == pytest.approx(0.92, abs=1e-3)
    assert row[f"base/{METRIC}"] == BASE
    assert (row["step"], row["seconds"], row["status"]) == (50, 61.5, "COMPLETE")


def test_best_and_last_come_from_the_logged_rows(sweep_dir: Path) -> None:
    steps, trials = load([sweep_dir]).steps, load_trials(sweep_dir).set_index("run_dir")
    for run_dir, rows in steps[steps["step"] > 0].dropna(subset=METRIC).groupby("run_dir"):
        row = trials.loc[str(run_dir)]
        assert row[f"best/{METRIC}"] == rows[METRIC].max()
        assert rows.set_index("step").loc[row["best/step"], METRIC] == rows[METRIC].max()
        assert row[f"last/{METRIC}"] == rows[METRIC].iloc[-1]


def test_what_did_not_complete_keeps_its_row_and_has_no_score(sweep_dir: Path) -> None:
    rows = [row for _, row in load_trials(sweep_dir).iterrows()]
    for number, status in ((9, "RUNNING"), (10, "FAILED"), (11, "PRUNED")):
        assert rows[number]["status"] == status
        assert pd.isna(rows[number][METRIC])
        assert pd.notna(rows[number][f"last/{METRIC}"])
    assert rows[10]["reason"] == "3 non-finite gradient norms in a row at step 20"
    assert pd.isna(rows[9]["seconds"])
    assert rows[10]["seconds"] >= 0


def test_facts_come_from_files_not_from_names(damaged: Path) -> None:
    (damaged / "trials" / "0002").rename(damaged / "trials" / "lr=99_rank=99")
    trials = load_trials(damaged)
    assert trials["number"].tolist() == [0, 1, 2]
    assert trials.iloc[2][LR] == 1e-3
    assert trials.iloc[2]["run_dir"] == "trials/lr=99_rank=99"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{ not json", "the manifest is damaged"),
        ("[1, 2]", "the manifest is damaged"),
        ('{"status": "DONE"}', "status is 'DONE'"),
        ('{"status": "COMPLETE", "trial": "seven"}', "trial is str, expected dict"),
        ('{"status": "COMPLETE", "result": {"metrics": 3}}', "result.metrics is int"),
        (
            '{"status": "COMPLETE", "status_history": [{"status": "RUNNING"}]}',
            "status_history holds",
        ),
    ],
)
def test_a_damaged_manifest_is_a_row_with_a_reason(damaged: Path, text: str, why: str) -> None:
    (damaged / "trials" / "0001" / "manifest.json").write_text(text)
    trials = load_trials(damaged)
    assert len(trials) == 3
    row = trials[trials["run_dir"] == "trials/0001"].iloc[0]
    assert row["status"] == UNREADABLE
    assert why in row["reason"]
    assert pd.isna(row["number"])
    assert set(load([damaged]).steps["run_dir"]) == {"trials/0000", "trials/0002"}


def test_an_empty_trial_directory_is_a_row_with_a_reason(damaged: Path) -> None:
    (damaged / "trials" / "0003").mkdir()
    row = load_trials(damaged).iloc[-1]
    assert row["status"] == UNREADABLE
    assert "no manifest.json" in row["reason"]


def test_damaged_metrics_are_said_and_the_recorded_result_stands(damaged: Path) -> None:
    path = damaged / "trials" / "0001" / "metrics.jsonl"
    path.write_text("{ garbage }\n" + path.read_text())
    row = load_trials(damaged).iloc[1]
    assert row["reason"].startswith("metrics.jsonl: ")
    assert row["status"] == "COMPLETE"
    assert row[METRIC] == pytest.approx(0.6, abs=1e-3)


def test_a_line_cut_short_by_a_kill_is_left_out(damaged: Path) -> None:
    path = damaged / "trials" / "0000" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 51, "rew')
    steps = load([damaged]).steps
    assert steps[steps["run_dir"] == "trials/0000"]["step"].max() == 50


def test_a_step_logged_twice_counts_once_as_logged_last(damaged: Path) -> None:
    path = damaged / "trials" / "0000" / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 50, METRIC: 0.25}) + "\n")
    steps = load([damaged]).steps
    again = steps[(steps["run_dir"] == "trials/0000") & (steps["step"] == 50)]
    assert again[METRIC].tolist() == [0.25]


def test_a_complete_run_whose_result_lacks_the_metric_has_its_last_logged_value(
    damaged: Path,
) -> None:
    rewrite_manifest(
        damaged / "trials" / "0000", result={"step": 50, "metrics": {}, "seconds": 1.0}
    )
    row = load_trials(damaged).iloc[0]
    assert row[METRIC] == row[f"last/{METRIC}"]


def test_a_single_run_is_one_row(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 3, params(8, 1e-3), 0.9))
    trials = load_trials(path)
    assert len(trials) == 1
    assert (trials.iloc[0]["seed"], trials.iloc[0]["run_dir"]) == (3, ".")
    assert param_columns(trials) == []
    assert load([path]).steps["step"].tolist() == list(range(0, 51, 5))


def test_a_run_that_never_evaluated_is_read_by_its_reward(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    (path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n{"step": 2, "reward": 0.5}\n')
    rewrite_manifest(path, result={"step": 2, "metrics": {}, "seconds": 1.0})
    assert load_trials(path).iloc[0]["reward"] == 0.5


def test_an_unfinished_sweep_without_trials_has_no_rows(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, Sweep([], status=Status.RUNNING))
    assert load_trials(path).empty
    assert load([path]).steps.empty
    assert load([path]).samples.empty


def test_neither_run_nor_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        load_trials(tmp_path)


def test_samples_of_one_run_or_of_all(sweep_dir: Path) -> None:
    every = load([sweep_dir]).samples
    one = every[every["run_dir"] == "trials/0004"]
    assert len(every) == 12 * len(one)
    assert set(one["step"]) == {0, 50}
    assert set(one["configuration"]) == {2}


def test_damaged_samples_are_left_out_with_a_warning(damaged: Path) -> None:
    (damaged / "trials" / "0000" / "samples" / "step_000050.parquet").write_bytes(b"not parquet")
    with pytest.warns(UserWarning, match="step_000050"):
        samples = load([damaged]).samples
    assert set(samples.loc[samples["run_dir"] == "trials/0000", "step"]) == {0}


def test_results_read_back_equal(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, example())
    table = load_trials(path)
    write_results(path, table)
    pd.testing.assert_frame_equal(
        pd.read_parquet(path / "results.parquet"), table, check_dtype=False
    )
    text = pd.read_csv(path / "results.csv")
    assert text[METRIC].tolist() == pytest.approx(table[METRIC].tolist(), nan_ok=True)
    assert text["status"].tolist() == table["status"].tolist()
    assert not [file for file in path.iterdir() if file.name.startswith(".")]


def test_results_of_mixed_parameter_types_are_written(tmp_path: Path) -> None:
    axes = [params(8, 1e-3, targets="mlp"), params(8, 1e-3, targets=["q_proj"])]
    path = write_sweep(
        tmp_path, Sweep([Trial(i, 0, axis, 0.5) for i, axis in enumerate(axes)], seeds=[0])
    )
    write_results(path, load_trials(path))
    assert pd.read_parquet(path / "results.parquet")[TARGETS].tolist() == ["mlp", '["q_proj"]']


def test_tables_of_several_directories_keep_every_run(sweep_dir: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, Trial(0, 3, params(4, 3e-4), 0.9))
    tables = load([sweep_dir, run, sweep_dir])
    assert len(tables.runs) == 13
    assert tables.runs["status"].value_counts().to_dict() == {
        "COMPLETE": 10,
        "RUNNING": 1,
        "FAILED": 1,
        "PRUNED": 1,
    }
    assert tables.runs["score"].notna().sum() == 10
    keys = set(zip(tables.runs["directory"], tables.runs["run_dir"], strict=True))
    assert set(zip(tables.steps["directory"], tables.steps["run_dir"], strict=True)) <= keys
    assert set(zip(tables.samples["directory"], tables.samples["run_dir"], strict=True)) <= keys
    assert tables.runs["context"].nunique() == 1


def test_a_runs_facts_are_its_recipes(sweep_dir: Path) -> None:
    runs = load([sweep_dir]).runs.set_index("number")
    row = runs.loc[6]
    assert (row["rank"], row["lr"], row["alpha"], row["seed"]) == (1, 1e-3, 32.0, 0)
    assert row["targets"] == "q_proj, v_proj"
    assert runs.loc[0, "targets"] == "all-linear"
    assert (row["batch_size"], row["budget"], row["episodes"]) == (16 * 8, "50 steps", 50 * 128)
    assert not row["full"]
    assert runs.loc[10, "diverged"]  # it failed on non-finite gradient norms
    assert runs.loc[11, "diverged"]  # pruned at a third of the base's score
    assert not runs.loc[0, "diverged"]
    assert runs["source"].str.endswith("tiny.yaml").all()


def test_a_reward_that_failed_on_a_completion_is_no_divergence(tmp_path: Path) -> None:
    reason = (
        "the reward of mine raised ValueError: no number: completion 'the inf of nan' for problem 3"
    )
    path = write_run(
        tmp_path, Trial(0, 0, params(8, 1e-3), 0.9, Status.FAILED, reason, last_step=10)
    )
    assert not load([path]).runs["diverged"].any()


def test_parameters_are_those_the_adapter_holds(damaged: Path) -> None:
    adapter = damaged / "trials" / "0001" / "adapter" / "final"
    adapter.mkdir(parents=True)
    header = {
        "a": {"dtype": "F32", "shape": [8, 16]},
        "b": {"dtype": "F32", "shape": [3]},
        "__metadata__": {},
    }
    text = json.dumps(header).encode()
    (adapter / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    runs = load([damaged]).runs.set_index("number")
    assert runs.loc[1, "parameters"] == 131
    assert runs["parameters"].isna().tolist() == [
        True,
        False,
        True,
    ]  # neither an adapter nor the model is here


def test_of_a_mixture_the_active_experts_cost_flops(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
    }
    # Four matrices of attention, four experts of three, embedding and head.
    stored = 4 * 4 * 4 + 4 * 3 * 4 * 8 + 2 * 10 * 4
    header = json.dumps({"all": {"dtype": "F32", "shape": [stored]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    recipe = path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("path: tiny-model", f"path: {model}"))
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) | {"num_tokens": 100} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flops = []
    for more in ({}, {"num_experts": 4, "num_experts_per_tok": 1}):
        (model / "config.json").write_text(json.dumps(config | more))
        tables = load([path])
        assert tables.runs["model_parameters"].tolist() == [stored]
        flops.append(tables.steps["flops"].max())
    assert flops[0] > 0
    assert flops[1] / flops[0] == pytest.approx((stored - 3 * 3 * 4 * 8) / stored)


def test_runs_differ_in_context_where_more_than_the_claims_axes_differ(tmp_path: Path) -> None:
    one = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9), "one")
    two = write_run(tmp_path, Trial(0, 1, params(1, 1e-2, alpha=2, targets="mlp"), 0.9), "two")
    recipe = two / "recipe.yaml"
    assert load([one, two]).runs["context"].nunique() == 1
    recipe.write_text(recipe.read_text().replace("eps_clip_high: 0.2", "eps_clip_high: 0.3"))
    assert load([one, two]).runs["context"].nunique() == 2


def test_tables_read_back_equal_and_name_what_is_missing(sweep_dir: Path, tmp_path: Path) -> None:
    tables = load([sweep_dir])
    tables.write(tmp_path / "tables")
    again = Tables.read(tmp_path / "tables")
    for name in ("runs", "steps", "samples", "sources"):
        pd.testing.assert_frame_equal(
            getattr(again, name), getattr(tables, name), check_dtype=False
        )
    (tmp_path / "tables" / "steps.parquet").unlink()
    with pytest.raises(UserError, match=r"steps\.parquet"):
        Tables.read(tmp_path / "tables")


def test_a_sweep_without_trials_gives_empty_tables(tmp_path: Path) -> None:
    tables = load([write_sweep(tmp_path, Sweep([], status=Status.RUNNING))])
    assert tables.runs.empty
    assert {"rank", "score", "context"} <= set(tables.runs.columns)
    tables.write(tmp_path / "tables")


def test_damaged_directories_stay_rows_of_the_tables(damaged: Path) -> None:
    (damaged / "trials" / "0001" / "manifest.json").write_text("{ not json")
    (damaged / "trials" / "0002" / "recipe.yaml").write_text(": : :")
    runs = load([damaged]).runs
    assert len(runs) == 3
    assert (runs["status"] == UNREADABLE).sum() == 1
    # A recipe can be read whatever the manifest is.
    assert runs["context"].notna().sum() == 2


def test_runs_that_keep_no_samples_have_none(damaged: Path) -> None:
    for file in damaged.glob("trials/*/samples/*.parquet"):
        pd.read_parquet(file).iloc[:0].to_parquet(file)
    assert load([damaged]).samples.empty


def test_sources_have_what_a_page_needs_of_a_directory(sweep_dir: Path, damaged: Path) -> None:
    sources = load([sweep_dir, damaged]).sources
    assert sources["kind"].tolist() == ["sweep", "sweep"]
    assert sources["seeds"].tolist() == ["[0, 1]", "[0]"]
    assert sources["problems"].tolist() == [PROBLEMS, PROBLEMS]
    assert json.loads(sources["manifest"].iloc[0])["name"] == "lora_sweep"
    assert sources["recipe"].iloc[1] == (damaged / "recipe.yaml").read_text()
    assert (sources["ended"] >= sources["started"]).all()


def test_a_run_knows_when_it_ran_and_the_running_one_has_not_ended(sweep_dir: Path) -> None:
    runs = load([sweep_dir]).runs.set_index("number")
    history = json.loads((sweep_dir / "trials" / "0004" / "manifest.json").read_text())[
        "status_history"
    ]
    assert runs.loc[4, "started"] == pd.Timestamp(history[1]["time"]).timestamp()
    assert runs.loc[4, "ended"] == pd.Timestamp(history[-1]["time"]).timestamp()
    assert runs["ended"].isna().tolist() == [False] * 9 + [True, False, False]
    assert runs["command"].str.startswith("python -m harness.run ").all()


def test_a_packs_update_time_is_shared_by_its_members(damaged: Path) -> None:
    path = damaged / "trials" / "0001" / "metrics.jsonl"
    path.write_text(
        "".join(f'{{"step": {i}, "timing_s/update": 2.0, "perf/members": 4}}\n' for i in (1, 2))
    )
    runs = load([damaged]).runs.set_index("number")
    assert runs.loc[1, "update_seconds"] == 1.0
    assert runs["update_seconds"].isna().tolist() == [True, False, True]


def test_a_part_of_joint_tables_is_as_if_loaded_alone(sweep_dir: Path, damaged: Path) -> None:
    joint, alone = load([sweep_dir, damaged]), load([damaged])
    part = joint.of([alone.sources["directory"].iloc[0]])
    for name in ("runs", "steps", "samples", "sources"):
        pd.testing.assert_frame_equal(
            getattr(part, name), getattr(alone, name), check_dtype=False, check_like=True
        )
    again = Tables.joined([joint, alone])
    pd.testing.assert_frame_equal(again.runs, joint.runs)


def test_problems_are_those_logged_where_they_are(damaged: Path) -> None:
    for file in damaged.glob("trials/*/metrics.jsonl"):
        file.write_text(
            file.read_text().replace(
                '"eval/mean_length"', '"eval/num_problems": 500, "eval/mean_length"'
            )
        )
    tables = load([damaged])
    assert tables.sources["problems"].tolist() == [500]
    assert tables.runs["problems"].tolist() == [500] * 3
    one = damaged / "trials" / "0001" / "metrics.jsonl"
    one.write_text(one.read_text().replace("500", "400"))
    assert load([damaged]).sources["problems"].isna().all(), (
        "runs that were asked different problems have no one number"
    )


def test_other_peoples_parquet_files_are_no_tables(sweep_dir: Path, tmp_path: Path) -> None:
    load([sweep_dir]).write(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(UserError, match=r"lacks columns(.|\n)*runs\.parquet: no directory"):
        Tables.read(tmp_path)


def test_a_table_whose_texts_are_damaged_is_refused(sweep_dir: Path, tmp_path: Path) -> None:
    load([sweep_dir]).write(tmp_path)
    sources = pd.read_parquet(tmp_path / "sources.parquet")
    sources.assign(manifest="{").to_parquet(tmp_path / "sources.parquet")
    with pytest.raises(UserError, match=r"a table is damaged(.|\n)*sources\.parquet"):
        Tables.read(tmp_path)


def on_inputs(sweep_dir: Path, *inputs: list[int]) -> None:
    """Have the first trials' manifests say which inputs they were trained on, and the sweep's that
    they changed.
    """
    for number, own in enumerate(inputs):
        rewrite_manifest(sweep_dir / "trials" / f"{number:04d}", inputs=own)
    entry = {
        "time": "2026-01-01T00:00:00Z",
        "command": [],
        "different": ["data x: one -> two"],
        "inputs": {"step": 20},
    }
    rewrite_manifest(sweep_dir, inputs=[1, 2], resumed=[entry])


def test_only_runs_on_the_newest_inputs_have_a_score(sweep_dir: Path, tmp_path: Path) -> None:
    """Configuration 2, the best of all, and the runs that were pruned and failed were on the first
    inputs.
    """
    changed = Path(shutil.copytree(sweep_dir, tmp_path / "changed"))
    on_inputs(changed, [2], [2], [2], [2], [1], [1], [1, 2], [2], [2], [2], [1], [1])
    tables = load([changed])
    runs = tables.runs.set_index("number")
    apart = [4, 5, 6, 10, 11]
    assert runs.index[runs["status"] == OTHER_INPUTS].tolist() == apart
    assert runs.loc[apart, ["score", "base", "last"]].isna().all(axis=None)
    assert runs.loc[[0, 1, 2, 3, 7, 8], "score"].notna().all()
    assert not runs.loc[apart, "diverged"].any()
    assert runs.loc[9, "status"] == "RUNNING"
    assert runs.loc[4, "reason"] == "complete with eval/accuracy 0.9199 on inputs 1"
    assert str(runs.loc[10, "reason"]).startswith("failed on inputs 1: 3 non-finite")
    assert runs.loc[6, "inputs"] == "1 then 2"
    steps = tables.steps.set_index("number")
    assert set(steps.loc[[4, 6], "status"]) == {OTHER_INPUTS}
    assert load_trials(changed).set_index("number").loc[4, "inputs"] == "1"
    assert {"inputs"} <= set(pd.read_csv(io.StringIO(tables.runs.to_csv())).columns)


@pytest.mark.parametrize(
    ("inputs", "compared"),
    [
        ([[1], [1], [2]], "2"),
        ([[1], [1, 2], [2]], "2"),
        ([[1, 2], [1], [1]], "1 then 2"),  # nothing but a run that went on has ended on the newest
        ([[1], [1], [1]], None),
    ],
)
def test_which_inputs_are_compared(
    damaged: Path, inputs: list[list[int]], compared: str | None
) -> None:
    on_inputs(damaged, *inputs)
    runs = load([damaged]).runs
    kept = runs[runs["status"] == "COMPLETE"]
    assert set(kept["inputs"]) == ({compared} if compared else {"1"})
    assert kept["score"].notna().all()


def test_former_inputs_are_compared_while_no_configuration_is_whole_on_the_newest(
    tmp_path: Path,
) -> None:
    trials = [
        Trial(i // 2, i % 2, params(8, 10.0 ** -(3 + i // 2)), 0.5 + i / 10) for i in range(4)
    ]
    sweep = write_sweep(tmp_path, Sweep(trials))
    on_inputs(sweep, [1], [1], [2], [1])
    runs = load([sweep]).runs
    assert runs["score"].notna().tolist() == [True, True, False, True]
    on_inputs(sweep, [1], [1], [2], [2])
    assert load([sweep]).runs["score"].notna().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("table", "column", "value", "allowed"),
    [
        ("runs", "score", 7.5, "0 to 1"),
        ("runs", "score", "high", "a finite number"),
        ("runs", "base", math.inf, "a finite number"),
        ("runs", "number", 1.5, "a whole number"),
        ("runs", "confirm", "no", "true or false"),
        ("runs", "status", "DONE", "one of CREATED"),
        ("runs", "metric", "eval/acuracy", "a metric"),
        ("runs", RANK, "high", "a whole number"),
        ("runs", LR, True, "a finite number"),
        ("runs", TARGETS, True, "a number or text"),
        ("runs", "run_dir", None, "text"),
        ("steps", METRIC, -3.0, "0 to 1"),
        ("steps", METRIC, True, "a finite number"),
        ("steps", METRIC, "high", "a finite number"),
        ("steps", "step", None, "a whole number"),
        ("samples", "reward", "high", "a finite number"),
        ("sources", "seeds", "[0, 1.5]", "a list of whole numbers"),
        ("sources", "manifest", "3", "a manifest"),
        ("sources", "manifest", '{"git": "abc"}', "a manifest"),
        ("sources", "manifest", "[" * 100_000, "a manifest"),
        ("sources", "kind", "trial", "sweep or run"),
    ],
)
def test_a_table_with_a_wrong_value_is_refused_with_its_place(
    sound: Path, tmp_path: Path, table: str, column: str, value: object, allowed: str
) -> None:
    load([sound]).write(tmp_path)
    file = tmp_path / f"{table}.parquet"
    found = pd.read_parquet(file)
    # A parquet file holds one type a column: a value of another takes the column with it.
    kept = (
        []
        if isinstance(value, str | bool) or value is None
        else found[column].astype(float).tolist()[1:]
    )
    found[column] = pd.Series([value, *kept] if kept else [value] * len(found))
    found.to_parquet(file)
    with pytest.raises(UserError) as caught:
        Tables.read(tmp_path)
    assert f"{file}, row 1, column {column}: " in str(caught.value)
    assert f"allowed: {allowed}" in str(caught.value)


def test_a_score_is_what_its_rewards_allow(sound: Path, tmp_path: Path) -> None:
    """A user's own environment may reward with any number; so may one that the data name."""
    tables = load([sound])
    for name, change in (("recipe", {}), ("reward", {"reward": 10.0})):
        runs = tables.runs.assign(score=7.5)
        recipe = tables.sources["recipe"].str.replace("env_class: gsm8k", "env_class: my.env")
        sources = tables.sources.assign(recipe=recipe) if name == "recipe" else tables.sources
        Tables(runs, tables.steps, tables.samples.assign(**change), sources).write(tmp_path / name)
        assert (Tables.read(tmp_path / name).runs["score"] == 7.5).all()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("7.5", "line 11 of metrics.jsonl: eval/accuracy is 7.5, allowed: 0 to 1"),
        (
            "true",
            "line 11 of metrics.jsonl is damaged: eval/accuracy is true, allowed: a number or null",
        ),
        (
            '"high"',
            (
                'line 11 of metrics.jsonl is damaged: eval/accuracy is "high", allowed: a '
                "number or null"
            ),
        ),
    ],
)
def test_a_logged_value_that_cannot_be_is_named(damaged: Path, value: str, why: str) -> None:
    file = damaged / "trials" / "0001" / "metrics.jsonl"
    *lines, last = file.read_text().splitlines()
    row = json.dumps({**json.loads(last), METRIC: "HERE"}).replace('"HERE"', value)
    file.write_text("\n".join([*lines, row]) + "\n")
    found = load([damaged]).runs.set_index("number").loc[1]
    assert why in found["reason"]
    assert pd.isna(found["last"])
    assert found["score"] == pytest.approx(0.6, abs=1e-3)  # the result that its manifest records


@pytest.mark.parametrize(
    ("value", "why"), [(7.5, "is 7.5, allowed: 0 to 1"), (True, "is True"), ("high", "is 'high'")]
)
def test_a_result_that_cannot_be_is_named(damaged: Path, value: object, why: str) -> None:
    rewrite_manifest(
        damaged / "trials" / "0001", result={"metrics": {METRIC: value}, "base": {}, "seconds": 1.0}
    )
    row = load([damaged]).runs.iloc[-1]
    assert row["status"] == UNREADABLE
    assert f"manifest: result.metrics.{METRIC} {why}" in row["reason"]
