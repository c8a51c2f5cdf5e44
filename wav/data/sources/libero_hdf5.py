"""LIBERO's own HDF5 files: one ``<task>_demo.hdf5`` per task, ``data/demo_i/{actions, states, obs/...}``.

Conventions are read from the file's attributes (``problem_info``, ``macros_image_convention``, ``env_args``); where a
file has none (OpenVLA's regenerated files), ``image_rotation``, ``control_hz`` and, if the simulator's
states are missing, ``alignment`` of ``ingest.libero_hdf5`` must declare them.

Non-obvious: LIBERO's ``create_dataset.py`` records observation t AFTER action t, OpenVLA's regeneration before it.
The joints in the recorded simulator state (before action t) tell which; frames are then paired with the action taken
on seeing them. Beyond LIBERO's layout these are read where present (:mod:`wav.data.sinks.libero_hdf5` writes them):
group attributes ``alignment`` (for files without states), ``render`` and ``simulator_versions`` (JSON), ``demo_i``
attributes ``init_index``, ``seed`` and ``success``, datasets ``demo_i/expert_actions`` (T, 7) and
``demo_i/obs/joints`` (T, 8).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.names import full_name
from wav.data.sources import checks
from wav.data.sources.frames import Preparation, described, preparation
from wav.data.sources.libero_file import TaskFile, flat, observations, open_task_file, task_files
from wav.data.sources.staging import DatasetSource, Job
from wav.data.state import encode_state
from wav.data.store import Rejection
from wav.errors import ConfigError, DataError
from wav.shards import grouped

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings


class LiberoHdf5Source(DatasetSource):
    """Reads every ``*.hdf5`` under ``ingest.path`` whose task is in ``data.tasks`` (empty: all).

    Raises:
        ConfigError: the path, a task or a camera is missing, or a convention must be declared.
        DataError: a file is truncated or no LIBERO file.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        if (data.state_dim, data.action_dim) != (8, 7):
            raise ConfigError(
                f"data.state_dim, data.action_dim = {data.state_dim}, {data.action_dim}: LIBERO HDF5 has 8 and 7; "
                "set them so, or choose another ingest.source"
            )
        wanted = task_files(settings.path, data.suite)
        known = {task for _, task in wanted}
        missing = [task for task in data.tasks if task not in known]
        if missing:
            raise ConfigError(
                f"data.tasks: {missing[0]!r} has no file under {settings.path}; it holds {', '.join(sorted(known))}"
            )
        order = {task: number for number, task in enumerate(data.tasks or sorted(known))}
        chosen = sorted(((order[t], p) for p, t in wanted if t in order), key=lambda pair: (pair[0], str(pair[1])))
        twice = next(((one, two) for (a, one), (b, two) in itertools.pairwise(chosen) if a == b), None)
        if twice is not None:
            raise ConfigError(
                f"ingest.path = {settings.path!r}: {twice[0]} and {twice[1]} are of one task; give a folder with one "
                "file for each task"
            )
        names = dict(wanted)
        self.files = [replace(open_task_file(path, data, settings), task=names[path]) for _, path in chosen]
        checks.check_instructions((file.instruction for file in self.files), data.text_tokens)
        differing = next((f for f in self.files if (f.render, f.simulator) != self._made()), None)
        if differing is not None:
            raise DataError(
                f"{differing.path}: was rendered with {differing.render} {dict(differing.simulator)} where "
                f"{self.files[0].path} has {self._made()}; ingest files of one simulator"
            )
        bare = next((f for f in self.files if f.joints != self.files[0].joints), None)
        if bare is not None:
            having, lacking = (bare, self.files[0]) if bare.joints else (self.files[0], bare)
            raise DataError(
                f"{lacking.path}: obs/joint_states is missing where {having.path} has it, so rewards would be in other "
                "units from task to task; ingest them separately"
            )

    def _made(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        return self.files[0].render, self.files[0].simulator

    def conventions(self) -> Conventions:
        """As the simulators of this library: rotated by 180 degrees, gripper -1 open, +1 close."""
        render, simulator = self._made()
        rotation = "none" if self.files[0].rotation == "camera" else "180"
        return Conventions.recorded(
            self.data,
            image_rotation=rotation,
            gripper=checks.CANONICAL_GRIPPER,
            render=render,
            simulator=dict(simulator),
        )

    def jobs(self) -> list[Job]:
        """A few demonstrations of one file each."""
        return demo_jobs(self, self.files)

    def describe(self) -> dict[str, Any]:
        """Per file what was detected, and how images were changed."""
        data = self.data
        return {
            "format": "libero_hdf5",
            "path": self.settings.path,
            "drop_noops": self.settings.libero_hdf5.drop_noops,
            "files": [
                {
                    "file": file.path.name,
                    "task": file.task,
                    "cameras": {view: described(key, size, data) for view, key, size in file.cameras},
                    "rotation_stored": file.rotation,
                    "rows_reversed": file.mirrored,
                    "observation": "after its action" if file.after else "before its action",
                    "gripper_stored": file.gripper,
                }
                for file in self.files
            ],
        }


def demo_jobs(source: DatasetSource, files: Sequence[TaskFile]) -> list[Job]:
    """Jobs of a few demonstrations of one file each."""
    data = source.data
    frame = len(data.views) * data.image_height * data.image_width * 3
    jobs = []
    for file in files:
        for part in grouped([length * frame for length in file.lengths]):
            demos = file.demos[part.start : part.stop]
            size = sum(file.lengths[part.start : part.stop]) * frame
            jobs.append(
                source.job(
                    read_demos,
                    (file, demos, data, source.settings),
                    size,
                    label=f"{file.path}: {demos[0]} to {demos[-1]}",
                    episodes=len(demos),
                    files=[file.path],
                    identity=[file.task, list(demos)],
                )
            )
    return jobs


def read_demos(
    file: TaskFile, demos: tuple[str, ...], data: DataSettings, settings: IngestSettings
) -> Iterator[Episode | Rejection]:
    """Episodes of a file one by one; what is not sound comes as a Rejection with the DataError's episode and field."""
    target = "camera" if file.rotation == "camera" else "180"
    prepare = preparation(file.rotation, target, file.mirrored, data.image_height, data.image_width)
    with h5py.File(file.path, "r") as opened:
        for demo in demos:
            name = f"{full_name(data.suite, file.task)}/{demo}"
            try:
                group = opened["data"].get(demo)
                if not isinstance(group, h5py.Group):
                    raise DataError(f"is {'missing' if group is None else 'no group'}; record it again or drop it")
                episode = _read_demo(group, file, name, prepare, settings)
                episode.validate()
            except (DataError, OSError, RuntimeError, KeyError) as error:
                reason = str(error) if isinstance(error, DataError) else f"damaged ({flat(error)}); download it again"
                yield Rejection(name, file.task, f"{file.path.name}: {demo}: {reason}")
                continue
            yield episode


def _read_demo(demo: Any, file: TaskFile, name: str, prepare: Preparation, settings: IngestSettings) -> Episode:
    """One demonstration; DataError names the field and the remedy."""
    actions = numbers(demo, "actions", 7)
    steps = len(actions)
    if _integer(demo, "num_samples", steps) != steps:
        raise DataError(f"actions has {steps} steps where attribute num_samples says {demo.attrs['num_samples']}")
    if steps < 2:
        raise DataError(f"actions has {steps} steps; record whole demonstrations")
    state = _state(demo, steps)
    checks.check_deltas(actions)
    checks.check_state_layout(state)
    expert = numbers(demo, "expert_actions", 7, steps) if "expert_actions" in demo else None
    actions = _executed(actions, file)
    expert = None if expert is None else _executed(expert, file)
    if not _integer(demo, "success", int(_succeeded(demo, file.success))):
        raise DataError(f"{file.success} never becomes 1: the demonstration failed; drop it at the source")
    keep = checks.keep_steps(actions) if file.drop_noops else np.ones(steps, bool)
    if keep.sum() < settings.min_length:
        raise DataError(f"{int(keep.sum())} steps, fewer than ingest.min_length = {settings.min_length}")
    joints = _joints(demo, steps)
    if joints is None and file.joints:
        raise DataError(
            "obs/joint_states is missing where the file's other demonstrations have it, so its rewards would be in "
            "other units; record it or drop the demonstration"
        )
    return Episode(
        episode_id=name,
        task=file.task,
        instruction=file.instruction,
        images={view: _images(demo, key, size, keep, prepare) for view, key, size in file.cameras},
        state=state[keep].astype(np.float32),
        joints=None if joints is None else joints[keep].astype(np.float32),
        actions=actions[keep].astype(np.float32),
        expert_actions=None if expert is None else expert[keep].astype(np.float32),
        success=True,
        init_index=_integer(demo, "init_index", -1),
        seed=_integer(demo, "seed", -1),
        source=f"{settings.source}:{file.path.name}#{name.rpartition('/')[2]}",
    )


def _executed(actions: NDArray[np.floating], file: TaskFile) -> NDArray[np.floating]:
    """Actions paired with the frames they are taken on, gripper -1 open, +1 close."""
    result = np.array(actions)
    result[:, 6] = checks.canonical_gripper(result[:, 6], file.gripper)
    return checks.shifted_actions(result) if file.after else result


def _succeeded(demo: Any, name: str) -> bool:
    """Whether the dataset ``name`` says that the demonstration succeeded; True where it says nothing."""
    if not name or name not in demo:
        return True
    told = demo[name]
    if not isinstance(told, h5py.Dataset) or told.dtype.kind not in "biuf":
        raise DataError(f"{name} holds no numbers; record 1 where the demonstration succeeds, 0 elsewhere")
    return bool(np.any(np.asarray(told) > 0))


def _integer(demo: Any, name: str, missing: int) -> int:
    """An integer attribute of a demonstration."""
    value = demo.attrs.get(name, missing)
    if not isinstance(value, (int, np.integer, np.bool_)):
        raise DataError(f"attribute {name} = {value!r}: must be an integer; correct or remove it")
    return int(value)


def _state(demo: Any, steps: int) -> NDArray[np.floating]:
    """(T, 8) end-effector position, axis-angle, finger positions."""
    if "robot0_eef_quat" in observations(demo):
        parts = (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2))
        return encode_state(*(numbers(demo, f"obs/{name}", width, steps) for name, width in parts))
    if "ee_states" in observations(demo):
        pose = numbers(demo, "obs/ee_states", 6, steps)
    else:
        pose = np.concatenate([numbers(demo, "obs/ee_pos", 3, steps), numbers(demo, "obs/ee_ori", 3, steps)], axis=1)
    return np.concatenate([pose, numbers(demo, "obs/gripper_states", 2, steps)], axis=1)


def _joints(demo: Any, steps: int) -> NDArray[np.floating] | None:
    """(T, 8) joint angles (rad) and gripper opening (m), where recorded."""
    obs = observations(demo)
    if "joints" in obs:
        return numbers(demo, "obs/joints", 8, steps)
    for name, fingers in (("joint_states", "gripper_states"), ("robot0_joint_pos", "robot0_gripper_qpos")):
        if name in obs:
            opening = numbers(demo, f"obs/{fingers}", 2, steps)
            angles = numbers(demo, f"obs/{name}", 7, steps)
            return np.concatenate([angles, opening[:, :1] - opening[:, 1:]], axis=1)
    return None


def numbers(demo: Any, name: str, width: int, steps: int | None = None) -> NDArray[np.floating]:
    """A finite floating-point dataset (T, width).

    Raises:
        DataError: missing, of another type or shape, or not finite; names the step.
    """
    if name not in demo:
        raise DataError(f"{name} is missing; record it or drop the demonstration")
    data = demo[name]
    if not isinstance(data, h5py.Dataset):
        raise DataError(f"{name} is a group where numbers are expected; record it or drop the demonstration")
    if data.dtype.kind != "f":
        raise DataError(f"{name} has dtype {data.dtype}; record floating-point numbers")
    if data.ndim != 2 or data.shape[1] != width or steps not in (None, data.shape[0]):
        raise DataError(f"{name} has shape {data.shape} where ({'T' if steps is None else steps}, {width}) is expected")
    array = np.asarray(data[()])
    if not np.isfinite(array).all():
        step = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise DataError(f"{name} holds NaN or infinity at step {step}; repair the recording or drop the demonstration")
    return array


def _images(
    demo: Any, key: str, size: tuple[int, int], keep: NDArray[np.bool_], prepare: Preparation
) -> NDArray[np.uint8]:
    """(kept, height, width, 3) frames of a camera, read one at a time."""
    obs, wanted = observations(demo), (len(keep), *size, 3)
    if not isinstance(obs.get(key), h5py.Dataset):
        raise DataError(f"obs/{key} is missing: no such camera in this demonstration; record it again")
    data = obs[key]
    if data.dtype != np.uint8 or data.shape != wanted:
        raise DataError(
            f"obs/{key} is {data.dtype} {data.shape} where uint8 {wanted} is expected; record every frame alike, in "
            "the size that most of the file's demonstrations have"
        )
    return prepare.stack((data[int(step)] for step in np.flatnonzero(keep)), int(keep.sum()))
