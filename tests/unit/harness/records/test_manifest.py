"""Provenance: the manifest holds what a stranger needs to redo a run, nothing secret, and what
differs is named.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core import machine
from harness.core.errors import UserError
from harness.records import manifest
from harness.records.run_dir import RunDir
from tests.recipes import quickstart


def build(recipe: Recipe) -> dict[str, Any]:
    record = manifest.build(recipe, kind="run", name="run", source="quickstart")
    return dict(json.loads(json.dumps(record)))


@pytest.fixture
def record() -> dict[str, Any]:
    return build(quickstart())


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("data"))
    return folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A git checkout of a project with one file, in the place of this one."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "step.py").write_text("lr = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git(project, *command)
    monkeypatch.setattr(machine, "PROJECT", project)
    machine.git_state.cache_clear()
    yield project
    machine.git_state.cache_clear()


def git(project: Path, *arguments: str, text: str | None = None) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    done = subprocess.run(
        ["git", "-C", str(project), *who, *arguments], input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [str(difference) for difference in manifest.compare(one, other).different]


def test_a_clean_checkout_has_a_commit_and_no_diff(checkout: Path) -> None:
    assert machine.git_state() == {
        "commit": git(checkout, "rev-parse", "HEAD"),
        "dirty": False,
        "diff": None,
    }


@pytest.mark.claim("The command line and the changes to the code are recorded")
def test_the_diff_makes_of_the_commit_the_code_that_ran(checkout: Path) -> None:
    changed, binary = b"lr = 2\n# \xc3\xa9\n", bytes(range(256))
    (checkout / "step.py").write_bytes(changed)
    (checkout / "weights.bin").write_bytes(binary)
    git(checkout, "add", "weights.bin")
    (checkout / "token.txt").write_text("hunter2")  # untracked
    git(checkout, "config", "diff.noprefix", "true")
    state = machine.git_state()
    assert state is not None
    assert state["dirty"]
    assert "hunter2" not in json.dumps(state)
    git(checkout, "config", "--unset", "diff.noprefix")
    git(checkout, "reset", "-q", "--hard")
    git(checkout, "apply", text=state["diff"]["text"])
    assert (checkout / "step.py").read_bytes() == changed
    assert (checkout / "weights.bin").read_bytes() == binary


@pytest.mark.parametrize(
    "content", [b"x = 1\n" * machine.LONGEST_DIFF, b"x = '\xff'\n"], ids=["long", "not UTF-8"]
)
def test_a_diff_that_cannot_be_kept_is_known_by_its_digest(checkout: Path, content: bytes) -> None:
    (checkout / "step.py").write_bytes(content)
    state = machine.git_state()
    assert state is not None
    assert state["diff"]["text"] is None
    assert state["diff"]["bytes"] >= len(content)
    machine.git_state.cache_clear()
    (checkout / "step.py").write_bytes(content + b"y = 2\n")
    other = machine.git_state()
    assert other is not None
    assert other["diff"]["digest"] != state["diff"]["digest"]


def test_anothers_checkout_is_not_taken_for_ours(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(machine, "PROJECT", installed)
    assert machine.git_state() is None


def test_every_installed_package_is_named_those_of_the_project_apart() -> None:
    required, others = machine.packages()
    assert {"torch", "transformers", "peft", "hydra-core", "numpy"} <= required.keys()
    assert {"sympy", "tqdm", "pytest"} <= others.keys()
    assert not {"noregret"} & (required.keys() | others.keys())
    versions = required | others
    assert len(versions) == len(required) + len(others)
    assert all(metadata.version(name) == version for name, version in versions.items())


def test_a_package_that_an_older_manifest_did_not_record_is_no_difference(
    record: dict[str, Any],
) -> None:
    old = json.loads(json.dumps(record))
    del old["dependencies"]["pytest"]
    assert differences(old, record) == []


@pytest.mark.claim("Keys and tokens of the environment are written nowhere")
def test_secrets_of_the_environment_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex()  # not a word of this file, which may be in the record's diff
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    record = build(quickstart())
    assert record["thread_variables"]["OMP_NUM_THREADS"] == "3"
    assert secret not in json.dumps(record)


def test_hardware_is_this_machines(record: dict[str, Any]) -> None:
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["memory_gb"] > 0
    assert record["hardware"]["cpu"]
    assert isinstance(record["hardware"]["gpus"], list)
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_tokenizer_has_a_digest_of_its_own(model: Path, tmp_path: Path) -> None:
    def digests(name: str) -> tuple[str, str]:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        record = build(quickstart([f"trainer.policy.model.path={folder}"]))
        return record["model"]["digest"], record["tokenizer"]["digest"]

    first = digests("first")
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    second = digests("second")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    third = digests("third")
    assert first[1] == second[1] != third[1]
    assert len({first[0], second[0], third[0]}) == 3


def test_critic_checkpoint_and_environment_module_are_recorded(model: Path, tmp_path: Path) -> None:
    start = tmp_path / "step_000002"
    start.mkdir()
    (start / "state.json").write_text("{}")
    gae = "trainer.algorithm.advantage_estimator=gae"
    record = build(
        recipes.load(
            "quickstart",
            [
                gae,
                f"trainer.critic.model.path={model}",
                f"trainer.resume_mode={start}",
                "environment.env_class=rltrain.envs.math",
            ],
        )
    )
    assert record["critic"]["digest"].startswith("sha256:")
    assert record["checkpoint"]["digest"].startswith("sha256:")
    assert record["code"]["rltrain.envs.math"].startswith("sha256:")
    plain = build(quickstart())
    assert plain["critic"] is plain["checkpoint"] is None
    assert plain["code"].keys() == {"noregret"}
    assert machine.module_digest("no.such.module") is None


def test_a_hubs_model_is_named_by_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quickstart(["trainer.policy.model.path=owner/name"])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    unknown = build(recipe)
    assert unknown["model"] == {"path": "owner/name", "digest": None, "revision": None}
    assert {"model", "tokenizer"} <= set(manifest.compare(unknown, unknown).unrecorded)
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123")
    known = build(recipe)
    assert known["model"]["revision"] == "abc123"
    assert differences(known, known) == []
    (refs / "main").write_text("def456")
    assert differences(known, build(recipe)) == ["model owner/name: abc123 -> def456"]


def test_a_run_agrees_with_itself(record: dict[str, Any]) -> None:
    agreement = manifest.compare(record, record)
    assert agreement.different == []
    assert {"recipe", "code", "python", "hardware", "threads", "model", "tokenizer", "data"} <= set(
        agreement.equal
    )
    assert any(kind.endswith(" packages") for kind in agreement.equal)


def test_each_difference_is_named_with_both_values(record: dict[str, Any]) -> None:
    old = json.loads(json.dumps(record))
    old["packages"]["numpy"] = "0.0.1"
    old["dependencies"]["gone"] = "1.0"
    old["python"] = "3.10.0"
    old["hardware"]["gpus"] = ["NVIDIA H100", "NVIDIA H100"]
    old["git"] = {
        "commit": "a" * 40,
        "dirty": True,
        "diff": {"digest": "sha256:" + "b" * 64, "bytes": 3, "text": "x"},
    }
    old["threads"] = 64
    (data, digest) = next(iter(old["data"].items()))
    old["data"][data] = "sha256:" + "c" * 64
    record |= {"git": {"commit": "d" * 40, "dirty": False, "diff": None}}
    record["hardware"]["gpus"] = []
    assert differences(old, record) == [
        "commit: aaaaaaaaaaaa -> dddddddddddd",
        "uncommitted changes: sha256:bbbbbbbbbbbb -> absent",
        f"python: 3.10.0 -> {record['python']}",
        f"numpy: 0.0.1 -> {metadata.version('numpy')}",
        "gone: 1.0 -> absent",
        "gpus: NVIDIA H100, NVIDIA H100 -> absent",
        (
            "trainer.num_threads: 64 -> "
            f"{manifest.ABSENT if record['threads'] is None else record['threads']}"
        ),
        f"data {data}: sha256:cccccccccccc -> {digest[:19]}",
    ]


def test_threads_of_the_environment_count_where_the_recipe_has_no_number(
    record: dict[str, Any],
) -> None:
    for threads, found in ((2, []), (None, ["OMP_NUM_THREADS: 7 -> absent"])):
        old, new = (
            {**record, "threads": threads, "thread_variables": given}
            for given in ({"OMP_NUM_THREADS": "7"}, {})
        )
        assert differences(old, new) == found


@pytest.mark.parametrize("key", ["packages", "git", "hardware", "data", "model", "recipe", "code"])
@pytest.mark.parametrize("value", [None, "text", 3, ["list"]])
def test_a_manifest_without_something_or_with_nonsense_is_still_compared(
    record: dict[str, Any], key: str, value: object
) -> None:
    agreement = manifest.compare({**record, key: value}, record)
    assert not [difference for difference in agreement.different if difference.what == key]
    assert len(agreement.unrecorded) == (key != "packages")


def test_what_differs_when_a_run_goes_on_is_kept(record: dict[str, Any]) -> None:
    recipe = quickstart(["trainer.num_threads=5"])
    entry = manifest.resumption({**record, "python": "3.10.0"}, recipe)
    assert f"python: 3.10.0 -> {record['python']}" in entry["different"]
    assert f"trainer.num_threads: {record['threads'] or manifest.ABSENT} -> 5" in entry["different"]
    assert entry["command"][0] == "python"


def test_the_code_is_the_source_that_trains_untracked_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rltrain", "harness", "analysis"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(machine, "PROJECT", tmp_path)
    seen = []
    for name in ("rltrain/step.py", "harness/run.py", "analysis/page.py", "rltrain/notes.txt"):
        (tmp_path / name).write_text("x = 1\n")
        machine.code_digest.cache_clear()
        seen.append(machine.code_digest())
    machine.code_digest.cache_clear()
    assert len(set(seen[:2])) == 2
    assert set(seen[1:]) == {seen[1]}


@pytest.fixture
def own_inputs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose model, data and environment module lie in the test's folder: model/,
    data.jsonl, own/env.py.
    """
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "env.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return quickstart(
        [
            f"trainer.policy.model.path={model}",
            f"data.train_data=[{tmp_path}/data.jsonl]",
            f"data.val_data=[{tmp_path}/data.jsonl]",
            "environment.env_class=own.env",
        ]
    )


@pytest.mark.parametrize(
    ("file", "said"),
    [("data.jsonl", "data "), ("own/env.py", "code of own.env"), ("model/config.json", "model ")],
)
def test_inputs_that_changed_are_named(
    own_inputs: Recipe, tmp_path: Path, file: str, said: str
) -> None:
    record = build(own_inputs)
    assert manifest.changed_inputs(record) == []
    with (tmp_path / file).open("a") as stream:
        stream.write("\n")
    (change,) = manifest.changed_inputs(record)
    assert change.what.startswith(said)
    manifest.check_inputs([change], "run", allowed=True)
    with pytest.raises(
        UserError,
        match=r"the inputs of this run have changed since it began\n(.|\n)*--changed-inputs",
    ):
        manifest.check_inputs([change], "run", allowed=False)


def test_neither_code_nor_packages_are_inputs_nor_what_is_not_known(
    record: dict[str, Any], tmp_path: Path
) -> None:
    record["code"]["noregret"] = "sha256:other"
    record["packages"]["numpy"] = "0.0.1"
    record["model"] = {
        "path": "owner/name",
        "digest": None,
        "revision": "abc123",
    }  # not in this machine's cache
    assert manifest.changed_inputs(record) == []
    record["data"] = {f"{tmp_path}/gone.jsonl": "sha256:" + "a" * 64}
    assert [change.now for change in manifest.changed_inputs(record)] == [manifest.ABSENT]
    for key in ("model", "critic", "data", "code"):
        manifest.changed_inputs({**record, key: "text"})


@pytest.mark.parametrize("trained", [True, False])
def test_changed_inputs_are_recorded_with_the_step_they_came_at(
    own_inputs: Recipe, tmp_path: Path, trained: bool
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(recipes.to_yaml(own_inputs), build(own_inputs))
    if trained:
        (run_dir.checkpoints / "step_000012").mkdir(parents=True)
    was = run_dir.read_manifest()["data"]
    (tmp_path / "data.jsonl").write_text("{}\n{}\n")
    (change,) = manifest.accept_inputs(run_dir)
    record = run_dir.read_manifest()
    assert record["data"] == {name: manifest.digest_path(name) for name in was} != was
    assert manifest.versions(record) == (
        [1, 2] if trained else [2]
    )  # without a checkpoint it begins anew
    (entry,) = record["resumed"]
    assert entry["different"] == [change]
    assert (entry["inputs"]["step"], entry["inputs"]["was"]["data"]) == (12 if trained else 0, was)
    assert manifest.changed_inputs(record) == []


@pytest.mark.parametrize("nonsense", [None, 3, [], ["1"], [True], {}])
def test_a_manifest_without_versions_of_inputs_has_the_first(
    record: dict[str, Any], nonsense: object
) -> None:
    assert manifest.versions({**record, "inputs": nonsense}) == [1]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("one")
    first = manifest.digest_path(str(file))
    file.write_text("other")
    assert manifest.digest_path(str(file)) != first
