"""The seed of the generated cases, which is part of a test's name: rows of other seeds stay in the record."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``seed`` of a test is ``--seed``."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", [metafunc.config.getoption("--seed")], ids="seed{}".format)
