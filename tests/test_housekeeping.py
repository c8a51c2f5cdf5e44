"""Runs of long ago go, here and in the store, and nothing else; a champion that has grown old is told about."""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from flows import housekeeping
from flows.housekeeping import DAY, old_runs, tell_stale
from wav.io.storage import open_store


def aged(path: Path, days: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text("x")
    os.utime(path, times=(time.time() - days * DAY,) * 2)


def test_old_runs_go_here_and_in_the_store(tmp_path: Path) -> None:
    store, runs = open_store((tmp_path / "store").as_uri()), tmp_path / "runs"
    for place in (runs, tmp_path / "store" / "runs"):
        aged(place / "old" / "reports" / "a.json", 91)
        aged(place / "growing" / "a.json", 91)
        aged(place / "growing" / "b.json", 1)
        for folder in ("old/reports", "old", "growing"):
            aged(place / folder, 91)
    policy = tmp_path / "store" / "policies" / "p1" / "weights"
    aged(policy, 400)
    assert list(old_runs(runs, store, 0)) == []
    lines = list(old_runs(runs, store, 90))
    assert len(lines) == 2
    assert all("/runs/old: nothing in it is younger than 90 days" in line for line in lines)
    assert [path.name for path in runs.iterdir()] == ["growing"]
    assert {info.key for info in store.list("runs/")} == {"runs/growing/a.json", "runs/growing/b.json"}
    assert policy.is_file()
    assert list(old_runs(runs, store, 90)) == []


def test_a_link_and_a_folder_that_cannot_be_removed_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, runs = open_store((tmp_path / "store").as_uri()), tmp_path / "runs"
    for name in ("a", "b"):
        aged(runs / name / "file", 91)
        aged(runs / name, 91)
    (runs / "latest").symlink_to("a")
    os.utime(runs / "latest", (0, 0), follow_symlinks=False)
    remove = shutil.rmtree

    def owned_by_another(path: Path) -> None:
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path / "file"))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", owned_by_another)
    first, second = old_runs(runs, store, 90)
    assert first.startswith(f"could not remove {runs / 'a'}: [Errno 13] Permission denied")
    assert second.startswith(f"removed {runs / 'b'}:")
    assert sorted(path.name for path in runs.iterdir()) == ["a", "latest"]


def test_an_old_champion_is_told_about(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(housekeeping, "emit_event", lambda *given, **more: told.append((given, more)))
    now = datetime.now(timezone.utc)
    assert not tell_stale("tabletop", (now - timedelta(days=28)).isoformat(), 28, "may be worse")
    assert told == []
    assert tell_stale("tabletop", (now - timedelta(days=30)).isoformat(), 28, "may be worse")
    ((event, resource), more) = told[0]
    assert (event, resource["prefect.resource.name"]) == ("wav.champion.stale", "tabletop")
    assert more["payload"]["text"].startswith("champion tabletop is 30 days old; no newer one takes its place: may be")
