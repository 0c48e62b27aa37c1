"""Ray for one run or sweep: quiet, on loopback and in a temporary folder, or a running cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import psutil  # type: ignore[import-untyped]

from harness.core.errors import MachineError, UserError
from harness.core.locks import KernelLock, held
from harness.core.paths import INSTALLED, PROJECT
from rltrain.distributed.gpus import Gpus, visible_memory

# Ray and Tune read these when they are imported, which is after `cluster` has set them.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Messages about dead workers ignore `log_to_driver`; a trial's reason reports them.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
}
# Without clusters of several machines Ray listens on the loopback device only.
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would lower the priority of its workers.
    "RAY_worker_niceness": "0",
}
# Every user of the machine can reach the loopback device and so run code as Ray's owner: only this
# process and its children have the token.
TOKEN = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
}
LOOPBACK_ADDRESS = "127.0.0.1"
STARTS = 3
ASK_SECONDS = 60
# Processes that Ray cannot run without, and how often they are checked.
RAY_PROCESSES = ("gcs_server", "raylet")
WATCH_SECONDS = 1.0
OBJECT_STORE_BYTES = 100 * 2**20
# For engines in processes of their own: they are sent whole models in parts of 512 MiB.
LARGE_STORE_BYTES = 2 * 2**30
# The lock in Ray's folder, held by the command that started Ray.
LOCK = ".lock"
# A socket's path has at most 107 bytes, and Ray's part of it about 70.
LONGEST_ROOT = 30
PREFIX = f"noregret-{os.getuid()}-"


@contextlib.contextmanager
def cluster(
    *,
    cpus: float,
    gpus: float,
    threads: int,
    address: str | None,
    scratch: str = "scratch",
    store: int = OBJECT_STORE_BYTES,
) -> Iterator[Path]:
    """Start Ray with this many CPUs and GPUs, or connect to a cluster; yield a scratch folder.

    `threads` are those of each process, `address` that of a running cluster (None: this machine
    alone), `store` the bytes for objects. Remains of killed commands are removed first, and Ray and
    its folder afterwards. Raises MachineError where Ray itself dies.
    """
    os.environ.update(QUIET if address else QUIET | this_machine())
    if not address:
        keep_to_loopback()
    clear_left_over()
    with _own_folder() as root:
        (root / scratch).mkdir()
        import ray

        logging.getLogger("ray").setLevel(logging.CRITICAL)
        options: dict[str, object] = {
            "log_to_driver": False,
            "configure_logging": False,
            "runtime_env": {"env_vars": worker_environment(threads)},
        }
        try:
            if address:
                options["address"] = address
            else:
                options |= {
                    "num_cpus": math.ceil(cpus),
                    "num_gpus": math.ceil(gpus),
                    "include_dashboard": False,
                    "_temp_dir": str(root / "ray"),
                    "object_store_memory": store,
                }
            _start(options)
            with _watched():
                yield root / scratch
        finally:
            ray.shutdown()


def gpus_of(address: str) -> Gpus:
    """Return the GPUs of a cluster's machines, and the memory of one of them if it is available.

    Raises UserError where no cluster answers.
    """
    try:
        with cluster(cpus=0, gpus=0, threads=1, address=address):
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
    """Return the bytes of one GPU of the cluster; empty where none is free or does not tell."""
    import ray

    task = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(visible_memory).remote()
    try:
        sizes: list[int] = ray.get(task, timeout=ASK_SECONDS)
    except ray.exceptions.RayError:
        ray.cancel(task, force=True)
        return []
    return sizes


def this_machine() -> dict[str, str]:
    """Return Ray's settings for a cluster on this machine that only child processes can use."""
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != TOKEN["RAY_AUTH_MODE"]:
        # vLLM has imported Ray without a token: only its workers would require one.
        return LOOPBACK | {"RAY_AUTH_MODE": "disabled"}
    return LOOPBACK | TOKEN


def keep_to_loopback() -> None:
    """Make gloo, NCCL and vLLM listen on the loopback device, unless the environment names another.

    Their default is the device of the machine's name or of its route to the network.
    """
    devices = psutil.net_if_addrs().items()
    names = (
        name
        for name, addresses in devices
        if any(address.address == LOOPBACK_ADDRESS for address in addresses)
    )
    device = next(names, "lo")
    for name, value in {
        "GLOO_SOCKET_IFNAME": device,
        "NCCL_SOCKET_IFNAME": device,
        "VLLM_HOST_IP": LOOPBACK_ADDRESS,
    }.items():
        os.environ.setdefault(name, value)


def folders() -> list[Path]:
    """Return the folders of this user's commands that run Ray, and of killed ones that did."""
    return [folder for folder in _temporary().glob(PREFIX + "?" * 8) if _is_ours(folder)]


def clear_left_over() -> None:
    """End processes and remove folders that killed commands of this user left.

    Most of Ray ends with the process that started it, but its agents linger for minutes.
    """
    for folder in folders():
        # The lock is held while its command runs.
        with contextlib.suppress(OSError), held(folder / LOCK) as free:
            if free:
                _clear(folder)


def _clear(root: Path) -> None:
    """Remove a folder, and end the processes that have files open there."""
    real = root.resolve()  # macOS's /tmp is a link, and open files have the real path
    users = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            inside = any(Path(file.path).is_relative_to(real) for file in process.open_files())
            # This process holds the lock.
            if inside and process.pid != os.getpid():
                users.append(process)
    for process in users:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(users, timeout=10)
    shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Yield a new private folder, locked while it is in use and removed afterwards."""
    try:
        root, lock = _new_folder()
    except OSError as error:
        raise UserError(
            "cannot make Ray's folder",
            got=f"{error.filename}: {error.strerror}",
            fix="set TMPDIR to a folder that can be written",
        ) from None
    try:
        yield root
    finally:
        _clear(root)
        lock.release()


def _new_folder() -> tuple[Path, KernelLock]:
    while True:
        root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_temporary()))
        lock = KernelLock(root / LOCK)
        # Before it is locked, another command may remove it.
        with contextlib.suppress(FileNotFoundError):
            if lock.acquire(0):
                if (root / LOCK).exists():
                    return root, lock
                lock.release()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Raise MachineError in the block, within seconds, when one of Ray's own processes dies.

    Ray itself reports nothing for a minute. Nothing is watched outside the main thread, nor for a
    cluster that was running before.
    """
    names = {
        process: process.name()
        for process in psutil.Process().children()
        if process.name() in RAY_PROCESSES
    }
    if not names or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> NoReturn:
        # While Ray waits, it swallows other exceptions of signal handlers.
        raise KeyboardInterrupt

    ended = threading.Event()

    def look() -> None:
        while not ended.wait(WATCH_SECONDS):
            if not all(_runs(process) for process in names):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                return

    before = signal.signal(signal.SIGUSR2, interrupt)
    watcher = threading.Thread(target=look, name="watch over Ray", daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        dead = ", ".join(name for process, name in names.items() if not _runs(process))
        if not dead:
            raise
        raise MachineError(
            "Ray has died",
            got=f"its process {dead} was ended, or crashed",
            fix="see whether memory ran out",
        ) from None
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, before)


def _runs(process: psutil.Process) -> bool:
    """Return whether a child process has not ended; a zombie has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _start(options: dict[str, object]) -> None:
    """Start Ray; retry on a machine so busy that Ray's 30 seconds run out."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


def worker_environment(threads: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of Ray's processes: thread counts, import path, and `more`."""
    # An installed project needs no path: site-packages first would shadow the standard library.
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


def _temporary() -> Path:
    """Return the parent of Ray's folders: the system's temporary folder if its path is short."""
    root = Path(tempfile.gettempdir())
    return root if len(str(root)) <= LONGEST_ROOT else Path("/tmp")


def _is_ours(folder: Path) -> bool:
    """Return whether this is a folder, not a link, that this user owns."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
