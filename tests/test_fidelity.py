"""docs/fidelity.md: all fifteen items, and every test it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PAGE = (PROJECT / "docs" / "fidelity.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)
]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


def functions(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}


def test_every_item_has_its_row() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, 16))
    for number, reference, ours, proof in ROWS:
        assert reference, number
        assert ours, number
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", proof), f"item {number} names no test"


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_named_test_exists(file: str, name: str) -> None:
    path = PROJECT / file
    assert path.is_file(), f"docs/fidelity.md names {file}, which does not exist"
    assert not name or (name.startswith("test_") and name in functions(path)), f"{file} has no {name}"


def test_nothing_that_looks_like_a_test_escapes_the_check() -> None:
    assert len(NAMED) > 30
    assert PAGE.count("::") == len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", PAGE))
