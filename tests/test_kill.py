"""Kill anything: at a random point of the smoke pipeline each victim gets SIGKILL; one rerun repairs it.

``make check-long`` runs seed 0; ``make check-long KILLS=34`` seeds 0 to 33, which is 204 kills, with ``RESUME=1`` those
of them that are missing. What each case saw goes to ``benchmarks/results/check-long.json`` (tests/helpers/record.py).
``KILL_LAB=folder`` keeps services and the undisturbed run there for the next call; stop them with
``WAV_LOCAL_DIR=folder/local make down``.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.kill_harness import (
    END_SECONDS,
    REPRO_SECONDS,
    STAGES,
    VICTIMS,
    WALL_CLOCK,
    Lab,
    Pipeline,
    kill,
    open_lab,
    results,
)
from wav.io.storage import ObjectStore, open_store
from wav.io.storage.commit import commits, fetch, verify

pytestmark = pytest.mark.long
SEEDS = range(int(os.environ.get("KILLS") or 1))
SAVED = re.compile(r"checkpoint of step \d+ in (\S+)")
#: smaller random delays where the victim was gone before its time came
ATTEMPTS = 4


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    kept = os.environ.get("KILL_LAB")
    folder = Path(kept).absolute() if kept else tmp_path_factory.mktemp("kill")
    folder.mkdir(parents=True, exist_ok=True)
    with open_lab(folder, keep=bool(kept)) as made:
        yield made


@pytest.fixture(scope="module")
def expected(lab: Lab) -> dict[str, Any]:
    """Results of the undisturbed run."""
    assert lab.reference is not None
    return results(lab.reference.workspace)


def strike(lab: Lab, pipeline: Pipeline, victim: str, stage: str, delay: float) -> bool:
    """Run ``dvc repro``, kill the victim ``delay`` seconds after it is first seen in ``stage``; False: it had gone."""

    def find() -> list[Any]:
        return [lab.service(victim)] if victim in ("s3", "prefect") else pipeline.victims(victim)

    pipeline.start()
    assert pipeline.process is not None
    began: float | None = None
    while pipeline.process.poll() is None:
        if pipeline.stage() == stage and pipeline.victims("flow") and (found := find()):
            began = began or time.monotonic()
            if time.monotonic() - began >= delay:
                return kill(random.Random(delay).choice(found))
        time.sleep(0.1)
    return False


def disturbed(lab: Lab, name: str, victim: str, stage: str, share: float) -> tuple[Pipeline, float]:
    """A pipeline in which the victim was killed, and after how many seconds of its life."""
    life = lab.spans.get((victim if victim not in ("s3", "prefect") else "flow", stage), 1.0)
    for attempt in range(ATTEMPTS):
        delay = life * share / 2**attempt
        pipeline = lab.case(f"{name}-{attempt}-{os.getpid()}", stage)
        if strike(lab, pipeline, victim, stage, delay):
            return pipeline, delay
        pipeline.end()
    raise AssertionError(f"{victim} of {stage} was never seen alive")


def verify_saved(pipeline: Pipeline, folder: Path) -> int:
    """Every checkpoint that was reported as saved is whole, here and in the store; how many there are."""
    reported = {Path(found) for found in SAVED.findall(pipeline.text())}
    kept = [path for path in reported if path.exists()]
    for path in kept:
        verify(path)
    for run in {path.parent for path in reported}:
        newest = max(path for path in reported if path.parent == run)
        assert newest.exists(), f"{newest} was reported as saved and is lost"
    store: ObjectStore = open_store(pipeline.environment["WAV_STORE"], pipeline.environment["WAV_S3_ENDPOINT"])
    uploaded = 0
    for run in {path.parent.parent for path in reported}:
        for prefix in commits(store, f"training/{run.parent.name}/{run.name}/checkpoints"):
            fetch(store, prefix, folder / prefix.replace("/", "-"))
            uploaded += 1
    return len(kept) + uploaded


def lock_entries(workspace: Path) -> list[dict[str, Any]]:
    """Processes that DVC's ``rwlock`` names; DVC itself passes over those that are gone."""
    path = workspace / ".dvc" / "tmp" / "rwlock"
    raw = json.loads(path.read_text() or "{}") if path.exists() else {}
    readers = [entry for entries in raw.get("read", {}).values() for entry in entries]
    return readers + list(raw.get("write", {}).values())


def assert_tidy(pipeline: Pipeline) -> None:
    """No lock is held, no half-written folder lies around, DVC runs no stage again."""
    workspace = pipeline.workspace
    held = [entry for entry in lock_entries(workspace) if psutil.pid_exists(entry["pid"])]
    assert not held, f"DVC would wait for {held}"
    parts = [path for top in ("data", "models", "reports", "export") for path in (workspace / top).rglob(".*")]
    assert not [path for path in parts if not path.name.startswith(".git")], parts
    before = len(pipeline.text())
    pipeline.start()
    assert pipeline.wait(120) == 0, pipeline.ending()
    assert re.findall(r"Running stage '(\w+)'", pipeline.text()[before:]) == ["code"]  # it looks every time


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_one_rerun_repairs_a_kill(
    victim: str,
    seed: int,
    lab: Lab,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:
    """The same metrics and weights, nothing left over, no lock, no checkpoint lost."""
    choice = random.Random(f"{victim} {seed}")
    stage, share = choice.choice(VICTIMS[victim]), choice.uniform(0.02, 0.9)
    record_property("victim", victim)
    record_property("seed", seed)
    record_property("stage", stage)
    pipeline, delay = disturbed(lab, f"{victim}-{seed}", victim, stage, share)
    record_property("killed_after_s", round(delay, 2))
    try:
        began = time.monotonic()
        status = pipeline.wait(END_SECONDS)
        left = pipeline.left_over()
        record_property("ended_within_s", round(time.monotonic() - began, 1))
        record_property("status", status)
        assert not left, f"still running after {victim} was killed: {left}"
        if victim in ("flow", "dvc"):
            assert status != 0
        lab.services("up")
        for name, value in lab.credentials().items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        pipeline.start()
        status = pipeline.wait(REPRO_SECONDS)
        assert status == 0, pipeline.ending()
        record_property("rerun_s", round(time.monotonic() - began, 1))
        assert not pipeline.left_over()
        assert results(pipeline.workspace) == expected
        record_property("checkpoints_verified", verify_saved(pipeline, tmp_path))
        assert_tidy(pipeline)
        record_property("survived", True)
    finally:
        pipeline.end()
        lab.services("up")


def test_only_named_fields_are_ignored(lab: Lab, expected: dict[str, Any]) -> None:
    """The comparison above looks at losses, success, episodes and weights, and leaves out clocks alone."""
    assert lab.reference is not None
    text = str(expected)
    assert len([name for name in expected if name.endswith(".safetensors")]) == 3
    assert all(f"'{name}'" in text for name in ("loss", "validation_loss", "grad_norm", "success_rate", "episodes"))
    left = set(re.findall(r"'(\w*(?:seconds|per_second)\w*|\w+(?:_ms|_s|_gib))'", text))
    assert not left - WALL_CLOCK, f"clock fields that are compared: {left}"
    assert set(STAGES) == {stage for stages in VICTIMS.values() for stage in stages}
