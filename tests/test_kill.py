"""Kill anything: a chain of kills strikes every stage of one smoke pipeline, then one rerun repairs it.

Each blow is SIGKILL to a random process or service at a random point of a stage; the run that ends with it is started
again and goes on to the next blow, often of the same stage, so that reruns are struck as well. Between blows trainings
find the litter of killed pruning and torn downloads.

``make check-long`` runs the chain of seed 0, about 16 kills; ``make check-long KILLS=14`` those of seeds 0 to 13, which
are more than 200, with ``RESUME=1`` those of them that are missing. What each saw goes to
``benchmarks/results/check-long.json`` (tests/helpers/record.py). ``KILL_LAB=folder`` keeps services and the undisturbed
run there for the next call; stop them with ``WAV_LOCAL_DIR=folder/local make down``.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.kill_harness import (
    END_SECONDS,
    REPRO_SECONDS,
    RUNNING,
    SERVICES,
    VICTIMS,
    WALL_CLOCK,
    Lab,
    Pipeline,
    kill,
    open_lab,
    results,
    work,
)
from wav.io.files import MANIFEST
from wav.io.storage import ObjectStore, open_store
from wav.io.storage.commit import commits, fetch, verify
from wav.stages import CODE_STAGE, STAGES, TRAINING

pytestmark = pytest.mark.long
SEEDS = range(int(os.environ.get("KILLS") or 1))
SAVED = re.compile(r"checkpoint of step \d+ in (\S+)")
#: how long a service is away, or less where the run ends with it
PAUSE_SECONDS = 5.0


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


@dataclass(frozen=True)
class Blow:
    """A kill that is planned."""

    stage: str
    victim: str
    share: float  #: of the victim's work in this stage
    tears: bool  #: whether the next run finds the training's checkpoints torn


def plan(choice: random.Random) -> list[Blow]:
    """One to four blows to every stage, in the order in which the stages run, drawn from what exists there.

    They fall later and later in a stage, because what a run has done its rerun may not have to do again.
    """
    blows = []
    for stage in STAGES:
        victims = [victim for victim, stages in VICTIMS.items() if stage in stages]
        few = [1 / len(VICTIMS[victim]) for victim in victims]  # what exists in few stages is drawn more often there
        struck = choice.choices(victims, few, k=choice.choice((1, 2, 3, 4)))
        shares = sorted(choice.uniform(0.02, 0.9) for _ in struck)
        blows += [Blow(stage, *drawn, choice.random() < 0.5) for drawn in zip(struck, shares, strict=True)]
    return blows


def go_on(pipeline: Pipeline) -> None:
    """``dvc repro`` once more: nothing but a blow ended the one before, and nothing of it runs on."""
    assert pipeline.struck or pipeline.process is None or pipeline.process.poll() == 0, pipeline.ending()
    left = pipeline.left_over()
    assert not left, f"still running after the end: {left}"
    pipeline.start()


def strike(lab: Lab, pipeline: Pipeline, blow: Blow) -> float | None:
    """Let the pipeline run until the blow falls; after how much work of the victim, None: its stage was over before."""
    fate = blow.share * lab.lives[blow.victim, blow.stage]
    while not pipeline.past(blow.stage):
        if not pipeline.running():
            go_on(pipeline)
        found = pipeline.victims() if pipeline.stage() == blow.stage else {}
        if "flow" in found and work(found, blow.victim) >= fate:
            victims = [lab.service(blow.victim)] if blow.victim in SERVICES else found.get(blow.victim)
            if victims and kill(random.Random(fate).choice(victims)):
                pipeline.struck = True
                return fate
        time.sleep(0.5)
    return None


def settle(lab: Lab, pipeline: Pipeline, blow: Blow) -> None:
    """The run ends, or does without what was killed and meets the next blow; services come up again."""
    if blow.victim in ("flow", "dvc"):
        assert pipeline.wait(END_SECONDS) != 0
    pipeline.until_past(blow.stage, PAUSE_SECONDS)
    if blow.victim in SERVICES:
        lab.services("up")
    unfinished = blow.stage in TRAINING and not pipeline.running() and blow.stage not in pipeline.finished()
    if unfinished and blow.tears:
        assert not pipeline.left_over()
        tear_checkpoints(pipeline, blow.stage)


def tear_checkpoints(pipeline: Pipeline, stage: str) -> None:
    """Leave what kills in pruning and in fetching leave, of every checkpoint here: the store's are needed."""
    for run in {path.parent for path in reported(pipeline) if path.parts[-4] == stage}:
        for whole in run.glob("step-*"):
            gone = whole.with_name(f".{whole.name}.gone")
            shutil.copytree(whole, gone, dirs_exist_ok=True)
            for torn in (whole, gone):
                (torn / MANIFEST).unlink(missing_ok=True)


def reported(pipeline: Pipeline) -> set[Path]:
    """Checkpoints that trainings said they have saved."""
    return {Path(found) for found in SAVED.findall(pipeline.text())}


def verify_saved(pipeline: Pipeline, folder: Path) -> int:
    """The newest checkpoint that was reported is here, all here and in the store are whole, no litter; how many."""
    runs = {path.parent for path in reported(pipeline)}
    for newest in (max(path for path in reported(pipeline) if path.parent == run) for run in runs):
        assert newest.exists(), f"{newest} was reported as saved and is lost"
    here = [verify(path) for run in runs for path in run.iterdir()]
    store: ObjectStore = open_store(pipeline.environment["WAV_STORE"], pipeline.environment["WAV_S3_ENDPOINT"])
    stored = [p for run in runs for p in commits(store, f"training/{run.parts[-3]}/{run.parts[-2]}/checkpoints")]
    for prefix in stored:
        fetch(store, prefix, folder / prefix.replace("/", "-"))
    return len(here) + len(stored)


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
    pipeline.start()
    assert pipeline.wait(END_SECONDS) == 0, pipeline.ending()
    assert pipeline.stage() == CODE_STAGE  # it looks every time
    order = [list(STAGES).index(name) for name in RUNNING.findall(pipeline.text()) if name != CODE_STAGE]
    assert order == sorted(order), "a stage that was done ran again"


@pytest.mark.parametrize("seed", SEEDS)
def test_one_rerun_repairs_a_chain_of_kills(
    seed: int,
    lab: Lab,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:
    """The same metrics and weights, nothing left over, no lock, no checkpoint lost, nothing done twice."""
    kills, late = list[str](), list[str]()
    for name, value in {"seed": seed, "kills": kills, "too_late": late}.items():
        record_property(name, value)
    for name, value in lab.credentials().items():
        monkeypatch.setenv(name, value)
    pipeline = lab.pipeline(f"chain-{seed}-{os.getpid()}")
    try:
        for blow in plan(random.Random(seed)):
            fate = strike(lab, pipeline, blow)
            if fate is None:
                late.append(f"{blow.victim} in {blow.stage}")
                continue
            kills.append(f"{blow.victim} in {blow.stage} after {fate:.1f} s of work")
            settle(lab, pipeline, blow)
        pipeline.wait(REPRO_SECONDS)  # what the last blow did not end
        go_on(pipeline)
        assert pipeline.wait(REPRO_SECONDS) == 0, pipeline.ending()
        assert not pipeline.left_over()
        assert results(pipeline.workspace) == expected
        record_property("checkpoints_verified", verify_saved(pipeline, tmp_path))
        assert_tidy(pipeline)
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
