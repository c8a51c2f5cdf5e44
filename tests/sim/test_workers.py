"""Simulator processes: devices named explicitly, the watchdog, logs, blame."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from wav import code_cache
from wav.config import DataSettings
from wav.errors import SimulationError
from wav.sim import process, rendering, workers
from wav.sim.workers import SimPool, map_in_processes

DATA = DataSettings(image_height=32, image_width=32)
STILL = np.zeros((2, 7), np.float32)


@pytest.fixture(autouse=True)
def _local(monkeypatch, tmp_path):
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))


def logs(tmp_path):
    return sorted((tmp_path / "local" / "simulators").glob("*.log"))


def device(software=False, cuda=None, usable=True):
    return {"software": software, "cuda": cuda, "usable": usable}


SERVER = (device(cuda=1), device(cuda=0), device(cuda=2), device(cuda=3, usable=False), device(software=True))


@pytest.mark.parametrize(
    ("devices", "visible", "chosen"),
    [
        (SERVER, None, (0, 1, 2)),
        (SERVER, "0,2", (1, 2)),
        (SERVER, " 1 , 2 ", (0, 2)),
        (SERVER, "", (4,)),
        (SERVER, "-1", (4,)),
        (SERVER, "7", (4,)),
        (SERVER, "GPU-8f3,GPU-1a2", (0, 1, 2)),
        ((device(software=True),), None, (0,)),
        ((device(software=True),), "", (0,)),
        ((device(software=True),), "3", (0,)),
        ((device(),), "3", (0,)),  # a card that is not CUDA's
        ((device(cuda=0),), "", (0,)),  # nothing else renders
        ((), None, ()),
    ],
)
def test_devices_are_those_cuda_leaves_visible_else_mesa(monkeypatch, devices, visible, chosen):
    monkeypatch.delenv(rendering.DEVICE_VARIABLE, raising=False)
    monkeypatch.delenv(rendering.CUDA_VARIABLE, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(rendering, "egl_devices", lambda: devices)
    if visible is not None:
        monkeypatch.setenv(rendering.CUDA_VARIABLE, visible)
    assert rendering.simulator_devices() == chosen
    given = [rendering.simulator_environment(number) for number in range(4)]
    expected = [str(chosen[number % len(chosen)]) if chosen else None for number in range(4)]
    assert [env.get(rendering.DEVICE_VARIABLE) for env in given] == expected
    assert all(rendering.CUDA_VARIABLE not in env for env in given)
    monkeypatch.setenv(rendering.DEVICE_VARIABLE, "5")
    assert rendering.simulator_environment(1)[rendering.DEVICE_VARIABLE] == "5"
    monkeypatch.delenv(rendering.DEVICE_VARIABLE)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert rendering.DEVICE_VARIABLE not in rendering.simulator_environment(0)


def test_numba_keeps_what_it_compiles_where_nobody_else_writes(monkeypatch, tmp_path):
    """Indices that are unpickled, and machine code; of an installation that its user may not write to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(rendering.os, "access", lambda *_: False)
    assert rendering.simulator_environment(0)["NUMBA_CACHE_DIR"] == str(tmp_path / "wav" / "numba")
    (tmp_path / "wav").chmod(0o777)
    elsewhere = Path(rendering.simulator_environment(0)["NUMBA_CACHE_DIR"])
    assert not elsewhere.is_relative_to(tmp_path)
    assert elsewhere.stat().st_mode & 0o077 == 0
    assert str(elsewhere) == rendering.simulator_environment(1)["NUMBA_CACHE_DIR"]
    elsewhere.rmdir()
    code_cache._temporary.cache_clear()


@pytest.mark.parametrize("visible", ["", "3"])
def test_a_simulator_starts_whatever_cuda_is_told(monkeypatch, tmp_path, visible):
    monkeypatch.setenv(rendering.CUDA_VARIABLE, visible)
    with SimPool("tabletop", DATA, workers=1, slots=1) as pool:
        renderer = pool.renderer()
        pool.submit_reset(0, "lift_red_cube", 0)
        (_, reply) = pool.wait()[0]
        (log,) = logs(tmp_path)
    assert reply.error is None
    assert reply.observation.images["agentview"].std() > 5
    assert renderer["renderer"]
    assert renderer["backend"] == os.environ["MUJOCO_GL"]
    if renderer["backend"] == "egl":
        assert renderer["device"] == str(rendering.simulator_devices()[0])
    assert not log.exists()  # an orderly end leaves nothing


def test_a_stalled_simulator_is_noticed_though_others_answer(tmp_path):
    with SimPool("tabletop", DATA, workers=2, slots=4, stall_seconds=60) as pool:
        for slot in (0, 1, 3):  # the last two in one process
            pool.submit_reset(slot, "lift_red_cube", slot)
        ready = {}
        while len(ready) < 3:
            ready |= dict(pool.wait())
        assert all(reply.error is None for reply in ready.values())
        pool.stall_seconds = 3.0
        stopped = pool.pids[1]
        os.kill(stopped, signal.SIGSTOP)
        began, errors = time.monotonic(), {}
        for slot in (0, 1, 3):
            pool.submit_steps(slot, STILL)
        while len(errors) < 2:
            for slot, reply in pool.wait():
                if slot % 2:
                    errors[slot] = reply
                else:
                    assert reply.error is None
                    pool.submit_steps(slot, STILL)  # the healthy process stays busy
        assert 3 <= time.monotonic() - began < 90
        assert (errors[1].lost, errors[3].lost) == (False, True)  # the request it was at is to blame
        log = Path(errors[1].error.rpartition(" ")[2])
        assert f"simulator process {stopped} gave no answer for 3 s; its output is in {log}" in errors[1].error
        assert not psutil.pid_exists(stopped)
        pool.stall_seconds = 60.0
        pool.submit_steps(3, STILL)  # its episode is gone: said by no process, beside what healthy ones answer
        replies = {}
        while 3 not in replies:
            replies |= dict(pool.wait())
        assert replies[3].lost
        pool.submit_reset(1, "lift_red_cube", 1)
        again = {}
        while 1 not in again:
            again |= dict(pool.wait())
        np.testing.assert_array_equal(again[1].observation.state, ready[1].observation.state)
    assert logs(tmp_path) == [log]  # kept after a failure


def test_an_error_names_the_log_and_a_wait_may_be_limited(tmp_path):
    with SimPool("tabletop", DATA, workers=1, slots=1) as pool:
        with pytest.raises(SimulationError, match="nothing was submitted"):
            pool.wait(1.0)
        pool.submit_reset(0, "no_such_task", 0)
        assert pool.wait(0.01) == []
        ((_, reply),) = pool.wait()
        (log,) = logs(tmp_path)
        pool.submit_reset(0, "lift_red_cube", 0)
        assert pool.wait(300.0)[0][1].error is None
    assert str(log) in reply.error
    assert "task 'no_such_task': no task of suite 'tabletop'" in log.read_text()


def test_a_stalled_job_is_given_up_and_the_next_one_runs(monkeypatch):
    monkeypatch.setattr(workers, "JOB_ATTEMPTS", 1)
    jobs = [("__import__('time').sleep(600)",), ("6 * 7",), ("6 * 8",)]
    results = dict(map_in_processes(eval, jobs, workers=1, job_seconds=6.0))
    assert (results[1], results[2]) == (42, 48)
    assert isinstance(results[0], SimulationError)
    log = str(results[0]).rpartition(" ")[2]
    assert "Current thread" in Path(log).read_text()  # where it hung


def test_old_logs_are_removed(monkeypatch, tmp_path):
    folder = tmp_path / "local" / "simulators"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"1-{number:02d}.log").touch()
        os.utime(folder / f"1-{number:02d}.log", (number, number))
    process._log_path()
    assert sorted(path.name for path in folder.iterdir())[0] == "1-10.log"


def test_a_simulator_that_failed_is_not_used_again(monkeypatch):
    """A renderer that lost its context fails in every frame; only a fresh simulator gives the episode its chance."""
    from wav.sim import worker

    made = []

    class Env:
        def __init__(self):
            self.closed = False
            made.append(self)

        def observe(self):
            raise RuntimeError("context lost")

        def reset(self, task, index):
            if len(made) == 1:
                self.observe()
            return None

        def successes(self):
            return {"lift_red_cube": False}

        def close(self):
            self.closed = True
            raise RuntimeError("no context to free")

    monkeypatch.setattr(worker, "make_env", lambda suite, data: Env())
    process = worker._Worker()
    process.data = DATA
    request = ("reset", (0, "lift_red_cube", 0, False))
    with pytest.raises(RuntimeError, match="context lost"):
        process.handle(*request)
    process.forget(*request)
    assert made[0].closed
    assert not process.handle(*request).success
    assert len(made) == 2
    process.forget("call", (print, ()))  # hosts nothing
