"""Watch a real run and a real sweep on several processes.

Tests check where they listen, what they write to disk, and what they print.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pyarrow.parquet as pq
import pytest

from harness.core.paths import PROJECT
from harness.records.run_dir import RunDir, Status
from tests.integration.conftest import small_data as small_data

pytestmark = pytest.mark.timeout(600)

SECRETS = {
    "WANDB_API_KEY": "5ec4e7a0" * 5,
    "HF_TOKEN": "hf_CanaryOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "CanaryOfTheCloud/+secret",
    "GITHUB_TOKEN": "ghp_CanaryOfTheForge",
    "OPENAI_API_KEY": "sk-CanaryOfTheModel",
    "MY_PASSWORD": "CanaryOfTheUser",
}
KINDS = {
    ".yaml",
    ".json",
    ".jsonl",
    ".parquet",
    ".safetensors",
    ".txt",
    ".log",
    ".journal",
    ".lock",
    ".html",
    ".md",
    ".png",
    ".csv",
    ".wandb",
}
NAMES = {"SHA256SUMS", "COMPLETE", ".lock", "run_id"}
PICKLES, ARCHIVES = (
    (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    (b"PK\x03\x04", b"\x1f\x8b"),
)


@dataclass
class Watched:
    """Output, listening addresses and command lines of a command's processes."""

    folder: Path
    output: str = ""
    addresses: set[str] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)


def network_prefix(folder: Path) -> list[str]:
    """Return a command prefix that maps this machine's name to a real network device.

    The result is [] where that is impossible. On many machines the name maps to the loopback
    device, which hides processes that listen on the name's address.
    """
    devices = [
        (entry.address, name)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    address = next(
        (address for address, name in devices if not ipaddress.ip_address(address).is_loopback),
        None,
    )
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{address} {os.uname().nodename}\n")
    start = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec "$@"',
        "-",
    ]
    if address is None or shutil.which("unshare") is None:
        return []
    return start if subprocess.run([*start, "true"], capture_output=True).returncode == 0 else []


def watch(folder: Path, *arguments: str) -> Watched:
    """Run a command of the harness with secrets in its environment and a separate home folder."""
    home = folder / "home"
    home.mkdir()
    keys = ("WANDB_", "RAY_", "GLOO_", "NCCL_", "VLLM_HOST")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(keys)}
    environment |= {**SECRETS, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    watched, log = Watched(folder), folder / "output"
    with log.open("w") as out:
        command = [
            *network_prefix(folder),
            sys.executable,
            "-m",
            *arguments,
            f"trainer.ckpt_path={folder}",
        ]
        process = psutil.Popen(
            command, cwd=PROJECT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            for each in process_tree(process):
                try:
                    watched.commands.add(" ".join(each.cmdline()))
                    listening = [
                        c for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN
                    ]
                except psutil.Error:
                    continue
                watched.addresses |= {connection.laddr.ip for connection in listening}
            time.sleep(0.05)
    watched.output = log.read_text()
    assert process.returncode == 0, watched.output
    return watched


def process_tree(process: psutil.Process) -> Iterator[psutil.Process]:
    """Yield a process and all its descendants."""
    yield process
    try:
        yield from process.children(recursive=True)
    except psutil.Error:
        return


@pytest.fixture(scope="module")
def small_overrides(small_data: list[str]) -> list[str]:
    """Return overrides for one step of a small run with a real engine and every logger."""
    return [
        *small_data,
        "generator.backend=vllm",
        "trainer.max_steps=1",
        "trainer.num_threads=1",
        "trainer.logger=[console,wandb,tensorboard]",
    ]


@pytest.fixture(scope="module")
def sweep(small_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Run a sweep of one trial, on two ranks and a separate engine that is split in two."""
    placement = [
        "trainer.placement.policy_num_gpus_per_node=2",
        "trainer.placement.colocate_all=false",
        "generator.inference_engine_tensor_parallel_size=2",
        "sweep.max_concurrent=1",
    ]
    ours = ["sweep.num_trials=1", "sweep.seeds=[0]", "trainer.run_name=sweep"]
    return watch(
        tmp_path_factory.mktemp("sweep"),
        "harness.sweep",
        "quickstart",
        *small_overrides,
        *placement,
        *ours,
    )


@pytest.fixture(scope="module")
def run(small_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Run a run in one process."""
    return watch(
        tmp_path_factory.mktemp("run"),
        "harness.run",
        "quickstart",
        *small_overrides,
        "trainer.run_name=run",
    )


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) for name in ("sweep", "run")])
def watched(request: pytest.FixtureRequest) -> Watched:
    """Return the sweep and the run, one after the other."""
    command: Watched = request.getfixturevalue(request.param)
    return command


@pytest.mark.claim("Everything listens on the loopback device")
def test_processes_listen_only_on_the_loopback_device(watched: Watched) -> None:
    assert "127.0.0.1" in watched.addresses
    for address in watched.addresses:
        ip = ipaddress.ip_address(address)
        assert (getattr(ip, "ipv4_mapped", None) or ip).is_loopback, sorted(watched.addresses)


def content(file: Path) -> bytes:
    """Return a file's bytes, and those of its columns where they are compressed."""
    data = file.read_bytes()
    return (
        data + str(pq.read_table(file).to_pylist()).encode() if file.suffix == ".parquet" else data
    )


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


@pytest.mark.claim("Keys and tokens of the environment are written nowhere")
def test_no_secret_of_the_environment_is_printed_or_stored(watched: Watched) -> None:
    written = files(watched.folder)
    assert {"manifest.json", "recipe.yaml", "metrics.jsonl"} <= {file.name for file in written}
    assert any(file.suffix == ".wandb" for file in written)
    assert any("tfevents" in file.name for file in written)
    for name, secret in SECRETS.items():
        assert secret not in watched.output, name
        assert not [line for line in watched.commands if secret in line], name
        assert not [file for file in written if secret.encode() in content(file)], name


@pytest.mark.slow
def test_a_secret_would_be_found(sweep: Watched) -> None:
    sample = next(file for file in files(sweep.folder) if file.parent.name == "samples")
    question = pq.read_table(sample).to_pylist()[0]["question"].encode()
    assert {".parquet", ".html"} <= {
        file.suffix for file in files(sweep.folder) if question in content(file)
    }
    assert any(
        b"trainer" in content(file) for file in files(sweep.folder) if file.suffix == ".wandb"
    )
    assert any("default_worker.py" in line for line in sweep.commands)


@pytest.mark.claim("A run directory holds data and no code")
def test_a_run_directory_holds_data_and_no_code(watched: Watched) -> None:
    name = next(name for name in ("sweep", "run") if (watched.folder / name).is_dir())
    for file in files(watched.folder / name):
        # W&B keeps copies of the adapter's files under generated names, for its sync.
        known = (
            file.suffix in KINDS
            or file.name in NAMES
            or "tfevents" in file.name
            or file.parent.name == "staging"
        )
        assert known, file
        assert not file.read_bytes().startswith(PICKLES + ARCHIVES), file
        assert not file.stat().st_mode & 0o133, file


@pytest.mark.slow
@pytest.mark.claim("Ray is closed to other users of the machine")
def test_ray_leaves_neither_its_folder_nor_its_token(sweep: Watched, run: Watched) -> None:
    from rltrain.distributed import cluster

    assert cluster.PREFIX not in " ".join(run.commands)  # one process needs no Ray
    command_lines = " ".join(sweep.commands)
    assert cluster.PREFIX in command_lines
    assert not [folder for folder in cluster.folders() if folder.name in command_lines]
    assert not [
        line
        for line in (*sweep.commands, *run.commands)
        if "auth" in line.lower() and "token" in line.lower()
    ]


@pytest.mark.slow
def test_the_sweep_and_the_run_are_complete(sweep: Watched, run: Watched) -> None:
    assert RunDir(sweep.folder / "sweep").status is Status.COMPLETE
    assert (sweep.folder / "sweep" / "report" / "index.html").is_file()
    assert RunDir(run.folder / "run").status is Status.COMPLETE
    assert (
        len([line for line in sweep.commands if "default_worker.py" in line or "ray::" in line])
        >= 4
    )


@pytest.mark.claim("Ray is closed to other users of the machine")
def test_only_the_owner_can_read_rays_folder() -> None:
    from rltrain.distributed import cluster

    with cluster._own_folder() as ours:
        assert ours.stat().st_mode & 0o777 == 0o700
        (link := ours / f"{cluster.PREFIX}12345678").symlink_to("/etc")
        assert not cluster._is_ours(link)


SERVE = """
import sys
from pathlib import Path
from rltrain.distributed.cluster import cluster
with cluster(cpus=1, gpus=0, threads=1, address=None):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""
JOIN = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: "ran").remote(), timeout=60))
"""


@pytest.mark.slow
@pytest.mark.claim("Ray is closed to other users of the machine")
def test_ray_requires_its_token() -> None:
    from rltrain.distributed import cluster

    token, other = ("0123456789abcdef" * 4, "fedcba9876543210" * 4)
    bare = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    serve = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=PROJECT,
        env=bare | {"RAY_AUTH_TOKEN": token},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert serve.stdout is not None
    address = serve.stdout.readline().strip()
    try:
        answers = {}
        for candidate in (token, other):
            join = subprocess.run(
                [sys.executable, "-c", JOIN, address],
                cwd=PROJECT,
                capture_output=True,
                text=True,
                timeout=180,
                env={
                    **bare,
                    **cluster.LOOPBACK,
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": candidate,
                },
            )
            answers[candidate] = join.stdout.strip() if join.returncode == 0 else "refused"
    finally:
        serve.communicate()
    assert answers == {token: "ran", other: "refused"}
