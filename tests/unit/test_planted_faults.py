"""The planted faults fit the source; `python -m tests.planted` shows that tests notice them."""

from __future__ import annotations

import pytest

from harness.core.errors import UserError
from tests.conftest import TESTS
from tests.planted import PACKAGES, Fault, load_faults, read_sources

FAULTS = load_faults()
SOURCES = read_sources()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_stands_once_in_the_source_and_becomes_valid_python(fault: Fault) -> None:
    file = fault.file(SOURCES)
    planted = SOURCES[file].replace(fault.find, fault.replace)
    assert planted != SOURCES[file]
    compile(planted, file, "exec")


def test_there_are_enough_faults_and_no_two_are_the_same() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.find, fault.replace) for fault in FAULTS}) == len(FAULTS)


def test_hints_name_test_files() -> None:
    names = {file.stem.removeprefix("test_") for file in TESTS.rglob("test_*.py")}
    assert {name for fault in FAULTS for name in fault.tests} <= names


def test_every_package_has_faults() -> None:
    assert {fault.file(SOURCES).split("/")[0] for fault in FAULTS} == set(PACKAGES)


@pytest.mark.parametrize(
    ("text", "times"), [("x = 2", "not at all"), ("x = 1", "2 times, in a.py, b.py")]
)
def test_a_fault_that_does_not_stand_once_is_named(text: str, times: str) -> None:
    with pytest.raises(UserError, match=r"the text of the fault 'Wrong x'") as caught:
        Fault("Wrong x", text, "x = 3").file({"a.py": "x = 1\n", "b.py": "x = 1\ny = 1\n"})
    assert times in str(caught.value.got)
    assert "tests/planted_faults.yaml" in str(caught.value.fix)
