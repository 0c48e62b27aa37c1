"""Ray for one run or sweep: quiet, on loopback, with a short-lived directory; or a running cluster."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from harness.errors import UserError
from harness.paths import INSTALLED, PROJECT
from rltrain.fit import Gpus, visible_memory

# Ray and Tune read these when they are imported: nothing of Ray is imported before `cluster` has set them.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Messages about dead workers come past `log_to_driver`; the trial's reason says it.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
}
# Ray's way to say "no cluster of several machines": it then listens on the loopback device alone.
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Workers are to be as quick as a run of their own: Ray would make them yield to everything else.
    "RAY_worker_niceness": "0",
}
# Every user of the machine reaches its loopback device, and who reaches Ray runs code as its owner: hence a token, one
# for this process and its children.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)}
LOOPBACK_ADDRESS = "127.0.0.1"
STARTS = 3
ASK_SECONDS = 60
OBJECT_STORE_BYTES = 100 * 2**20
# For what engines in processes of their own are sent: whole models in parts of some 500 MiB.
LARGE_STORE_BYTES = 2 * 2**30
# A socket's path has at most 107 bytes, of which Ray's own part takes about 70.
LONGEST_ROOT = 30


@contextlib.contextmanager
def cluster(
    owner: Path,
    *,
    cpus: float,
    gpus: float,
    threads: int,
    address: str | None,
    scratch: str = "scratch",
    store: int = OBJECT_STORE_BYTES,
) -> Iterator[Path]:
    """Ray is up inside, with room for so many CPUs and GPUs; yields a folder. Nothing of either is left afterwards.

    `owner` is the directory of the run or sweep that it is for, `threads` those of each process, `address` that of a
    running cluster, None for this machine alone, `store` the bytes for objects. The caller holds the owner's lock.
    """
    os.environ.update(QUIET if address else QUIET | this_machine())
    if not address:
        keep_to_loopback()
    root = _scratch(owner)
    _clear(root)
    _make_private(root)
    (root / scratch).mkdir()
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    options = {
        "log_to_driver": False,
        "configure_logging": False,
        "runtime_env": {"env_vars": worker_environment(threads)},
    }
    try:
        _start(options | ({"address": address} if address else _alone(root, cpus, gpus, store)))
        yield root / scratch
    finally:
        ray.shutdown()
        shutil.rmtree(root, ignore_errors=True)


def gpus_of(address: str, owner: Path) -> Gpus:
    """The GPUs of a running cluster's machines, and the memory of one of them where it can be asked.

    `owner` is the directory of the sweep that asks. Raises UserError where no cluster answers.
    """
    try:
        # A folder of this process's own: the sweep may be running, and nothing of that is to be cleared away.
        with cluster(owner / f"asking-{os.getpid()}", cpus=0, gpus=0, threads=1, address=address):
            import ray

            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            counts = tuple(int(machine.get("GPU", 0)) for machine in machines)
            sizes = _memory_of_a_gpu() if any(counts) else []
    except ConnectionError as error:
        raise UserError(
            "no Ray cluster answers", got=f"{address}: {error}", fix="start it, or ray.address=null"
        ) from None
    return Gpus(counts, min(sizes) if sizes else None)


def _memory_of_a_gpu() -> list[int]:
    """Bytes of a GPU of the cluster; [] where none is free or its machine does not say."""
    import ray

    task = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(visible_memory).remote()
    try:
        sizes: list[int] = ray.get(task, timeout=ASK_SECONDS)
    except ray.exceptions.RayError:
        ray.cancel(task, force=True)
        return []
    return sizes


def this_machine() -> dict[str, str]:
    """Ray's settings for a cluster of this machine alone, which only this process's children can use."""
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != TOKEN["RAY_AUTH_MODE"]:
        # Imported already (vLLM does), Ray would go without a token here and ask for one there.
        return LOOPBACK | {"RAY_AUTH_MODE": "disabled"}
    return LOOPBACK | TOKEN


def keep_to_loopback() -> None:
    """Have gloo, NCCL and vLLM listen on the loopback device alone, where the environment does not name another.

    By themselves they listen on the device that the machine's name or its route to the network leads to.
    """
    devices = psutil.net_if_addrs().items()
    device = next((name for name, own in devices if any(one.address == LOOPBACK_ADDRESS for one in own)), "lo")
    for name, value in {
        "GLOO_SOCKET_IFNAME": device, "NCCL_SOCKET_IFNAME": device, "VLLM_HOST_IP": LOOPBACK_ADDRESS,
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)


def _clear(root: Path) -> None:
    """End and remove what a killed process left of this owner; its lock is held, so nothing else uses it.

    Most of Ray dies with the process that started it, but its agents linger for minutes.
    """
    # Of macOS's /tmp, a link, open files have the real path.
    real = root.resolve()
    old = [process for process in psutil.process_iter() if root.exists() and _writes_under(process, real)]
    for process in old:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(old, timeout=10)
    shutil.rmtree(root, ignore_errors=True)


def _make_private(root: Path) -> None:
    """Make a folder that no other user can enter; raises UserError where one has put something in its place."""
    try:
        root.mkdir(mode=0o700)
    except OSError as error:
        raise UserError("cannot make Ray's folder", got=f"{root}: {error.strerror}",
                        fix="remove what is there, or set TMPDIR") from None  # fmt: skip


def _writes_under(process: psutil.Process, root: Path) -> bool:
    try:
        return any(Path(file.path).is_relative_to(root) for file in process.open_files())
    except psutil.Error:
        return False


def _start(options: dict[str, object]) -> None:
    """Start Ray; on a machine so busy that its half minute for that runs out, again."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


def _alone(root: Path, cpus: float, gpus: float, store: int) -> dict[str, object]:
    return {
        "num_cpus": math.ceil(cpus),
        "num_gpus": math.ceil(gpus),
        "include_dashboard": False,
        "_temp_dir": str(root / "ray"),
        "object_store_memory": store,
    }


def worker_environment(threads: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of Ray's processes: threads as the recipe says, the project importable, and `more`."""
    # site-packages before Python's own library would let packages replace modules of it.
    project = [] if INSTALLED else [str(PROJECT)]
    path = [*project, str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **QUIET,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path),
        **(more or {}),
    }


def _scratch(owner: Path) -> Path:
    """A short path of this owner's own, the same each time, so that a resumed sweep clears what a killed one left."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > LONGEST_ROOT:
        root = Path("/tmp")
    own = hashlib.sha256(str(owner).encode()).hexdigest()[:10]
    return root / f"noregret-{os.getuid()}-{own}"
