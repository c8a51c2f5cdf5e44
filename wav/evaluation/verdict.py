"""The verdict of ``wav replay`` on a store: where it lies, and the refusal to evaluate on data that failed."""

from __future__ import annotations

import os
from pathlib import Path

from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.io.files import read_json

ALLOW_VARIABLE = "WAV_ALLOW_FAILED_REPLAY"
REPORT_SUFFIX = ".replay.json"


def report_path(store: Path) -> Path:
    """Next to the store, not in it: the store is another stage's output."""
    return store.with_name(store.name + REPORT_SUFFIX)


def refuse_failed(store: EpisodeStore) -> None:
    """Refuse to evaluate on a store whose replay failed, unless ``WAV_ALLOW_FAILED_REPLAY=1``.

    Raises:
        ConfigError: this very store (by digest) failed; names share, report and remedy.
        DataError: the replay's report lacks a field.
    """
    path = report_path(store.path)
    if not path.is_file() or os.environ.get(ALLOW_VARIABLE, "") == "1":
        return
    try:
        verdict = read_json(path, "run `wav replay` again")
        passed, digest, share = verdict["passed"], verdict["digest"], verdict["success_share"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: field {error} is missing; run `wav replay` again") from None
    if digest == store.digest and not passed:
        raise ConfigError(
            f"{store.path}: only {100 * share:.0f}% of its replayed demonstrations succeed ({path}): actions, gripper "
            f"or controller mean something else here; fix the ingest, or set {ALLOW_VARIABLE}=1 to evaluate anyway"
        )
