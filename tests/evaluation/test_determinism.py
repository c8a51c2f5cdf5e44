"""An episode is a pure function of (suite, task, initial state, seed, checkpoint): real simulators, a real policy."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation import tiny
from tests.evaluation.fakes import FakePolicy
from tests.helpers.libero import KIT, needs_assets
from wav.config import DataSettings
from wav.errors import SimulationError
from wav.evaluation import protocol
from wav.evaluation.protocol import EpisodeSpec
from wav.evaluation.records import read_record
from wav.evaluation.rollout import Scheduler
from wav.evaluation.shares import Elsewhere
from wav.sim.registry import task_specs
from wav.sim.workers import SimPool

pytestmark = pytest.mark.simulator

ROOT = Path(__file__).parents[2]
SUITES = ["tabletop", pytest.param("libero_spatial", marks=[pytest.mark.long, needs_assets])]


@pytest.fixture(autouse=True)
def _places(monkeypatch, tmp_path):
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))
    if KIT.is_dir():
        monkeypatch.setenv("WAV_LIBERO_ASSETS", str(KIT))


def records(out):
    """Everything a record says but how long it took."""
    found = {}
    for path in sorted((out / "episodes").rglob("*.json")):
        value = dataclasses.asdict(read_record(path))
        found[f"{path.parent.name}/{path.stem}"] = {k: v for k, v in value.items() if k != "wall_seconds"}
    return found


def one_by_one(function, jobs, workers):
    """Runs shares in this process."""
    return ((index, function(*job)) for index, job in enumerate(jobs))


@pytest.mark.parametrize("suite", SUITES)
def test_results_do_not_depend_on_workers_order_or_a_kill(suite, tmp_path, monkeypatch):
    with tiny.open_pool(suite, 1, 2) as pool:
        tiny.run(suite, tmp_path / "one", pool)
    expected = records(tmp_path / "one")
    assert len(expected) == 2 * 2 * 2 + (4 if suite == "tabletop" else 0)  # LIBERO's tasks share no scene
    assert len({record["actions_digest"] for record in expected.values()}) == len(expected)
    planned = [record for record in expected.values() if record["variant"] == "planned"]
    assert all(len(record["plan"]["sigma_video"]) == record["policy_calls"] == 2 for record in planned)

    command = [sys.executable, "-m", "tests.evaluation.tiny", suite, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = records(tmp_path / "killed")
    assert len(left) == tiny.DEATH
    assert not (tmp_path / "killed" / "metrics.json").exists()

    with tiny.open_pool(suite, 2, 4) as pool:
        metrics = tiny.run(suite, tmp_path / "killed", pool)
        assert metrics["timing"]["episodes_resumed"] == tiny.DEATH
        assert records(tmp_path / "killed") == expected
        build = protocol.build_episodes
        module = sys.modules["wav.evaluation.evaluate"]  # the package has a function of that name
        monkeypatch.setattr(module, "build_episodes", lambda *a: tiny.backwards(build(*a)))
        tiny.run(suite, tmp_path / "backwards", pool)
        elsewhere = Elsewhere(one_by_one, functools.partial(tiny.policy, suite))
        metrics = tiny.run(suite, tmp_path / "elsewhere", pool, elsewhere=elsewhere)
    assert records(tmp_path / "backwards") == records(tmp_path / "elsewhere") == expected
    assert metrics["timing"]["policy_rows"] >= len(expected)


class Sabotaged(SimPool):
    """Real simulators; ``signals`` says what is sent to the process when (task, index) executes its steps."""

    def __init__(self, suite, data, signals):
        super().__init__(suite, data, workers=1, slots=1)
        self.signals, self.episode = signals, None

    def submit_reset(self, slot, task, init_index, record=False):
        self.episode, self.stall_seconds = (task, init_index), 300.0
        super().submit_reset(slot, task, init_index, record)

    def submit_steps(self, slot, actions):
        if self.signals.get(self.episode):
            self.stall_seconds = 3.0
            os.kill(self.pids[0], self.signals[self.episode].pop())
        super().submit_steps(slot, actions)


@pytest.mark.parametrize("suite", SUITES)
def test_a_stalled_episode_is_run_again_and_three_crashes_stop_the_run(suite, tmp_path):
    data = DataSettings(suite=suite, tasks=(), image_height=16, image_width=16)
    spec = next(iter(task_specs(suite).values()))
    episodes = [EpisodeSpec(suite, spec.name, i, "planned", spec.name, spec.instruction, 8, 7, i) for i in range(3)]
    signals = {(spec.name, 1): [signal.SIGSTOP], (spec.name, 2): [signal.SIGKILL] * 3}
    finished = []

    def run(pool, chosen):
        with pool:
            options = {"execute_steps": 4, "batch_size": 2, "on_finish": finished.append}
            Scheduler(pool, FakePolicy(), **options).run(chosen)

    with pytest.raises(SimulationError, match=r"initial state 2: .*failed 3 times.*its output is in") as stopped:
        run(Sabotaged(suite, data, signals), episodes)
    assert [rollout.spec.init_index for rollout in finished] == [0, 1]  # 2 is no failure of the policy: no result
    assert [rollout.attempts for rollout in finished] == [1, 2]
    log = str(stopped.value).split("its output is in ")[1].split(".log")[0] + ".log"
    assert Path(log).is_file()
    assert Path(log).is_relative_to(tmp_path)
    sabotaged = finished.pop()
    if suite == "tabletop":
        return  # that a fresh process gives the same episode: above
    run(SimPool(suite, data, workers=1, slots=1), episodes[1:2])
    assert sabotaged.actions_digest == finished[-1].actions_digest
    np.testing.assert_array_equal(sabotaged.seen.state, finished[-1].seen.state)
