"""Test a running Ray cluster with two raylets on this machine, which Ray sees as two nodes.

`test_keys_nodes.py` runs this file in a separate process: Ray reads its settings when it is
imported, and would read those of other tests.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from rltrain.distributed.cluster import QUIET, gpus_of, this_machine
from rltrain.worker_group import train_run

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]
ONE_CPU = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a cluster of one node."""
    for name, value in (QUIET | this_machine()).items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="noregret-", dir="/tmp"))  # a socket's path must be short
    # The cluster's address is recorded here, not in /tmp/ray.
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    (folder / "ray").mkdir()
    head = {
        **ONE_CPU,
        "include_dashboard": False,
        "temp_dir": str(folder / "ray"),
        "node_ip_address": "127.0.0.1",
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_train_like_one_process(
    ray_cluster: Any, small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    keys = [
        "generator.backend=vllm",
        "trainer.max_steps=1",
        "trainer.eval_before_train=false",
        "trainer.policy_mini_batch_size=4",
    ]
    alone = small_recipe(*keys)
    one = new_run(alone, "one")
    assert list(train_run(alone, one))
    two_nodes = ["trainer.placement.policy_num_nodes=2", "generator.num_inference_engines=2"]
    recipe = small_recipe(*keys, *two_nodes, f"ray.address={ray_cluster.address}")
    with pytest.raises(UserError, match=r"(?s)no room.*2 CPUs and 0 GPUs in 2 bundles.*on 1 nodes"):
        list(train_run(recipe, new_run(recipe, "too many")))
    ray_cluster.add_node(**ONE_CPU)
    two = new_run(recipe, "two")
    assert list(train_run(recipe, two))
    assert two.status is Status.COMPLETE
    (first,), (second,) = (MetricsFile(each.metrics).rows() for each in (one, two))
    for name in ("reward", "loss", "entropy", "grad_norm", "eval/accuracy"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name


def test_a_cluster_reports_the_number_of_gpus(ray_cluster: Any) -> None:
    for count in (2, 4):
        ray_cluster.add_node(**ONE_CPU | {"num_gpus": count})
    for _ in range(2):  # also a second time in the same process
        gpus = gpus_of(ray_cluster.address)
        assert sorted(gpus.per_machine) == [0, 2, 4]
        assert gpus.memory is None  # nvidia-smi knows nothing of GPUs that do not exist
