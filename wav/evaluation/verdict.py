"""What ``wav replay`` said about a store: where it lies, and the refusal to evaluate on data that failed."""

from __future__ import annotations

import os
from pathlib import Path

from wav.data.store import EpisodeStore
from wav.errors import ConfigError
from wav.io.readers import read_json, understood

ALLOW_VARIABLE = "WAV_ALLOW_FAILED_REPLAY"


def report_path(store: Path) -> Path:
    """Next to the store, not in it: the store is another stage's output."""
    return store.with_name(f"{store.name}.replay.json")


def replay_verdict(store: EpisodeStore) -> str:
    """The verdict on this very store (by digest), in a few words.

    Raises:
        ConfigError: it failed, and ``WAV_ALLOW_FAILED_REPLAY=1`` is not set; names share, report and remedy.
        DataError: the verdict is damaged, or lacks a field.
    """
    path, remedy = report_path(store.path), "run `wav replay` again"
    if not path.is_file():
        return "not replayed"
    verdict = read_json(path, remedy)
    with understood(path, remedy):
        passed, digest, share = verdict["passed"], verdict["digest"], f"{100 * verdict['success_share']:.0f}%"
        found = f"{share} of {verdict['episodes']}"
    if digest != store.digest:
        return "not replayed since the data changed"
    if passed:
        return f"passed, {found}"
    if os.environ.get(ALLOW_VARIABLE, "") == "1":
        return f"failed, {found}, allowed by {ALLOW_VARIABLE}"
    raise ConfigError(
        f"{store.path}: only {share} of its replayed demonstrations succeed ({path}): actions, gripper or controller "
        f"mean something else here; fix the ingest, or set {ALLOW_VARIABLE}=1 to evaluate anyway"
    )
