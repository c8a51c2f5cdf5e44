"""HDF5 files of demonstrations, ``data/demo_i/{actions, obs/...}``: what LIBERO's and robomimic's have in common."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.names import full_name
from wav.data.sources import checks
from wav.data.sources.checks import Floats
from wav.data.sources.damage import opened_hdf5
from wav.data.sources.finding import camera_for, no_camera
from wav.data.sources.frames import Preparation, described, preparation
from wav.data.sources.options import DatasetOptions
from wav.data.sources.staging import DatasetSource, Item, Job, judged
from wav.data.state import encode_state
from wav.data.store import Rejection
from wav.errors import ConfigError, DataError
from wav.io.readers import parse_json

#: view, name of its dataset under obs/, recorded (H, W); a demonstration that holds others is refused
Camera = tuple[str, str, tuple[int, int]]
_SAMPLES = 3  # demonstrations per file whose numbers decide alignment and gripper
_JOINTS = ("joints", "joint_states", "robot0_joint_pos")
_FINGERS = ("gripper_states", "robot0_gripper_qpos")


@dataclass(frozen=True)
class TaskFile:
    """What a file says about itself; all that a reading process needs besides the settings."""

    path: Path
    task: str
    instruction: str
    demos: tuple[str, ...]
    lengths: tuple[int, ...]
    cameras: tuple[Camera, ...]
    rotation: str
    mirrored: bool
    joints: bool
    """Demonstrations hold joint angles; one without is refused, as its rewards would be in other units."""
    gripper: str
    drop_noops: bool
    success: str
    """Dataset that is above 0 somewhere if the demonstration succeeded; empty where nothing tells."""
    after: bool = False
    """Observation t was recorded after action t."""
    render: str = "full"
    simulator: tuple[tuple[str, str], ...] = ()


class DemoSource(DatasetSource):
    """Base of the readers of such files, one for each task; ``files`` has them in the order of the store.

    ConfigError where a convention must be declared, or ``data`` is for two arms; DataError for damage.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        if (data.state_dim, data.action_dim) != (8, 7):
            raise ConfigError(
                f"data.state_dim, data.action_dim = {data.state_dim}, {data.action_dim}: {settings.source} reads one "
                "arm's 8 and 7; set them so, or choose another ingest.source"
            )
        self.files = self.open_files()
        for one, two in pairwise(sorted(self.files, key=lambda file: file.task)):
            if one.task == two.task:
                raise ConfigError(
                    f"ingest.path = {settings.path!r}: {one.path} and {two.path} are of one task; give one file for "
                    "each task"
                )
        checks.check_instructions((file.instruction for file in self.files), data.text_tokens)
        first = self.files[0]
        for file in self.files:
            if (file.render, file.simulator) != (first.render, first.simulator):
                raise DataError(
                    f"{file.path}: was rendered with {file.render} {dict(file.simulator)} where {first.path} has "
                    f"{first.render} {dict(first.simulator)}; ingest files of one simulator"
                )
            if file.joints != first.joints:
                having, lacking = (file, first) if file.joints else (first, file)
                raise DataError(
                    f"{lacking.path}: obs/joint_states is missing where {having.path} has it, so rewards would be in "
                    "other units from task to task; ingest them separately"
                )

    @abstractmethod
    def open_files(self) -> list[TaskFile]:
        """The files of the wanted tasks."""

    def conventions(self) -> Conventions:
        """As the simulators of this library (180 degrees, gripper -1 open, +1 close); a real camera's stay as is."""
        first = self.files[0]
        return Conventions.recorded(
            self.data,
            image_rotation="none" if first.rotation == "camera" else "180",
            gripper=checks.CANONICAL_GRIPPER,
            render=first.render,
            simulator=dict(first.simulator),
        )

    def jobs(self) -> list[Job]:
        """A few demonstrations of one file each."""
        jobs = []
        for file in self.files:
            lengths = zip(file.demos, file.lengths, strict=True)
            items = [Item(demo, length * self.frame_bytes, (file.path,), demo) for demo, length in lengths]
            jobs += self.jobs_of(read_demos, items, str(file.path), plan=file, identity=file.task)
        return jobs

    def about(self, file: TaskFile) -> dict[str, Any]:
        """What was detected in a file, and how its images were changed."""
        return {
            "file": file.path.name,
            "task": file.task,
            "cameras": {view: described(key, size, self.data) for view, key, size in file.cameras},
            "rotation_stored": file.rotation,
            "rows_reversed": file.mirrored,
            "gripper_stored": file.gripper,
        }

    def describe(self) -> dict[str, Any]:
        """Per file what was read, detected and declared."""
        return {
            "format": self.settings.source,
            "path": self.settings.path,
            "drop_noops": self.files[0].drop_noops,
            "files": [self.about(file) for file in self.files],
        }


def demo_names(group: Any) -> list[str]:
    """Names of the demonstrations in the group ``data`` by number; none where it is no group."""
    names = group if isinstance(group, h5py.Group) else ()
    return sorted((name for name in names if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))


def attribute_text(value: Any) -> str:
    """A text attribute, bytes or str; empty where it is missing."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "" if value is None or isinstance(value, h5py.Empty) else str(value)


def attribute_json(value: Any, where: str) -> dict[str, Any]:
    """A JSON attribute; {} where it is missing, DataError where it is no object."""
    raw = parse_json(attribute_text(value) or "{}", where, "download the file again")
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is {type(raw).__name__} where an object is expected; download the file again")
    return raw


def control_rate(arguments: dict[str, Any], where: str) -> float:
    """The control rate (Hz) of env_args; 0 where it tells none, DataError where that is no number."""
    kwargs = arguments.get("env_kwargs") or {}
    rate = kwargs.get("control_freq") or 0 if isinstance(kwargs, dict) else kwargs
    if not isinstance(rate, (int, float)):
        raise DataError(f"{where}: env_args.env_kwargs: {rate!r} is no control_freq; download the file again")
    return float(rate)


def observations(demo: Any) -> Any:
    """The group ``obs`` of a demonstration; an empty mapping where there is none."""
    found = demo.get("obs") if isinstance(demo, h5py.Group) else None
    return found if isinstance(found, h5py.Group) else {}


def claimed_length(demo: Any) -> int:
    """Number of steps a demonstration claims."""
    actions = demo["actions"] if isinstance(demo, h5py.Group) and "actions" in demo else None
    return int(actions.shape[0]) if isinstance(actions, h5py.Dataset) and actions.shape else 0


def has_joints(demos: Sequence[Any]) -> bool:
    """Whether any demonstration holds joint angles."""
    return any(name in observations(demo) for demo in demos for name in _JOINTS)


def find_cameras(where: str, demos: Sequence[Any], data: DataSettings, options: DatasetOptions) -> tuple[Camera, ...]:
    """The camera of every view, as most of the demonstrations that have all cameras hold it."""
    found: list[list[Camera]] = []
    for demo in demos:
        obs = observations(demo)
        shapes = {name: obs[name].shape for name in obs if getattr(obs[name], "ndim", 0) == 4}
        named = [(view, camera_for(view, shapes, options.cameras)) for view in data.views]
        found.append([(view, name, shapes[name][1:3]) for view, name in named if name])
    whole = [cameras for cameras in found if len(cameras) == len(data.views)]
    if not whole:
        have = {view for view, _, _ in max(found, key=len)}
        lacking = next(view for view in data.views if view not in have)
        raise no_camera(where, lacking, sorted(observations(demos[0])), options.section)
    return tuple(_usual(cameras, (data.image_height, data.image_width)) for cameras in zip(*whole, strict=True))


def _usual(cameras: Sequence[Camera], size: tuple[int, int]) -> Camera:
    """What most demonstrations have; of equally many the one of ``size``, then the first."""
    counts = Counter(cameras)
    return max(cameras, key=lambda camera: (counts[camera], camera[2] == size))


@dataclass(frozen=True)
class Sample:
    """Numbers of one demonstration (T rows each)."""

    actions: NDArray[np.float64]
    opening: NDArray[np.float64]
    joints: NDArray[np.float64] | None
    states: NDArray[np.float64] | None
    """Of the simulator."""


def samples(demos: Sequence[Any]) -> list[Sample]:
    """The first few demonstrations whose numbers are sound; damaged ones are judged when they are read."""
    found: list[Sample] = []
    for demo in demos:
        obs = observations(demo)
        try:
            actions = np.asarray(demo["actions"], np.float64)
            fingers = np.asarray(obs[next(name for name in _FINGERS if name in obs)], np.float64)
            joints = np.asarray(obs["joint_states"], np.float64) if "joint_states" in obs else None
            states = np.asarray(demo["states"], np.float64) if "states" in demo else None
        except (KeyError, StopIteration, OSError, ValueError, TypeError):
            continue
        sound = actions.shape == (len(fingers), 7) and fingers.shape[1:] == (2,) and len(actions) > 1
        if sound and np.isfinite(actions).all() and np.isfinite(fingers).all():
            found.append(Sample(actions, fingers[:, 0] - fingers[:, 1], joints, states))
        if len(found) == _SAMPLES:
            break
    return found


def read_demos(
    file: TaskFile, demos: tuple[str, ...], data: DataSettings, settings: IngestSettings
) -> Iterator[Episode | Rejection]:
    """Episodes of a file one by one; one that is not sound comes as a Rejection with file, episode and field."""
    target = "camera" if file.rotation == "camera" else "180"
    prepare = preparation(file.rotation, target, file.mirrored, data.image_height, data.image_width)
    with opened_hdf5(file.path) as opened:
        for demo in demos:
            name, source = f"{full_name(data.suite, file.task)}/{demo}", f"{settings.source}:{file.path.name}#{demo}"
            arguments = (opened["data"], demo, file, name, source, prepare)
            yield judged(name, file.task, f"{file.path.name}: {demo}", settings, _read_demo, *arguments)


def _read_demo(group: Any, number: str, file: TaskFile, name: str, source: str, prepare: Preparation) -> Episode:
    """One demonstration; DataError names the field and the remedy."""
    demo = group.get(number)
    if not isinstance(demo, h5py.Group):
        raise DataError(f"is {'missing' if demo is None else 'no group'}; record it again or drop it")
    actions = numbers(demo, "actions", 7)
    steps = len(actions)
    if _integer(demo, "num_samples", steps) != steps:
        raise DataError(f"actions has {steps} steps where attribute num_samples says {demo.attrs['num_samples']}")
    state = _state(demo, steps)
    checks.check_deltas(actions)
    checks.check_state_layout(state)
    expert = numbers(demo, "expert_actions", 7, steps) if "expert_actions" in demo else None
    actions = _executed(actions, file)
    expert = None if expert is None else _executed(expert, file)
    if not _integer(demo, "success", int(_succeeded(demo, file.success))):
        raise DataError(f"{file.success} never becomes 1: the demonstration failed; drop it at the source")
    keep = checks.keep_steps(actions) if file.drop_noops else np.ones(steps, bool)
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
        init_index=_integer(demo, "init_index", -1),
        seed=_integer(demo, "seed", -1),
        source=source,
    )


def _executed(actions: Floats, file: TaskFile) -> Floats:
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


def _state(demo: Any, steps: int) -> Floats:
    """(T, 8) end-effector position, axis-angle, finger positions."""
    if "robot0_eef_quat" in observations(demo):
        parts = (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2))
        return encode_state(*(numbers(demo, f"obs/{name}", width, steps) for name, width in parts))
    pose = (("ee_states", 6),) if "ee_states" in observations(demo) else (("ee_pos", 3), ("ee_ori", 3))
    return np.concatenate(
        [numbers(demo, f"obs/{name}", width, steps) for name, width in (*pose, ("gripper_states", 2))], axis=1
    )


def _joints(demo: Any, steps: int) -> Floats | None:
    """(T, 8) joint angles (rad) and gripper opening (m), where recorded."""
    obs = observations(demo)
    if "joints" in obs:
        return numbers(demo, "obs/joints", 8, steps)
    for name, fingers in zip(_JOINTS[1:], _FINGERS, strict=True):
        if name in obs:
            opening = numbers(demo, f"obs/{fingers}", 2, steps)
            angles = numbers(demo, f"obs/{name}", 7, steps)
            return np.concatenate([angles, opening[:, :1] - opening[:, 1:]], axis=1)
    return None


def numbers(group: Any, name: str, width: int, steps: int | None = None) -> Floats:
    """A dataset (T, width) of an open file; DataError where it is not of finite floats or T below 2."""
    if name not in group:
        raise DataError(f"{name} is missing; record it or drop the demonstration")
    data = group[name]
    if not isinstance(data, h5py.Dataset):
        raise DataError(f"{name} is a group where numbers are expected; record it or drop the demonstration")
    if data.dtype.kind != "f":
        raise DataError(f"{name} has dtype {data.dtype}; record floating-point numbers")
    if data.ndim != 2 or data.shape[1] != width or steps not in (None, data.shape[0]):
        raise DataError(f"{name} has shape {data.shape} where ({'T' if steps is None else steps}, {width}) is expected")
    if len(data) < 2:
        raise DataError(f"{name} has {len(data)} steps; record whole demonstrations")
    array = np.asarray(data[()])
    if not np.isfinite(array).all():
        step = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise DataError(f"{name} holds NaN or infinity at step {step}; repair the recording or drop the demonstration")
    return array


def _images(demo: Any, key: str, size: tuple[int, int], keep: NDArray[np.bool_], prepare: Preparation) -> Any:
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
