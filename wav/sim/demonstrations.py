"""Demonstrations by a suite's scripted expert: run, recorded, begun again. Runs in simulator processes (no torch).

An expert is feedback on the simulator's state: it looks at where gripper and objects are at every step and never
replays a plan, so its action is a correct label wherever execution noise has put the arm (DART-style data: noisy
actions are executed, clean ones are the labels).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wav.data.names import full_name
from wav.errors import DataError
from wav.seeding import derive_seed, numpy_generator
from wav.sim.arm import Action, Expert
from wav.sim.env import Observation, SimEnv
from wav.sim.registry import make_env, make_expert, simulator_versions, task_specs
from wav.sim.styles import Styled, miss

if TYPE_CHECKING:
    from wav.config import DataSettings
    from wav.data.episode import Episode

log = logging.getLogger(__name__)


@functools.cache
def kept_env(suite: str, data: DataSettings) -> SimEnv:
    """This process's simulator of a suite: building one costs seconds, resetting one milliseconds."""
    return make_env(suite, data)


def begin(
    env: SimEnv, suite: str, task: str, index: int, detour: float, rng: np.random.Generator, style: str = "direct"
) -> tuple[Expert, Observation]:
    """Initial state ``index`` of ``task`` with, at probability ``detour``, the arm moved elsewhere, unrecorded.

    The style ``recover`` begins after a missed grasp instead, which is not recorded either, for any task of the scene:
    were it always for this one, the place of the hand would tell the task, and the instruction would not be learned.

    Returns:
        the task's expert and what the first recorded step sees.
    """
    observation = env.reset(task, index)
    expert = make_expert(suite, env, task)
    if style == "recover":
        specs = task_specs(suite)
        names = sorted(name for name, spec in specs.items() if spec.scene == specs[task].scene)
        for action in miss(make_expert(suite, env, names[rng.integers(len(names))]), rng):
            env.step(action, render=False)
        return expert, env.observe()
    if rng.random() < detour:
        target, yaw = expert.random_pose(rng)
        for _ in range(int(rng.integers(4, 22))):
            env.step(expert.arm.toward(target, closed=False, yaw=yaw), render=False)
        observation = env.observe()
    return expert, observation


def run_expert(
    env: SimEnv,
    suite: str,
    task: str,
    index: int,
    noise: float = 0.0,
    detour: float = 0.0,
    seed: int = 0,
    on_step: Callable[[Observation, Action, Action], None] | None = None,
    style: str = "direct",
) -> tuple[bool, int]:
    """Run the expert from initial state ``index`` in style ``style`` (:data:`wav.sim.styles.STYLES`).

    ``on_step`` sees every step's observation, executed action and clean label; without it only the beginning is
    rendered. ``noise`` is the standard deviation of the motion noise added to executed actions, in action units;
    ``detour`` as in :func:`begin`; ``seed`` is of both.

    Returns:
        whether the task's predicate held within the step limit, and the steps made.
    """
    rng = numpy_generator(seed, "expert", task, index)
    expert, first = begin(env, suite, task, index, detour, rng, style)
    if style != "direct":
        expert = Styled(expert, style, numpy_generator(seed, "expert.style", task, index))
    observation: Observation | None = first
    limit = task_specs(suite)[task].max_steps
    for step in range(limit):
        try:
            label = expert()
        except DataError as error:  # where things lie now it knows no way
            log.info("%s, initial state %d: %s", task, index, error)
            return False, step
        executed = label.copy()
        executed[:6] += rng.normal(0.0, noise, 6).astype(np.float32) * (1, 1, 1, 0.3, 0.3, 0.3)
        executed = np.clip(executed, -1, 1).astype(np.float32)
        if on_step is not None and observation is not None:
            on_step(observation, executed, label)
        observation = env.step(executed, render=on_step is not None)
        if env.successes()[task]:
            if on_step is not None and observation is not None:
                hold = np.array([0, 0, 0, 0, 0, 0, label[6]], dtype=np.float32)
                on_step(observation, hold, hold)
            return True, step + 1
    return False, limit


@dataclass(frozen=True)
class Solved:
    """What came of one episode of an expert."""

    success: bool
    steps: int
    seconds: float  #: Of one core, the reset included.


def solves(suite: str, task: str, index: int, data: DataSettings, noise: float, detour: float, seed: int) -> Solved:
    """Run the expert on one episode and record nothing. Runs in a simulator process."""
    env, before = kept_env(suite, data), time.process_time()
    success, steps = run_expert(env, suite, task, index, noise, detour, seed)
    return Solved(success, steps, time.process_time() - before)


def record_demonstration(
    suite: str,
    task: str,
    init_index: int,
    data: DataSettings,
    noise: float,
    detour: float,
    seed: int,
    style: str = "direct",
) -> Episode:
    """One demonstration as an :class:`Episode`; a pure function of its arguments. Runs in a simulator process."""
    from wav.data.episode import Episode

    env = kept_env(suite, data)
    steps: list[tuple[Observation, Action, Action]] = []
    success, _ = run_expert(env, suite, task, init_index, noise, detour, seed, lambda *step: steps.append(step), style)
    observations, executed, labels = zip(*steps, strict=True)
    return Episode(
        episode_id=f"{full_name(suite, task)}/{init_index:05d}",
        task=task,
        instruction=task_specs(suite)[task].instruction,
        images={view: np.stack([o.images[view] for o in observations]) for view in data.views},
        state=np.stack([o.state for o in observations]),
        joints=np.stack([o.joints for o in observations if o.joints is not None]),
        actions=np.stack(executed),
        expert_actions=np.stack(labels),
        success=success,
        init_index=init_index,
        seed=derive_seed(seed, "expert", task, init_index) % 2**31,
        style=style,
        source="scripted " + " ".join(f"{k}=={v}" for k, v in simulator_versions(suite).items()),
    )
