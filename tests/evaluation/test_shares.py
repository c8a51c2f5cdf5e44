"""Shares of an evaluation on workers that stay for many runs."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from wav.errors import CheckpointError
from wav.evaluation.shares import loaded


def load(path: Path) -> SimpleNamespace:
    return SimpleNamespace(digest=path.read_text())


def test_a_worker_takes_the_policy_that_was_trained_anew_in_the_same_folder(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    how = pickle.dumps(functools.partial(load, path))
    path.write_text("of Monday")
    assert loaded(how, "of Monday") is loaded(how, "of Monday")
    path.write_text("of Tuesday")
    assert loaded(how, "of Tuesday").digest == "of Tuesday"
    with pytest.raises(CheckpointError, match="of Tuesday on the worker, of Wednesday where"):
        loaded(how, "of Wednesday")
