"""The record of slow tests: rows with outcome and properties, brought up to date by partial runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest
pytestmark = pytest.mark.long

def test_good(record_property):
    record_property("seed", 3)
    record_property("kills", ["rank in ingest after 0.5 s", "rank in ingest after 2.0 s"])

def test_bad():
    assert 1 == 2, "numbers differ"

@pytest.mark.skip(reason="no simulator")
def test_skipped(): ...

@pytest.fixture
def broken():
    raise OSError("disk full")

def test_never_started(broken): ...
"""


def record(folder: Path, *arguments: str) -> dict[str, Any]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = long: slow\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.helpers.record", "--record", "out.json", *arguments]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True, check=False)
    return json.loads((folder / "out.json").read_text())


def test_rows_are_merged(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(TESTS)
    (tmp_path / "test_fast.py").write_text("def test_fast(): ...\n")
    found = record(tmp_path)
    rows = {name.partition("::")[2]: row for name, row in found["tests"].items()}
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_never_started": "failed",
    }
    assert "numbers differ" in rows["test_bad"]["why"]
    assert "no simulator" in rows["test_skipped"]["why"]
    assert "disk full" in rows["test_never_started"]["why"]
    assert {"seconds", "date", "commit", "machine"} <= rows["test_good"].keys()
    summary = found["summary"]
    assert (summary["kills"], summary["kills_survived"], summary["failed"]) == (2, 2, 2)
    assert (summary["killed"], summary["seeds_of_kills"]) == ({"rank in ingest": 2}, [3])

    (tmp_path / "test_slow.py").write_text(TESTS.replace("1 == 2", "1 == 1"))
    again = record(tmp_path, "test_slow.py::test_bad")
    assert again["tests"]["test_slow.py::test_bad"]["outcome"] == "passed"
    assert "why" not in again["tests"]["test_slow.py::test_bad"]
    assert again["tests"]["test_slow.py::test_good"] == found["tests"]["test_slow.py::test_good"]


@pytest.mark.parametrize("broken", [False, True])
def test_rows_of_tests_that_are_gone_go(tmp_path: Path, broken: bool) -> None:
    (tmp_path / "test_slow.py").write_text(TESTS)
    record(tmp_path)
    text = "def broken(:" if broken else TESTS.replace("test_bad", "test_better")
    (tmp_path / "test_slow.py").write_text(text)
    names = {name.partition("::")[2] for name in record(tmp_path)["tests"]}
    assert ("test_bad" in names) == broken, "a file that cannot be read says nothing about its tests"


SEEDED = """
import pytest
pytestmark = pytest.mark.long

def pytest_generate_tests(metafunc):
    metafunc.parametrize("seed", [metafunc.config.getoption("--seed")], ids="seed{}".format)

def test_cases(seed, record_property):
    for name in ("cases", "tracebacks", "silent_wrongs"):
        record_property(name, 5 if name == "cases" else 0)
    record_property("seed", seed)
"""


def test_rows_of_other_seeds_stay_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SEEDED)
    record(tmp_path)
    found = record(tmp_path, "--seed", "7")
    assert found["tests"].keys() == {f"test_slow.py::test_cases[seed{seed}]" for seed in (0, 7)}
    assert (found["summary"]["cases"], found["summary"]["seeds"]) == (10, [0, 7])


def test_an_interrupted_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had ended is kept, what was cut off has no row, and a second run does the rest alone."""
    rest = 'import os\ndef test_c():\n    assert "GO" in os.environ or os.kill(os.getpid(), 2)\ndef test_d(): ...\n'
    text = f"import pytest\npytestmark = pytest.mark.long\ndef test_a(): ...\ndef test_b(): assert 0\n{rest}"
    (tmp_path / "test_slow.py").write_text(text)
    plugin = "import tests.helpers.record as r\nr.commit = lambda path: 'c0ffee'\n"
    (tmp_path / "conftest.py").write_text(plugin)
    found = record(tmp_path)["tests"]
    assert {name.partition("::")[2]: row["outcome"] for name, row in found.items()} == {
        "test_a": "passed",
        "test_b": "failed",
    }
    monkeypatch.setenv("GO", "1")
    again = record(tmp_path, "--resume")["tests"]
    assert {name.partition("::")[2] for name in again} == {"test_a", "test_b", "test_c", "test_d"}
    assert again["test_slow.py::test_a"] == found["test_slow.py::test_a"], "it was not run again"
