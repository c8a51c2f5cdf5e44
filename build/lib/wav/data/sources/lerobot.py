"""LeRobot datasets (v2.0, v2.1, v3.0): numbers in parquet, cameras as mp4 or as images in the parquet.

LeRobot's metadata does not tell how images are rotated, so ``image_rotation`` in ``ingest.lerobot`` must: "180" for
``lerobot/libero`` and the other LIBERO conversions (rotated already), "none" for a simulator's raw buffer, "camera" for
real robots. The gripper's sign is measured on the fingers or declared in ``gripper``. Actions are absolute
joint targets where action and state have the same named dimensions, OSC_POSE deltas for 7-D actions with the 8-D
end-effector state; anything else is declared in ``action``. What an end-effector state's columns are, their names tell
(:mod:`wav.data.sources.state_names`); joints are radians or ``unit`` says what they are. LIBERO conversions declare
10 fps but ran at 20: ``control_hz``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wav.data.conventions import ABSOLUTE_ACTIONS, DELTA_ACTIONS, Conventions
from wav.data.names import is_plain, own_task, task_name
from wav.data.sources import checks
from wav.data.sources.depth import Depth, code_scale
from wav.data.sources.frames import described
from wav.data.sources.lerobot_entries import Entry, read_entries
from wav.data.sources.lerobot_episodes import Plan, check_units, gripper_samples, read_episodes
from wav.data.sources.lerobot_meta import Dataset, Feature, open_dataset, parquet_columns
from wav.data.sources.staging import DatasetSource, Job
from wav.data.sources.state_names import StateColumns, named_pose, state_columns
from wav.data.state import STATE_LAYOUT
from wav.errors import ConfigError, DataError
from wav.shards import grouped
from wav.sim.registry import select_tasks

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings
    from wav.data.sources.options import LeRobotOptions

STATES = ("observation.state", "state")
ACTIONS = ("action", "actions")
#: joint angles beside an end-effector state
JOINTS = ("observation.states.joint_state", "observation.joint_state", "observation.joint_states", "joint_states")
#: view -> last part of the usual camera keys
CAMERAS = {
    "agentview": ("image", "agentview_image", "agentview_rgb"),
    "wrist": ("wrist_image", "image2", "eye_in_hand_rgb"),
    "top": ("cam_high", "top_head", "head"),
    "left_wrist": ("cam_left_wrist", "hand_left"),
    "right_wrist": ("cam_right_wrist", "hand_right"),
}
PREFIXES = ("observation.images.", "observation.image.", "")


class LeRobotSource(DatasetSource):
    """Reads the LeRobot dataset at ``ingest.path``, limited to ``data.tasks`` where that names any.

    Tasks are named after their instruction (:mod:`wav.data.names`). Of each task the first
    ``ingest.episodes_per_task`` episodes are read.

    Raises:
        ConfigError: the path, a task or a camera is missing, or a convention must be declared.
        DataError: unknown version, missing or damaged metadata, wrong types.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        self.dataset: Dataset = open_dataset(settings.path)
        cameras = _cameras(str(self.dataset.where), self.dataset.features, data, settings.lerobot)
        entries = read_entries(self.dataset, tuple(key for _, key in cameras))
        self.entries, self.names = _chosen(self.dataset, entries, data, settings)
        sound = tuple(entry for entry in self.entries if not entry.fault)
        if not sound:
            raise DataError(f"{self.dataset.root}: no episode can be read (first: {self.entries[0].fault})")
        checks.check_instructions(dict.fromkeys(entry.instructions[0] for entry in sound), data.text_tokens)
        self.plan = _plan(self.dataset, cameras, sound, data, settings)

    def conventions(self) -> Conventions:
        """Simulated frames end up rotated by 180 degrees, as the simulators here; a real camera's stay as they are."""
        plan, data = self.plan, self.data
        absolute = plan.kind == ABSOLUTE_ACTIONS
        names = self.dataset.features[plan.state].names
        unit = self.settings.lerobot.unit
        recorded = f" (rad, recorded in {unit})" if unit in ("degree", "percent") else ""
        layout = f"joints{recorded}: " + " ".join(names if len(names) == data.state_dim else [f"{data.state_dim}"])
        return Conventions.recorded(
            data,
            image_rotation="none" if plan.rotation == "camera" else "180",
            gripper="absolute" if absolute else checks.CANONICAL_GRIPPER,
            state_layout=layout if absolute else STATE_LAYOUT,
            action=plan.kind,
        )

    def jobs(self) -> list[Job]:
        """A few episodes each, in the dataset's order."""
        data, frame = self.data, len(self.data.views) * self.data.image_height * self.data.image_width * 3
        jobs = []
        for part in grouped([entry.length * frame for entry in self.entries]):
            entries = self.entries[part.start : part.stop]
            names = self.names[part.start : part.stop]
            jobs.append(
                self.job(
                    read_episodes,
                    (self.plan, entries, names, data, self.settings),
                    sum(entry.length for entry in entries) * frame,
                    label=f"{self.dataset.root}: episodes {entries[0].index} to {entries[-1].index}",
                    episodes=len(entries),
                    files=[p for e in entries if not e.fault for p in (e.data, *(v.path for v in e.videos))],
                    identity=[
                        [e.index, e.length, list(e.instructions), [v.start for v in e.videos], e.fault] for e in entries
                    ]
                    + [[key, depth.scale] for key, depth in self.plan.depths.items()],
                )
            )
        return jobs

    def describe(self) -> dict[str, Any]:
        """What was read, declared, detected and changed."""
        plan, features = self.plan, self.dataset.features
        return {
            "format": f"lerobot {plan.version}",
            "path": self.settings.path,
            "robot": self.dataset.robot,
            "fps_recorded": plan.fps,
            "drop_noops": self.settings.lerobot.drop_noops,
            "cameras": {
                view: described(key, features[key].image_size or (0, 0), self.data) for view, key in plan.cameras
            },
            "depth": {view: list(bounds) for view, bounds in self.settings.lerobot.depth.items()},
            "rotation_stored": plan.rotation,
            "gripper_stored": plan.gripper,
            "state": plan.state,
            "state_stored": plan.columns.describe() if plan.columns else self.settings.lerobot.unit or "radian",
            "action": plan.action,
            "joints": plan.joints,
        }


def _chosen(
    dataset: Dataset, listed: tuple[Entry, ...], data: DataSettings, settings: IngestSettings
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Entries of the wanted tasks, at most ``episodes_per_task`` sound ones of each, and their task names."""
    wanted: dict[str, str] = {}
    for task in _wanted_tasks(data):
        key = task_name(re.sub(r"^[A-Z_]*SCENE\d+_", "", own_task(data.suite, task)[1]))
        same = wanted.setdefault(key, task)
        if same != task:
            raise ConfigError(
                f"data.tasks: {same!r} and {task!r} have one instruction, by which alone LeRobot tells tasks apart; "
                "leave one out, or ingest LIBERO's HDF5 files"
            )
    counts: dict[str, int] = {}
    entries, names = [], []
    for entry in listed:
        key = task_name(entry.instructions[0]) if len(entry.instructions) == 1 else ""
        if wanted and key and key not in wanted:
            continue
        counts[key] = counts.get(key, 0) + (not entry.fault)
        if entry.fault or counts[key] <= settings.episodes_per_task:
            entries.append(entry)
            names.append(wanted[key] if is_plain(wanted.get(key, "")) else key)
    missing = [task for key, task in wanted.items() if key not in counts]
    if missing:
        have = sorted({task_name(text) for entry in listed for text in entry.instructions})
        raise ConfigError(f"data.tasks: {missing[0]!r} is not in {dataset.root}; it holds {', '.join(have[:50])}")
    return tuple(entries), tuple(names)


def _wanted_tasks(data: DataSettings) -> Sequence[str]:
    """Tasks of ``data.tasks``; of several suites all of them where it names none, as no episode says which it is of.

    Raises:
        ServiceError: LIBERO, which knows its suites' tasks, is not installed.
    """
    if data.tasks or len(data.suites) == 1:
        return data.tasks
    return [task.name for task in select_tasks(data.suite, ())]


def _plan(
    dataset: Dataset,
    cameras: tuple[tuple[str, str], ...],
    entries: tuple[Entry, ...],
    data: DataSettings,
    settings: IngestSettings,
) -> Plan:
    """Find columns and conventions, or say what must be declared."""
    options, features = settings.lerobot, dataset.features
    where = str(dataset.where)
    state, action = _column(where, features, STATES), _column(where, features, ACTIONS)
    for key in (state, action):
        if features[key].dtype not in ("float32", "float64"):
            raise DataError(f"{where}: features.{key}.dtype = {features[key].dtype!r}; record float32")
    checks.check_control_hz(dataset.fps, options, data.control_hz, f"{where}: fps")
    _check_width("action_dim", data.action_dim, features[action].shape, f"feature {action!r} of {where}")
    kind = _kind(where, features[state], features[action], options)
    columns = _state_columns(where, state, features[state], options) if kind == DELTA_ACTIONS else None
    width = (8,) if columns else features[state].shape
    _check_width("state_dim", data.state_dim, width, f"feature {state!r} of {where}")
    if kind == ABSOLUTE_ACTIONS and options.drop_noops:
        raise ConfigError("ingest.lerobot.drop_noops = true: is defined for OSC_POSE deltas alone; set it to false")
    rotation = checks.declared_rotation(options, "", where)
    plan = Plan(
        version=dataset.version,
        fps=dataset.fps,
        features=features,
        tasks=dataset.tasks,
        state=state,
        action=action,
        joints=next((key for key in JOINTS if key in features and kind == DELTA_ACTIONS), ""),
        cameras=cameras,
        kind=kind,
        columns=columns,
        rotation=rotation,
        gripper="absolute",
        success="next.success" in parquet_columns(entries[0].data),
        depths=_depths(where, features, cameras, options),
    )
    if kind == ABSOLUTE_ACTIONS:
        check_units(plan, entries, options)
        return plan
    detected = checks.detect_gripper(gripper_samples(plan, entries))
    gripper = checks.resolve_gripper(options, detected, "", where)
    return replace(plan, gripper=gripper)


def _check_width(name: str, wanted: int, shape: tuple[int, ...], what: str) -> None:
    if shape != (wanted,):
        raise ConfigError(f"data.{name} = {wanted}: {what} has shape {list(shape)}; set data.{name} to it")


def _state_columns(where: str, key: str, state: Feature, options: LeRobotOptions) -> StateColumns:
    field = f"{options.section}.rotation"
    return state_columns(state.names, state.shape[0], options.rotation, field, f"{where}: features.{key}")


def _column(where: str, features: Mapping[str, Feature], names: tuple[str, ...]) -> str:
    """The feature of one of these names."""
    found = next((name for name in names if name in features), "")
    if not found:
        raise DataError(
            f"{where}: has no feature {' or '.join(names)}; it has {', '.join(sorted(features))}; rename it"
        )
    return found


def _kind(where: str, state: Feature, action: Feature, options: LeRobotOptions) -> str:
    """Kind of action from the metadata, or as declared."""
    found = ""
    if action.names and action.names == state.names and len(action.names) == action.shape[0]:
        found = ABSOLUTE_ACTIONS
    elif action.shape == (7,) and (state.shape == (8,) or options.rotation or named_pose(state.names, state.shape)):
        found = DELTA_ACTIONS
    kind = options.action or found
    if not kind:
        raise ConfigError(
            f"{where}: {state.shape[0]}-D states with {action.shape[0]}-D actions do not tell the kind of action; "
            f"declare ingest.lerobot.action: {ABSOLUTE_ACTIONS} (joint targets) or {DELTA_ACTIONS}"
        )
    if kind == DELTA_ACTIONS and action.shape != (7,):
        raise ConfigError(
            f"ingest.lerobot.action = {kind!r}: needs 7-D actions with an end-effector state, {where} has "
            f"{action.shape[0]} and {state.shape[0]}; declare {ABSOLUTE_ACTIONS}, or convert the dataset"
        )
    return kind


def _cameras(
    where: str, features: Mapping[str, Feature], data: DataSettings, options: LeRobotOptions
) -> tuple[tuple[str, str], ...]:
    """The camera's key for every view."""
    cameras = {key: feature for key, feature in features.items() if feature.dtype in ("video", "image")}
    odd = next((view for view in options.depth if view not in data.views), None)
    if odd is not None:
        raise ConfigError(
            f"ingest.lerobot.depth: {odd!r} is none of data.views ({', '.join(data.views)}); name the view that the "
            "depth camera is for"
        )
    result = []
    for view in data.views:
        have = [key for key, feature in cameras.items() if feature.depth == (view in options.depth)]
        usual = [prefix + name for name in (view, *CAMERAS.get(view, ())) for prefix in PREFIXES]
        names = [options.cameras[view]] if view in options.cameras else usual
        key = next((name for name in names if name in have), "")
        other = next((name for name in names if name in cameras), "") if not key else ""
        if other and view in options.depth:
            raise ConfigError(
                f"{where}: camera {other!r} for {view!r} of data.views records colours; leave the view out of "
                f"ingest.lerobot.depth, or name one of {', '.join(have) or 'none'} in ingest.lerobot.cameras.{view}"
            )
        if other:
            raise ConfigError(
                f"{where}: camera {other!r} for {view!r} of data.views has one channel (depth, or grey), and views are "
                f"RGB; name one of {', '.join(have) or 'none'} in ingest.lerobot.cameras.{view}, or read it as depth "
                f"with ingest.lerobot.depth.{view}: [0.1, 2.0], its bounds in metres"
            )
        if not key:
            raise ConfigError(
                f"{where}: has no camera for {view!r} of data.views; it has {', '.join(have)}; "
                f"name the right one in ingest.lerobot.cameras.{view}"
            )
        result.append((view, key))
    twice = next((key for _, key in result if [k for _, k in result].count(key) > 1), "")
    if twice:
        raise ConfigError(f"ingest.lerobot.cameras: {twice!r} serves two views; name another camera for one of them")
    return tuple(result)


def _depths(
    where: str,
    features: Mapping[str, Feature],
    cameras: tuple[tuple[str, str], ...],
    options: LeRobotOptions,
) -> dict[str, Depth]:
    """Depth cameras: their bounds as declared, the scale of a video's codes as recorded."""
    result = {}
    for view, key in cameras:
        if view in options.depth:
            feature = features[key]
            scale = code_scale(feature.details, f"{where}: features.{key}") if feature.dtype == "video" else None
            result[key] = Depth(*options.depth[view], scale)
    return result
