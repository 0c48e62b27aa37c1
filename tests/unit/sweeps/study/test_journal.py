"""Test the journal's checksums and its behaviour on a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from harness.core.errors import UserError
from harness.core.locks import KernelLock
from harness.core.paths import PROJECT
from sweeps.study.journal import Journal


def add(journal: Path, *numbers: int) -> None:
    backend = Journal(journal)
    for number in numbers:
        backend.append_logs([{"op_code": 5, "trial": number, "note": "ß and €"}, {"op_code": 6}])


def numbers(journal: Path) -> list[int]:
    return [log["trial"] for log in Journal(journal).read_logs(0) if "trial" in log]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    file = tmp_path / "study.journal"
    add(file, 0, 1)
    add(file, 2, 3)
    return file


def test_logs_of_several_processes_are_read(journal: Path) -> None:
    assert numbers(journal) == [0, 1, 2, 3]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({line["sha256"] for line in lines}) == len(lines) == 8


def test_every_flipped_bit_is_found(journal: Path) -> None:
    content = journal.read_bytes()
    first, second, *_ = content.splitlines(keepends=True)
    for place in range(len(first), len(first) + len(second) - 1):
        journal.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"line [23] of study\.journal is damaged"):
            Journal(journal)
        assert len(journal.read_bytes()) == len(content)


@pytest.mark.parametrize(
    ("change", "line"), [("lost", 2), ("swapped", 2), ("doubled", 3), ("emptied", 2)]
)
def test_missing_and_moved_lines_are_found(journal: Path, change: str, line: int) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(
        b"".join(
            {
                "lost": [lines[0], *lines[2:]],
                "swapped": [lines[0], lines[2], lines[1], *lines[3:]],
                "doubled": [*lines[:2], *lines[1:]],
                "emptied": [lines[0], b"\n", *lines[2:]],
            }[change]
        )
    )
    with pytest.raises(UserError, match=f"line {line} of"):
        Journal(journal)


def test_a_cut_last_line_is_removed_but_not_from_a_damaged_file(journal: Path) -> None:
    content = journal.read_bytes()
    journal.write_bytes(content[:-9])
    assert numbers(journal) == [0, 1, 2, 3]
    add(journal, 4)
    assert numbers(journal) == [0, 1, 2, 3, 4]
    damaged = b"x" + content[1:-9]
    journal.write_bytes(damaged)
    with pytest.raises(UserError, match="line 1 of"):
        Journal(journal)
    assert journal.read_bytes() == damaged


def test_lines_that_optuna_appends_are_read_and_checked_later(journal: Path) -> None:
    lock = KernelLock(journal.with_name("study.journal.lock"))
    JournalFileBackend(str(journal), lock).append_logs([{"op_code": 5, "trial": 9}])  # type: ignore[arg-type]
    add(journal, 10)
    assert numbers(journal) == [0, 1, 2, 3, 9, 10]
    journal.write_bytes(journal.read_bytes().replace(b'"trial":9}', b'"trial":8}'))
    with pytest.raises(UserError, match="line 10 of"):
        Journal(journal)


def test_two_writers_see_each_others_lines(journal: Path) -> None:
    first, second = Journal(journal), Journal(journal)
    first.append_logs([{"op_code": 5, "trial": 4}])
    second.append_logs([{"op_code": 5, "trial": 5}])
    first.append_logs([{"op_code": 5, "trial": 6}])
    assert numbers(journal) == [0, 1, 2, 3, 4, 5, 6]


def test_a_full_disk_leaves_whole_lines(journal: Path) -> None:
    before = journal.read_bytes()
    script = (
        "import resource, sys; from pathlib import Path; from sweeps.study.journal import Journal\n"
        "backend = Journal(Path(sys.argv[1])); limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n    backend.append_logs([{'op_code': 5, 'trial': 4}])\n"
        "except OSError as error:\n    print(error.filename)\n"
    )
    command = [sys.executable, "-c", script, str(journal), str(len(before) + 20)]
    output = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert output == f"{journal}\n"
    assert journal.read_bytes() == before
    add(journal, 4)
    assert numbers(journal) == [0, 1, 2, 3, 4]


def test_optuna_ignores_the_checksums(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    study = optuna.create_study(storage=JournalStorage(Journal(file)), study_name="s")
    for value in (0.25, 0.5):
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        trial.report(value, 1)
        trial.set_user_attr("note", "text")
        study.tell(trial, value)
    read = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(file))))
    assert [trial.value for trial in read.trials] == [0.25, 0.5]
    assert read.trials == study.trials
    assert sorted(os.listdir(tmp_path)) == ["study.journal", "study.journal.lock"]
