"""A machine without a C compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from wav.inference.cpu import kernels


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has no C compiler and has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
