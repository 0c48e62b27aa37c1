"""Ray for one run or sweep: quiet, on loopback, with a short-lived directory; or a running
cluster.
"""

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

# Ray and Tune read these when they are imported: nothing of Ray is imported before `cluster` has
# set them.
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
    # Workers are to be as quick as a run of their own: Ray would make them yield to everything
    # else.
    "RAY_worker_niceness": "0",
}
# Every user of the machine reaches its loopback device, and who reaches Ray runs code as its owner:
# hence a token, one for this process and its children.
TOKEN = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
}
LOOPBACK_ADDRESS = "127.0.0.1"
STARTS = 3
ASK_SECONDS = 60
# Ray's processes on this machine that no other can do without, and how often to look whether they
# run.
RAYS_OWN = ("gcs_server", "raylet")
WATCH_SECONDS = 1.0
OBJECT_STORE_BYTES = 100 * 2**20
# For what engines in processes of their own are sent: whole models in parts of some 500 MiB.
LARGE_STORE_BYTES = 2 * 2**30
# In a folder of Ray's: held by the command that has it up.
LOCK = ".lock"
# A socket's path has at most 107 bytes, of which Ray's own part takes about 70.
LONGEST_ROOT = 30


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
    """Ray is up inside, with room for so many CPUs and GPUs; yields a folder. Nothing of either is
    left afterwards.

    `threads` are those of each process, `address` that of a running cluster, None for this machine
    alone, `store` the bytes for objects. What killed commands left is cleared away first. Raises
    MachineError where Ray itself dies.
    """
    os.environ.update(QUIET if address else QUIET | this_machine())
    if not address:
        keep_to_loopback()
    clear_left_over()
    with _own_folder() as root:
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
            with _watched():
                yield root / scratch
        finally:
            ray.shutdown()


def gpus_of(address: str) -> Gpus:
    """The GPUs of a running cluster's machines, and the memory of one of them where it can be
    asked.

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
    """Ray's settings for a cluster of this machine alone, which only this process's children can
    use.
    """
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != TOKEN["RAY_AUTH_MODE"]:
        # Imported already (vLLM does), Ray would go without a token here and ask for one there.
        return LOOPBACK | {"RAY_AUTH_MODE": "disabled"}
    return LOOPBACK | TOKEN


def keep_to_loopback() -> None:
    """Have gloo, NCCL and vLLM listen on the loopback device alone, where the environment does not
    name another.

    By themselves they listen on the device that the machine's name or its route to the network
    leads to.
    """
    devices = psutil.net_if_addrs().items()
    device = next(
        (name for name, own in devices if any(one.address == LOOPBACK_ADDRESS for one in own)), "lo"
    )
    for name, value in {
        "GLOO_SOCKET_IFNAME": device,
        "NCCL_SOCKET_IFNAME": device,
        "VLLM_HOST_IP": LOOPBACK_ADDRESS,
    }.items():
        os.environ.setdefault(name, value)


def folders() -> list[Path]:
    """The folders of this user's commands that have Ray up, and of killed ones that had."""
    return [folder for folder in _temporary().glob(f"{_prefix()}{'?' * 8}") if _is_ours(folder)]


def clear_left_over() -> None:
    """End and remove what killed commands of this user left, whichever sweep they ran and wherever
    that is now.

    Most of Ray dies with the process that started it, but its agents linger for minutes.
    """
    for folder in folders():
        # Whoever has it up holds its lock.
        with contextlib.suppress(OSError), held(folder / LOCK) as free:
            if free:
                _clear(folder)


def _clear(root: Path) -> None:
    """Remove a folder, and end the processes that write there."""
    # Of macOS's /tmp, a link, open files have the real path.
    real = root.resolve()
    others = (
        process for process in psutil.process_iter() if process.pid != os.getpid()
    )  # it holds the lock
    old = [process for process in others if _writes_under(process, real)]
    for process in old:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(old, timeout=10)
    shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A new folder that no other user can enter, locked for as long as it is in use, and removed
    afterwards.
    """
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
        root = Path(tempfile.mkdtemp(prefix=_prefix(), dir=_temporary()))
        lock = KernelLock(root / LOCK)
        # Until it is locked, another command may clear it away.
        with contextlib.suppress(FileNotFoundError):
            if lock.acquire(0):
                if (root / LOCK).exists():
                    return root, lock
                lock.release()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Raise MachineError inside, within seconds, when a process of Ray's own dies: Ray itself is
    silent for a minute.

    Nothing is watched in a thread other than the main one, nor of a cluster that was there before.
    """
    own = {
        process: process.name()
        for process in psutil.Process().children()
        if process.name() in RAYS_OWN
    }
    if not own or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> NoReturn:
        # Ray, which may be waiting, lets no other exception of a signal's pass
        raise KeyboardInterrupt

    ended = threading.Event()

    def look() -> None:
        while not ended.wait(WATCH_SECONDS):
            if not all(_runs(process) for process in own):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                return

    before = signal.signal(signal.SIGUSR2, interrupt)
    watcher = threading.Thread(target=look, name="watch over Ray", daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        dead = ", ".join(name for process, name in own.items() if not _runs(process))
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
    """Whether a child of this process has not ended; one that nobody has waited for yet has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


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
    """Environment of Ray's processes: threads as the recipe says, the project importable, and
    `more`.
    """
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


def _temporary() -> Path:
    """Where Ray's folders go: the system's place for them, or /tmp where the path of that is too
    long.
    """
    root = Path(tempfile.gettempdir())
    return root if len(str(root)) <= LONGEST_ROOT else Path("/tmp")


def _prefix() -> str:
    return f"noregret-{os.getuid()}-"


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder, no link, that this user made."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
