"""Before an evaluation: do the simulator's pictures look like the dataset's?

The first rendered frame of each task is compared with first frames of its demonstrations, view by view (SSIM). Scenes
differ in places and poses, so no fixed similarity is asked for; but pictures as recorded must look more alike than
rotated ones, or those of another camera. A policy fed such pictures fails without any error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wav.config import DataSettings
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, SimulationError
from wav.evaluation import pictures
from wav.evaluation.rollout import MAX_ATTEMPTS
from wav.rewards.ssim import ssim
from wav.sim.env import TaskSpec
from wav.sim.registry import select_tasks
from wav.sim.workers import SimPool

log = logging.getLogger(__name__)

Picture = NDArray[np.uint8]
#: What may have been done to the dataset's pictures. Not left for right: symmetric scenes look alike mirrored.
CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "rotated by 180 degrees": lambda image: image[::-1, ::-1],
    "turned upside down": lambda image: image[::-1],
}
MARGIN = 0.05  #: SSIM by which another picture must look more alike than the one as recorded before it is refused.
TASKS, EPISODES = 3, 3  #: At most this many tasks, and demonstrations of each, are compared.


@dataclass(frozen=True)
class ViewLikeness:
    """One view's mean SSIM with the dataset's pictures as recorded, and the most alike of all alternatives."""

    view: str
    as_recorded: float
    alternative: str
    alternative_ssim: float

    @property
    def refused(self) -> bool:
        """Whether an alternative looks clearly more alike."""
        return self.alternative_ssim > self.as_recorded + MARGIN


def dataset_frames(store: EpisodeStore, tasks: Sequence[TaskSpec]) -> dict[str, list[dict[str, Picture]]]:
    """Task -> first frames (view -> (H, W, 3)) of at most :data:`EPISODES` demonstrations, for tasks that have any.

    LeRobot datasets know tasks by their instruction alone, so that tells where the name does not.
    """
    found: dict[str, list[dict[str, Picture]]] = {}
    names = {spec.name for spec in tasks}
    told = {_words(spec.instruction): spec.name for spec in reversed(tasks)}
    for i, info in enumerate(store.episodes):
        task = info.task if info.task in names else told.get(_words(info.instruction), "")
        if task and len(found.get(task, [])) < EPISODES:
            images = store[i].images
            found.setdefault(task, []).append({view: np.array(images[view][0]) for view in images})
    return dict(list(found.items())[:TASKS])


def _words(instruction: str) -> str:
    return " ".join(instruction.lower().split())


def rendered_frames(pool: SimPool, tasks: Sequence[str]) -> dict[str, dict[str, Picture]]:
    """Task -> first rendered frame of initial state 0.

    Raises:
        SimulationError: a simulator failed :data:`wav.evaluation.rollout.MAX_ATTEMPTS` times.
    """
    frames: dict[str, dict[str, Picture]] = {}
    for task in tasks:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            pool.submit_reset(0, task, 0)
            (_, reply), *_ = pool.wait()
            if reply.error is None and reply.observation is not None:
                frames[task] = {view: np.asarray(image) for view, image in reply.observation.images.items()}
                break
            where = f"{task}, initial state 0: no first frame ({reply.error})"
            if attempt == MAX_ATTEMPTS:
                raise SimulationError(f"{where} in {MAX_ATTEMPTS} tries; run `wav doctor`")
            log.warning("%s; a fresh simulator is tried", where)
    return frames


def likeness(
    rendered: dict[str, dict[str, Picture]], recorded: dict[str, list[dict[str, Picture]]], views: Sequence[str]
) -> list[ViewLikeness]:
    """Compare view by view, averaged over tasks and demonstrations."""

    def mean(view: str, other: str, change: Callable[[Picture], Picture]) -> float:
        values = []
        for task, frames in recorded.items():
            changed = np.stack([np.ascontiguousarray(change(frame[other])) for frame in frames])
            values += list(ssim(changed, rendered[task][view]))
        return float(np.mean(values))

    found = []
    for view in views:
        others = {name: mean(view, view, change) for name, change in CHANGES.items()}
        others |= {f"of camera {other!r}": mean(view, other, lambda image: image) for other in views if other != view}
        name = max(others, key=lambda key: others[key])
        found.append(ViewLikeness(view, mean(view, view, lambda image: image), name, others[name]))
    return found


def check_first_frames(pool: SimPool, store: EpisodeStore, data: DataSettings, out: Path) -> list[ViewLikeness]:
    """Refuse an evaluation whose pictures are rotated or of another camera than the dataset's.

    Slot 0 of the pool is used. A refusal leaves ``first_frames.png`` (per view: rendered, recorded) in ``out``.

    Returns:
        what was found per view; empty where the store has no demonstration of an evaluated task.

    Raises:
        ConfigError: names view, similarities, the picture and the remedy.
        SimulationError: a simulator failed.
    """
    recorded = dataset_frames(store, select_tasks(data.suite, data.tasks))
    if not recorded:
        log.warning("first frames: the store has no demonstration of the evaluated tasks; nothing to compare with")
        return []
    rendered = rendered_frames(pool, list(recorded))
    found = likeness(rendered, recorded, data.views)
    refused = next((view for view in found if view.refused), None)
    if refused is None:
        log.info("first frames: %s", "; ".join(f"{v.view} SSIM {v.as_recorded:.2f}" for v in found))
        return found
    path = Path(out) / "first_frames.png"
    rows = [[rendered[task][view], frames[0][view]] for view in data.views for task, frames in recorded.items()]
    pictures.write_png(path, pictures.grid(rows), 128 * len(rows))
    raise ConfigError(
        f"data.views: {refused.view!r}: rendered frames look like the dataset's {refused.alternative} (SSIM "
        f"{refused.alternative_ssim:.2f}) rather than as recorded ({refused.as_recorded:.2f}); left rendered, right "
        f"recorded in {path}; ingest the data again with the right image_rotation and cameras of its reader"
    )
