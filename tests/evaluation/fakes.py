"""A pool of counting simulators and a policy that is a pure function of what it sees; neither renders anything."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from wav.config import DataSettings, EvalLiberoSettings, Settings
from wav.data.conventions import Conventions
from wav.planning.types import PUBLISHED
from wav.seeding import numpy_generator
from wav.sim.env import Observation
from wav.sim.registry import task_specs

DATA = DataSettings(image_height=16, image_width=16, future_frames=5, frame_stride=1)
EVALUATION = EvalLiberoSettings(
    episodes_per_task=3, execute_steps=4, batch_size=3, swapped_episodes=2, videos=1, video_chunks=1
)


def settings(**changes) -> Settings:
    return Settings(data=DATA, eval_libero=EVALUATION.model_copy(update=changes))


@dataclass(frozen=True)
class FakeReply:
    observation: Observation | None
    success: bool = False
    steps_done: int = 0
    frames: tuple = ()
    successes: dict = field(default_factory=dict)
    error: str | None = None
    lost: bool = False
    busy_seconds: float = 0.5
    render_seconds: float = 0.25


@dataclass
class FakeSim:
    """State is a number that the first action component moves; the task's sign says which way solves it."""

    task: str
    position: float
    record: bool
    steps: int = 0

    def observation(self) -> Observation:
        level = int(np.clip(self.position * 20 + 128, 0, 255))
        image = np.full((16, 16, 3), level, np.uint8)
        state = np.zeros(8, np.float32)
        state[0] = self.position
        return Observation({"agentview": image, "wrist": image[::-1]}, state, "the simulator's own words")

    def successes(self) -> dict[str, bool]:
        return {"lift_red_cube": self.position >= 4, "lift_green_cube": self.position <= -4}


class FakePool:
    """Answers in a shuffled order; ``crashes`` maps (task, index) to how many resets fail."""

    def __init__(self, slots: int, order: int = 0, crashes: dict | None = None) -> None:
        self.slots, self.random, self.crashes = slots, random.Random(order), dict(crashes or {})
        self.sims: dict[int, FakeSim] = {}
        self.outbox: list[tuple[int, FakeReply]] = []
        self.resets: list[tuple[str, int]] = []
        self.most_live = 0

    def submit_reset(self, slot, task, init_index, record=False):
        assert 0 <= slot < self.slots
        self.resets.append((task, init_index))
        if self.crashes.get((task, init_index), 0):
            self.crashes[task, init_index] -= 1
            self.outbox.append((slot, FakeReply(None, error="the simulator process died")))
            return
        start = float(numpy_generator(0, "fake", init_index).normal() * 0.5)
        sim = self.sims[slot] = FakeSim(task, start, record)
        self.most_live = max(self.most_live, len(self.sims))
        frames = (sim.observation().images,) if record else ()
        self.outbox.append((slot, FakeReply(sim.observation(), frames=frames, successes=sim.successes())))

    def submit_steps(self, slot, actions):
        sim, frames, done = self.sims[slot], [], 0
        for action in actions:
            sim.position += float(action[0])
            done += 1
            frames.append(sim.observation().images)
            if sim.successes()[sim.task]:
                break
        success = sim.successes()[sim.task]
        reply = FakeReply(sim.observation(), success, done, tuple(frames) if sim.record else (), sim.successes())
        self.outbox.append((slot, reply))

    def wait(self, timeout=None):
        if not self.outbox:
            assert timeout is not None, "nothing was submitted"
            return []
        count = self.random.randint(1, len(self.outbox))
        self.random.shuffle(self.outbox)
        answered, self.outbox = self.outbox[:count], self.outbox[count:]
        return answered


@dataclass(frozen=True)
class FakeOutput:
    actions: np.ndarray
    returns: np.ndarray | None
    future: np.ndarray | None
    plan: object


@dataclass(frozen=True)
class FakePlan:
    sigma_video: np.ndarray
    sigma_value: np.ndarray
    shift_video: np.ndarray
    shift_value: np.ndarray


@dataclass(frozen=True)
class Digest:
    digest: str = "statistics"


class FakePolicy:
    """Walks the way the instruction says, with noise from (seed, episode, call); unplanned walks more slowly."""

    def __init__(self, conventions: Conventions | None = None) -> None:
        self.conventions = conventions or Conventions.for_simulator(DATA)
        self.statistics = Digest()
        self.compiled, self.levels, self.has_values = False, PUBLISHED, True
        self.rows: dict = {}
        self.calls: list[tuple[str, int, bool]] = []
        self.noise: list[tuple] = []

    def reset(self, row, episode, seed):
        self.rows[row] = [episode, seed, 0]

    def act(self, observations, rows, *, variant="planned", with_value=False, with_future=False):
        assert len(set(rows)) == len(rows)
        self.calls.append((variant, sum(isinstance(row, int) for row in rows), with_future))
        actions = np.zeros((len(rows), 6, 7), np.float32)
        for i, (seen, row) in enumerate(zip(observations, rows, strict=True)):
            episode, seed, call = self.rows[row]
            self.rows[row][2] += 1
            noise = numpy_generator(seed, "fake.policy", episode, call).normal(size=6)
            if isinstance(row, int):
                self.noise.append((variant, episode, call, float(noise[0])))
            way = {task_specs("tabletop")["lift_red_cube"].instruction: 1.0}.get(seen.instruction, -1.0)
            speed = 0.35 if variant == "planned" else 0.05
            # the place in the batch shows in the last bits, as it does in a real matrix product
            actions[i, :, 0] = way * speed + 0.3 * noise + 0.01 * seen.state[0] + 1e-4 * i
        n = len(rows)
        plan = FakePlan(*(np.full((n, 2 if variant == "planned" else 0), 0.5) for _ in range(4)))
        future = np.zeros((n, 2, 3, 2, 1, 1), np.float32) if with_future else None
        return FakeOutput(actions, np.ones((n, 6)) if with_value else None, future, plan)

    def decode_future(self, future):
        return np.full((2, DATA.future_frames, 16, 16, 3), 100, np.uint8)

    def generate_video(self, observation, chunks, *, seed=0, episode="video"):
        return np.full((2, 1 + chunks * DATA.future_frames, 16, 16, 3), 100, np.uint8)
