"""Open-loop replay of one stored demonstration: its first state, then its actions, whatever they lead to.

Runs in a simulator process (no torch). Where a demonstration starts is known for scripted ones (task, index and the
expert's detour are a pure function of the seed) and for LIBERO's HDF5 files (they hold the simulator's states).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from wav.data.names import LIBERO_SUITES
from wav.errors import DataError
from wav.seeding import derive_seed, numpy_generator
from wav.sim.demonstrations import begin, kept_env
from wav.sim.env import Observation, SimEnv

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings
    from wav.data.store import EpisodeInfo


@dataclass(frozen=True)
class ReplayStart:
    """Where a demonstration begins: ``file`` and ``demo`` for LIBERO's HDF5, the others for scripted ones."""

    episode_id: str
    task: str
    index: int
    episode_seed: int
    detour: float
    seed: int
    file: str = ""
    demo: str = ""
    style: str = "direct"

    @classmethod
    def of(cls, info: EpisodeInfo, ingest: IngestSettings) -> ReplayStart:
        """Where an episode of a store begins that was ingested as ``ingest`` says."""
        return cls(info.episode_id, info.task, info.init_index, info.seed, ingest.detour, ingest.seed, style=info.style)


@dataclass(frozen=True)
class ReplayOutcome:
    """What a replay came to. Errors are the largest over the episode: metres, radians, metres."""

    episode_id: str
    success: bool
    steps: int
    position_error: float
    rotation_error: float
    gripper_error: float
    start_error: float  #: Metres between the first states: a wrong start, rather than wrong actions.


def smallest_pictures(data: DataSettings) -> DataSettings:
    """Settings for a simulator of which only the states are wanted."""
    return data.model_copy(update={"image_height": 16, "image_width": 16, "views": data.views[:1], "render": "fast"})


def replay_episode(
    data: DataSettings, start: ReplayStart, actions: NDArray[np.float32], states: NDArray[np.float32]
) -> ReplayOutcome:
    """Replay one demonstration; pictures are drawn as small as can be.

    ``actions`` (T, 7) are as executed, action t on seeing frame t, and ``states`` (T, 8) as recorded. All actions are
    executed, though the state after the last has nothing to be compared with: it is a hold in scripted demonstrations,
    but in datasets it may be the one that succeeds.

    Raises:
        DataError: the beginning cannot be restored; names the episode and the remedy.
    """
    env = kept_env(data.suite, smallest_pictures(data))
    if start.file:
        first = _begin_recorded(env, start, states[0], actions[0])
    else:
        first = begin_scripted(env, data.suite, start).state
    seen, success = [first], env.successes()[start.task]
    for action in actions:
        following = env.step(action)
        assert following is not None
        seen.append(following.state)
        success = success or env.successes()[start.task]
    position, rotation, gripper = state_errors(np.stack(seen[: len(states)]), states)
    return ReplayOutcome(
        episode_id=start.episode_id,
        success=success,
        steps=len(seen) - 1,
        position_error=float(position.max()),
        rotation_error=float(rotation.max()),
        gripper_error=float(gripper.max()),
        start_error=float(position[0]),
    )


def begin_scripted(env: SimEnv, suite: str, start: ReplayStart) -> Observation:
    """The expert's beginning: the initial state, for some moved on (:func:`wav.sim.demonstrations.begin`).

    Raises:
        DataError: the episode was recorded under another ``ingest.seed``.
    """
    if start.episode_seed != derive_seed(start.seed, "expert", start.task, start.index) % 2**31:
        raise DataError(
            f"{start.episode_id}: was recorded under another ingest.seed than {start.seed}; "
            "replay with the parameters the store was made with"
        )
    rng = numpy_generator(start.seed, "expert", start.task, start.index)
    return begin(env, suite, start.task, start.index, start.detour, rng, start.style)[1]


def _begin_recorded(
    env: SimEnv, start: ReplayStart, first: NDArray[np.float32], action: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The simulator state recorded with the demonstration, its fixtures' poses and what the state does not hold."""
    from wav.sim.libero.env import LiberoEnv
    from wav.sim.recorded import begin_recorded, read_recorded

    if not isinstance(env, LiberoEnv):
        raise DataError(f"{start.episode_id}: comes from LIBERO's HDF5; data.suites must be of {LIBERO_SUITES}")
    recorded = read_recorded(Path(start.file), start.demo)
    return begin_recorded(env, start.task, max(start.index, 0), recorded, first, action)


def state_errors(
    one: NDArray[np.float32], two: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Position (m), rotation (rad) and gripper (m) differences (T,) of states (T, 8)."""
    position = np.linalg.norm(one[:, :3].astype(np.float64) - two[:, :3], axis=1)
    rotation = (Rotation.from_rotvec(one[:, 3:6]).inv() * Rotation.from_rotvec(two[:, 3:6])).magnitude()
    gripper = np.abs(one[:, 6:8].astype(np.float64) - two[:, 6:8]).max(axis=1)
    return position, rotation, gripper
