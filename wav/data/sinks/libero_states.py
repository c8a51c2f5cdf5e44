"""The simulator's states of scripted LIBERO demonstrations, which a store does not hold: each is run again.

A scripted demonstration is a pure function of its initial state, its seed and its actions, so the simulator passes
through the same states again; where it does not, bit for bit, the demonstration is refused. Row t is the state before
the action that led to frame t, as in LIBERO's files; row 0 therefore lies before the first frame, in the settling steps
or the expert's detour.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.config import DataSettings, IngestSettings
from wav.data.names import in_libero
from wav.data.store import EpisodeInfo, EpisodeStore
from wav.errors import DataError
from wav.sim.replay import ReplayStart, begin_scripted, smallest_pictures


@dataclass(frozen=True)
class SimulatorStates:
    """One demonstration of T frames."""

    before: NDArray[np.float64]
    """(T, W): time, positions, velocities of MuJoCo before the action that led to frame t."""
    last: NDArray[np.float64]
    """(W,): the state of the last frame."""
    first_action: NDArray[np.float64]
    """(7,): the action that led to frame 0."""


def recover_states(
    store: EpisodeStore,
    indices: Sequence[int],
    data: DataSettings,
    ingest: IngestSettings,
    workers: int = 0,
) -> Iterator[tuple[int, SimulatorStates]]:
    """Run demonstrations again in simulator processes.

    ``data`` and ``ingest`` are the settings that the store was made with; ``workers`` 0: the machine's cores.

    Yields:
        (index, states) as they are done, in no particular order.

    Raises:
        DataError: the store is no LIBERO simulator's, or a demonstration comes out otherwise than it was recorded.
        ServiceError: LIBERO is not ready here.
    """
    from wav.sim.registry import simulator_versions
    from wav.sim.workers import map_in_processes

    suite, made = store.conventions.suite, dict(store.conventions.simulator)
    if not in_libero(suite):
        raise DataError(f"{store.path}: conventions.suite = {suite!r}: only LIBERO's suites have LIBERO's states")
    if made != (here := simulator_versions(suite)):
        raise DataError(f"{store.path}: was simulated with {made}, here is {here}; the states cannot be had here")
    jobs = [
        (data, _start(store.episodes[i], ingest), np.array(store[i].actions), np.array(store[i].state)) for i in indices
    ]
    for number, result in map_in_processes(simulator_states, jobs, workers):
        if isinstance(result, Exception):  # errors cross from process to process as text
            named = str(result).startswith("DataError: ")
            raise DataError(str(result).removeprefix("DataError: ")) if named else result
        yield indices[number], result


def _start(info: EpisodeInfo, ingest: IngestSettings) -> ReplayStart:
    if not info.source.startswith("scripted"):
        raise DataError(
            f"episode {info.episode_id}: source {info.source[:40]!r}: only scripted demonstrations can be run again; "
            "export without states"
        )
    return ReplayStart.of(info, ingest)


@functools.lru_cache(maxsize=1)
def _environment(data: DataSettings) -> Any:
    """A simulator that keeps its state from before every step since the last reset, and the last action."""
    from wav.sim.libero.env import LiberoEnv

    class Recording(LiberoEnv):
        """:class:`LiberoEnv` with a memory."""

        def reset_to(self, *arguments: Any, **options: Any) -> Any:
            self.before: list[NDArray[np.float64]] = []
            return super().reset_to(*arguments, **options)

        def step(self, action: NDArray[np.float32], render: bool = True) -> Any:
            self.before.append(self.now())
            self.taken = np.asarray(action, np.float64)
            return super().step(action, render)

        def now(self) -> NDArray[np.float64]:
            """(W,) state as :meth:`reset_to` takes it."""
            return np.array(self.scene.sim.get_state().flatten(), np.float64)

    return Recording(data)


def simulator_states(
    data: DataSettings, start: ReplayStart, actions: NDArray[np.float32], states: NDArray[np.float32]
) -> SimulatorStates:
    """Run one demonstration again, in a simulator process; DataError where it comes out otherwise than recorded.

    ``actions`` (T, 7) are those executed, action t on seeing frame t, the last one a hold; ``states`` (T, 8) those
    recorded; pictures are drawn as small as can be.
    """
    env = _environment(smallest_pictures(data))
    observation = begin_scripted(env, data.suite, start)
    first, settled = env.taken, len(env.before) - 1
    for step, recorded in enumerate(states):
        if observation.state.tobytes() != recorded.tobytes():
            error = float(np.abs(observation.state - recorded).max())
            raise DataError(
                f"episode {start.episode_id}: run again, its state differs by {error:.2g} at step {step}; export with "
                "the parameters and the code the store was made with, or without states"
            )
        if step + 1 < len(states):
            observation = env.step(actions[step])
    return SimulatorStates(np.stack(env.before[settled:]), env.now(), first)
