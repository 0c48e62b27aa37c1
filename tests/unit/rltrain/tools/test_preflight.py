"""What is refused before anything heavy starts."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from huggingface_hub import constants

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.distributed import placement as parallel
from rltrain.tools import preflight
from rltrain.tools.preflight import check_run
from tests.recipes import quickstart

PPO = ["trainer.algorithm.advantage_estimator=gae"]


def test_the_quickstart_passes(tiny_model_dir: Path) -> None:
    check_run(quickstart())


@pytest.mark.parametrize("named", ["models/m.gguf", "models"])
def test_a_gguf_file_in_place_of_a_model_folder(named: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"prepare model .*m\.gguf --output FOLDER"):
        check_run(quickstart([f"trainer.policy.model.path={tmp_path / named}"]))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.policy.model.path=./nowhere"], "names no folder"),
        (["trainer.policy.model.path=recipes"], "no config.json"),
        (["data.train_data=[]"], "at least one file"),
        (["data.val_data=[nowhere.parquet]"], "nowhere.parquet"),
        (["environment.env_class=gsm9k"], "gsm8k"),
        (["trainer.resume_mode=from_path"], "names no whole checkpoint"),
        (
            ["trainer.train_batch_size=100000", "trainer.policy_mini_batch_size=100000"],
            "fewer problems than one batch",
        ),
        (["trainer.target_modules=[q_proj,lm_head]"], "vLLM serves no adapter"),
        (
            ["trainer.placement.policy_num_nodes=2", "generator.num_inference_engines=2"],
            "2 asked, 1 there",
        ),
        (
            [*PPO, "trainer.critic.model.path=./nowhere"],
            "trainer.critic.model.path names no folder",
        ),
        (
            [*PPO, "trainer.critic.model.lora.target_modules=[q_proj,lm_head]"],
            "value head in place of lm_head",
        ),
        (["generator.max_input_length=200"], "<= 256 together"),
    ],
)
def test_bad_input_is_explained(tiny_model_dir: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_run(quickstart(overrides))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "gemma3", "vision_config": {}}, "images or sound as well as text"),
        ({"model_type": "gpt2", "n_positions": 64}, "<= 64 together"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "vLLM serves no adapters on this architecture",
        ),
    ],
)
def test_a_config_tells_what_cannot_work(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        check_run(quickstart([f"trainer.policy.model.path={tmp_path}"]))
    assert told in str(caught.value)


@pytest.mark.parametrize("targets", ["all-linear", "mlp", "experts", "attention"])
def test_vllm_serves_no_adapters_on_a_mixture_on_a_cpu(tmp_path: Path, targets: str) -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    overrides = [f"trainer.policy.model.path={tmp_path}", f"trainer.target_modules={targets}"]
    with pytest.raises(UserError, match=r"experts of a mixture(.*\n)+.*sync=merge"):
        check_run(quickstart(overrides))
    check_run(quickstart([*overrides, "trainer.policy.model.lora.sync=merge"]))
    check_run(quickstart([*overrides, "generator.backend=transformers"]))


RANKS = ["trainer.placement.policy_num_gpus_per_node=4"]


def test_missing_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "visible_gpus", lambda: 1)
    with pytest.raises(UserError, match=r"4 asked \(4 ranks\), 1 there"):
        check_run(recipes.load("gsm8k_lora", [*RANKS, "generator.num_inference_engines=4"]))


def test_engines_apart_need_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "visible_gpus", lambda: 7)
    apart = [
        "trainer.placement.colocate_all=false",
        "generator.inference_engine_tensor_parallel_size=2",
    ]
    with pytest.raises(UserError, match=r"8 asked \(4 ranks \+ 2 engines x 2\), 7 there"):
        check_run(recipes.load("gsm8k_lora", [*RANKS, *apart, "generator.num_inference_engines=2"]))


def test_missing_columns_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    pd.DataFrame({"question": ["1 + 1?"]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="prompt"):
        check_run(quickstart([f"data.train_data=[{tmp_path}/bad.parquet]"]))


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that knows nothing, on this machine."""

    class Unknown(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Unknown)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def hub_model(role: str = "policy") -> Recipe:
    ppo = PPO if role == "critic" else []
    return quickstart(
        [f"trainer.{role}.model.path=owner/model", "generator.backend=transformers", *ppo]
    )


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_hub_that_is_not_there_is_found_at_once(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, hub: str, role: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    check_run(hub_model(role))  # whatever it answers
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(preflight, "HUB_SECONDS", 0.05)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match="timed out"):
            check_run(hub_model(role))
    with pytest.raises(
        UserError, match=f"trainer.{role}.model.path is a hub's.*cannot be reached"
    ) as caught:
        check_run(hub_model(role))
    assert f"trainer.{role}.model.path=FOLDER" in str(caught.value)
    assert "HF_HUB_OFFLINE" not in str(caught.value)  # it is not in the cache
    check_run(recipes.with_values(hub_model(role), {"ray.address": "10.0.0.1:6379"}))


def test_a_model_in_the_hubs_cache_needs_no_hub(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    shutil.copytree(tiny_model_dir, snapshot, ignore=shutil.ignore_patterns("data"))
    (tmp_path / "models--owner--model" / "refs").mkdir()
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_run(hub_model())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check_run(hub_model())
    with pytest.raises(
        UserError, match=r"names no module of the model\n  got:     attn"
    ):  # by the cached files
        check_run(recipes.with_values(hub_model(), {"trainer.target_modules": "attn"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 takes the copy in the cache"):
        check_run(hub_model())
