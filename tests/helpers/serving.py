"""A server in this process, a policy that plans when it is told to, and our client."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.helpers.stage_folders import DATA
from wav.config import PlannerSettings
from wav.data.conventions import Conventions
from wav.errors import DataError
from wav.policy.output import PlanSummary, PolicyOutput
from wav.policy.results import Results
from wav.serving.server import Options, Server

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "clients" / "wav-client"))

from wav_client import Client

TASK = "lift the red cube"


def message(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A valid observation under openpi's names."""
    random = np.random.default_rng(seed)
    size = (DATA.image_height, DATA.image_width, 3)
    images = {f"observation/{name}": random.integers(0, 256, size, np.uint8) for name in ("image", "wrist_image")}
    return {**images, "observation/state": random.normal(size=8).astype(np.float32), "prompt": TASK, **changes}


class FakePolicy:
    """Plans at once, or each batch when ``gate`` is opened for it; actions tell the row, its episode and its call."""

    def __init__(self, batch_size: int = 4, gated: bool = False) -> None:
        self.batch_size, self.data, self.digest = batch_size, DATA, "0" * 64
        self.conventions = Conventions.for_simulator(DATA, {})
        self.planner, self.results, self.execute_steps = PlannerSettings(act_on="winner"), Results(3), 3
        self.has_values = True
        self.statistics = SimpleNamespace(key=lambda name: SimpleNamespace(mean=(0.0,) * DATA.state_dim))
        self.gate, self.gated = threading.Semaphore(0), gated
        self.rows: dict[Any, list[Any]] = {}
        self.batches: list[list[str]] = []
        self.begun = threading.Semaphore(0)

    def reset(self, row: Any, episode: int | str, seed: int) -> None:
        self.rows[row] = [episode, seed, 0]

    def forget(self, row: Any) -> None:
        self.rows.pop(row, None)

    def act(self, observations: Any, rows: Any, **_: Any) -> PolicyOutput:
        warm_up = rows[0][0] == 0
        self.begun.release()
        if self.gated and not warm_up:
            assert self.gate.acquire(timeout=20)
        if any("fail" in o.instruction for o in observations):
            raise DataError("instruction: cannot be planned")
        if any("break" in o.instruction for o in observations):
            raise ZeroDivisionError("secret")
        if not warm_up:
            self.batches.append([o.instruction for o in observations])
        actions = np.zeros((len(rows), DATA.action_chunk, 7), np.float32)
        for i, row in enumerate(rows):
            self.rows[row][2] += 1
            episode, seed, call = self.rows[row]
            actions[i, :, 0] = call
            actions[i, :, 1] = episode if isinstance(episode, int) else -1
            actions[i, :, 2] = seed
            actions[i, :, 3] = observations[i].state[0]
        none = np.zeros((len(rows), 0), np.float32)
        scores = np.tile(np.float32([0.5, 2.5]), (len(rows), 1))
        returns = np.full((len(rows), DATA.action_chunk), 3.0, np.float32)
        return PolicyOutput(actions, returns, None, PlanSummary(scores, none, none, none, none, none))


@contextmanager
def serving(policy: Any, **options: Any) -> Iterator[Server]:
    """A server on a free port of 127.0.0.1, on a thread of its own, ready."""
    ready, ended, failure = threading.Event(), threading.Event(), []
    server = Server(Options(port=0, **options), lambda: policy, say=lambda line: ready.set())
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        try:
            loop.run_until_complete(server.run(stop))
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()
            ready.set()
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        if failure:
            raise failure[0]
        yield server
    finally:
        if not ended.is_set():
            loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()


def client(server: Server, **options: Any) -> Client:
    return Client("127.0.0.1", server.port, timeout=30, **options)


def told(plan: dict[str, Any]) -> tuple[int, int, int]:
    """(call, episode, seed) that :class:`FakePolicy` planned."""
    call, episode, seed = (int(number) for number in plan["actions"][0, :3])
    return call, episode, seed
