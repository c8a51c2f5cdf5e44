"""Demonstrations in LIBERO's own HDF5 layout: one ``<task>_demo.hdf5`` per task, ``data/demo_i/{actions, obs/...}``.

What is written comes back through :mod:`wav.data.sources.libero_hdf5` bit for bit: images, state, joints, actions,
labels, instruction, success, initial state, seed and the order within a task; episodes are named ``demo_i`` there.
Numbers are widened to LIBERO's float64, frames are stored as LIBERO stores them (the raw OpenGL buffer).

Non-obvious: as in LIBERO's ``create_dataset.py``, observation t is the one after action t. Row 0 therefore begins with
a still action (LIBERO's settling steps), which no reader pairs with a frame. Beyond LIBERO's layout: group attributes
``alignment``, ``render`` and ``simulator_versions``, ``demo_i`` attributes ``init_index``, ``seed``, ``success``,
``episode_id`` and ``recorded_from``, datasets ``expert_actions`` and ``obs/joints``. ``states`` and ``init_state`` are
the simulator's, which a store does not hold: :mod:`wav.data.sinks.libero_states` recovers them for scripted
demonstrations; ``model_file`` is never written::

    report = export_hdf5(EpisodeStore.open("data/episodes"), Path("libero_object"))
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from wav.data.conventions import DELTA_ACTIONS, Conventions
from wav.data.episode import Episode
from wav.data.names import full_name, in_libero
from wav.data.sources import checks
from wav.data.sources.finding import CAMERAS
from wav.data.sources.libero_hdf5 import AFTER, BEFORE
from wav.data.state import STATE_LAYOUT
from wav.errors import DataError, ServiceError
from wav.io.files import atomic_folder, disk_errors, require_free_space

if TYPE_CHECKING:
    from wav.data.sinks.libero_states import SimulatorStates
    from wav.data.store import EpisodeInfo, EpisodeStore

#: camera of LIBERO's scenes by view, as env_args names them
SIMULATOR_CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
#: indices into a store -> (index, the simulator's states) in any order
Recover = Callable[[Sequence[int]], "Iterable[tuple[int, SimulatorStates]]"]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_hdf5` wrote."""

    folder: Path
    files: dict[str, int]
    """File name, of several suites below their folders, -> demonstrations in it, in the order of the store's tasks."""
    frames: int


def export_hdf5(
    store: EpisodeStore,
    folder: str | Path,
    *,
    alignment: str = AFTER,
    recover: Recover | None = None,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write every episode of ``store`` to ``folder``, which appears whole or not at all.

    Args:
        store: demonstrations of one arm with LIBERO's cameras; one episode is in memory at a time.
        folder: must not exist.
        alignment: after_action as LIBERO's own files, or before_action as regenerated ones (frame t, action t).
        recover: gives the simulator's states (:func:`wav.data.sinks.libero_states.recover_states`); None: left out.
        progress: told the name of every demonstration written.

    Raises:
        DataError: ``folder`` exists, or the layout cannot hold the store; names the field and the remedy.
        StorageError: the disk is or would be full.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: exists already; give a new folder, or remove this one")
    if alignment not in (AFTER, BEFORE):
        raise DataError(f"alignment = {alignment!r}: must be {AFTER} or {BEFORE}")
    check_conventions(have := store.conventions, str(store.path))
    tasks = _tasks(store)
    for infos in tasks.values():
        for _, info in infos:
            _check_info(info, infos[0][1].instruction)
    require_free_space(folder, store.frames * len(have.views) * have.image_height * have.image_width * 3)
    files: dict[str, int] = {}
    with atomic_folder(folder) as temporary:
        for task, infos in tasks.items():
            name = f"{task}_demo.hdf5"
            (temporary / name).parent.mkdir(exist_ok=True)
            with disk_errors(temporary / name), h5py.File(temporary / name, "w") as file:
                group = file.create_group("data")
                _write_task(group, store, task, infos, alignment, progress)
                if recover is not None:
                    demos = {index: f"demo_{number}" for number, (index, _) in enumerate(infos)}
                    for index, found in recover(list(demos)):
                        _write_states(group[demos[index]], found, alignment)
            files[name] = len(infos)
    return ExportReport(folder, files, store.frames)


def _tasks(store: EpisodeStore) -> dict[str, list[tuple[int, EpisodeInfo]]]:
    """Task -> (index in the store, row of its table), tasks and episodes in the order of the store."""
    tasks: dict[str, list[tuple[int, EpisodeInfo]]] = {}
    for index, info in enumerate(store.episodes):
        tasks.setdefault(info.task, []).append((index, info))
    return tasks


def check_conventions(have: Conventions, where: str) -> None:
    """Refuse what LIBERO's layout has no place for; DataError names the field and what the layout holds."""
    unknown = next((view for view in have.views if view not in SIMULATOR_CAMERAS), None)
    if unknown is not None:
        raise DataError(
            f"{where}: conventions.views: LIBERO's HDF5 has no camera {unknown!r}, only "
            f"{', '.join(SIMULATOR_CAMERAS)}; export a store of these views"
        )
    wanted = {
        "action": DELTA_ACTIONS,
        "gripper": checks.CANONICAL_GRIPPER,
        "state_layout": STATE_LAYOUT,
        "image_rotation": "180",
    }
    for name, value in wanted.items():
        if getattr(have, name) != value:
            raise DataError(
                f"{where}: conventions.{name} = {getattr(have, name)!r}: LIBERO's HDF5 holds {value!r}; "
                "keep this store as it is, or ingest its source in that convention"
            )


def _check_info(info: EpisodeInfo, instruction: str) -> None:
    """Refuse an episode by its row of the table."""
    where = f"episode {info.episode_id}"
    if not info.success:
        raise DataError(f"{where}: success = False: LIBERO's files hold successful demonstrations; leave it out")
    if info.instruction != info.instruction.strip().strip('"'):
        raise DataError(
            f"{where}: instruction = {info.instruction!r} begins or ends in spaces or quotes, which readers of "
            "LIBERO's files remove; remove them at the source"
        )
    if info.instruction != instruction:
        raise DataError(
            f"{where}: instruction = {info.instruction!r} where the task's first episode has {instruction!r}; "
            "LIBERO's files have one per task, so give each its own task"
        )
    if info.length < 2:
        raise DataError(f"{where}: has {info.length} frame; a demonstration of LIBERO has at least 2")


def _write_task(
    group: Any,
    store: EpisodeStore,
    task: str,
    infos: list[tuple[int, EpisodeInfo]],
    alignment: str,
    progress: Callable[[str], None] | None,
) -> None:
    """The ``data`` group of one task's file."""
    group.attrs.update(_attributes(store.conventions, task, infos[0][1].instruction))
    group.attrs["alignment"] = alignment
    total = 0
    for number, (index, _) in enumerate(infos):
        episode = store[index]
        _write_demo(group.create_group(f"demo_{number}"), episode, alignment)
        total += episode.length
        if progress is not None:
            progress(f"{task}/demo_{number}")
    group.attrs["num_demos"] = len(infos)
    group.attrs["total"] = total


def _attributes(have: Conventions, task: str, instruction: str) -> dict[str, Any]:
    """What LIBERO's files say about themselves, and what made the pictures."""
    problem, bddl = _problem(have.suite, task)
    name = bddl[0] if bddl else f"bddl_files/{full_name(have.suite, task)}.bddl"
    kwargs = {
        "robots": ["Panda"],
        "controller": "OSC_POSE",
        "control_freq": have.control_hz,
        "camera_names": [SIMULATOR_CAMERAS[view] for view in have.views],
        "camera_heights": have.image_height,
        "camera_widths": have.image_width,
        "bddl_file_name": name,
    }
    arguments = {"type": 1, "env_name": problem, "problem_name": problem.lower(), "bddl_file": name}
    information = {"problem_name": problem.lower(), "domain_name": "robosuite", "language_instruction": instruction}
    found: dict[str, Any] = {
        "env_name": problem,
        "env_args": json.dumps({**arguments, "env_kwargs": kwargs}),
        "problem_info": json.dumps(information),
        "bddl_file_name": name,
        "macros_image_convention": "opengl",
        "render": have.render,
        "simulator_versions": json.dumps(dict(have.simulator)),
    }
    return found | ({"bddl_file_content": bddl[1]} if bddl else {})


def _problem(suite: str, task: str) -> tuple[str, tuple[str, str] | None]:
    """Name of LIBERO's problem class, and (place below LIBERO's folder, text) of the task's definition if installed."""
    if not in_libero(suite):
        return suite, None
    from wav.sim.libero.tasks import bddl_file

    try:
        text = bddl_file(suite, task).read_text()
    except (ServiceError, OSError):
        _LOG.warning("%s: LIBERO's definition of this task is not here; bddl_file_content is left out", task)
        return suite, None
    found = re.search(r"\(problem\s+(\w+)", text)
    problem = found.group(1).replace("LIBERO_", "Libero_") if found else suite
    return problem, (f"bddl_files/{full_name(suite, task)}.bddl", text)


def _write_demo(demo: Any, episode: Episode, alignment: str) -> None:
    """One demonstration; DataError where its last action or its sizes do not fit."""
    steps = episode.length
    _check_arrays(episode)
    for name, actions in (("actions", episode.actions), ("expert_actions", episode.expert_actions)):
        if actions is not None:
            demo[name] = _stored(actions, alignment, f"episode {episode.episode_id}: {name}")
    demo["dones"] = demo["rewards"] = np.eye(steps, dtype=np.uint8)[-1]
    state = episode.state.astype(np.float64)
    pose, fingers = state[:, :6], state[:, 6:]
    demo["robot_states"] = np.concatenate([fingers, pose[:, :3], Rotation.from_rotvec(pose[:, 3:]).as_quat()], axis=1)
    obs = demo.create_group("obs")
    obs["ee_pos"], obs["ee_ori"], obs["ee_states"], obs["gripper_states"] = pose[:, :3], pose[:, 3:], pose, fingers
    if episode.joints is not None:
        obs["joint_states"], obs["joints"] = episode.joints[:, :7].astype(np.float64), episode.joints
    for view, frames in episode.images.items():
        obs[CAMERAS[view][0]] = frames[:, ::-1, ::-1]
    demo.attrs.update(
        {
            "num_samples": steps,
            "init_index": episode.init_index,
            "seed": episode.seed,
            "success": True,
            "episode_id": episode.episode_id,
            "recorded_from": episode.source,
        }
    )


def _write_states(demo: Any, found: SimulatorStates, alignment: str) -> None:
    """What the simulator knew; row 0 of the actions becomes the one that led to the first frame."""
    states = found.before if alignment == AFTER else np.concatenate([found.before[1:], found.last[None]])
    demo["states"], demo.attrs["init_state"] = states, states[0]
    if alignment == AFTER:
        for name in ("actions", "expert_actions"):
            if name in demo:
                demo[name][0] = found.first_action


def _check_arrays(episode: Episode) -> None:
    """Refuse what LIBERO's one arm does not have, and what the reader would not take back."""
    where = f"episode {episode.episode_id}"
    widths = {"state": (episode.state, 8), "actions": (episode.actions, 7), "joints": (episode.joints, 8)}
    for name, (array, width) in widths.items():
        if array is not None and array.shape[1] != width:
            raise DataError(
                f"{where}: {name} has {array.shape[1]} columns where LIBERO's HDF5 holds {width}; "
                "only stores of one Panda arm can be written in this layout"
            )
    try:
        checks.check_deltas(episode.actions)
        checks.check_state_layout(episode.state)
        for actions in (episode.actions, episode.labels()):
            checks.canonical_gripper(actions[:, 6], checks.CANONICAL_GRIPPER)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _stored(actions: NDArray[np.float32], alignment: str, where: str) -> NDArray[np.float64]:
    """Actions (T, 7) as the file holds them; DataError where LIBERO's alignment has no row for the last one."""
    wide = actions.astype(np.float64)
    if alignment == BEFORE:
        return wide
    still = np.array([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]])
    stored = np.concatenate([still, wide[:-1]])
    if checks.shifted_actions(stored)[-1].tobytes() != wide[-1].tobytes():
        raise DataError(
            f"{where}: the last row is {actions[-1].tolist()}, not a hold (no motion, gripper as before), which "
            f"LIBERO's own alignment has no row for; write it with alignment {BEFORE}"
        )
    return stored
