"""What is refused before anything heavy starts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness import recipe as recipes
from harness.errors import UserError
from rltrain import parallel
from rltrain.preflight import check_run
from tests.recipes import quickstart

PPO = ["trainer.algorithm.advantage_estimator=gae"]


def test_the_quickstart_passes(tiny_model_dir: Path) -> None:
    check_run(quickstart())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.policy.model.path=./nowhere"], "names no folder"),
        (["trainer.policy.model.path=recipes"], "no config.json"),
        (["data.train_data=[]"], "at least one file"),
        (["data.val_data=[nowhere.parquet]"], "nowhere.parquet"),
        (["environment.env_class=gsm9k"], "gsm8k"),
        (["trainer.resume_mode=from_path"], "names no whole checkpoint"),
        (["trainer.train_batch_size=100000", "trainer.policy_mini_batch_size=100000"], "fewer problems than one batch"),
        (["trainer.target_modules=[q_proj,lm_head]"], "vLLM serves no adapter"),
        (["trainer.placement.policy_num_nodes=2", "generator.num_inference_engines=2"], "2 asked, 1 there"),
        ([*PPO, "trainer.critic.model.path=./nowhere"], "trainer.critic.model.path names no folder"),
        ([*PPO, "trainer.critic.model.lora.target_modules=[q_proj,lm_head]"], "value head in the place of lm_head"),
        (["generator.max_input_length=200"], "<= 256 together"),
    ],
)
def test_bad_input_is_explained(tiny_model_dir: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_run(quickstart(overrides))
    assert told in str(caught.value)


RANKS = ["trainer.placement.policy_num_gpus_per_node=4"]


def test_missing_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "visible_gpus", lambda: 1)
    with pytest.raises(UserError, match=r"4 asked \(4 ranks\), 1 there"):
        check_run(recipes.load("gsm8k_lora", [*RANKS, "generator.num_inference_engines=4"]))


def test_engines_apart_need_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "visible_gpus", lambda: 7)
    apart = ["trainer.placement.colocate_all=false", "generator.inference_engine_tensor_parallel_size=2"]
    with pytest.raises(UserError, match=r"8 asked \(4 ranks \+ 2 engines x 2\), 7 there"):
        check_run(recipes.load("gsm8k_lora", [*RANKS, *apart, "generator.num_inference_engines=2"]))


def test_missing_columns_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    pd.DataFrame({"question": ["1 + 1?"]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="prompt"):
        check_run(quickstart([f"data.train_data=[{tmp_path}/bad.parquet]"]))
