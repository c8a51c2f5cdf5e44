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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import ABSOLUTE_ACTIONS, DELTA_ACTIONS, Conventions
from wav.data.names import is_plain, own_task, task_name
from wav.data.sources import checks
from wav.data.sources.depth import Depth, code_scale
from wav.data.sources.finding import camera_for, check_tasks, no_camera
from wav.data.sources.frames import described
from wav.data.sources.lerobot_entries import Entry, files_of, read_entries
from wav.data.sources.lerobot_episodes import Plan, check_units, gripper_samples, read_episodes
from wav.data.sources.lerobot_meta import Dataset, Feature, open_dataset, read_parquet
from wav.data.sources.options import LeRobotOptions
from wav.data.sources.staging import DatasetSource, Item, Job
from wav.data.sources.state_names import StateColumns, named_pose, state_columns
from wav.data.state import STATE_LAYOUT
from wav.errors import ConfigError, DataError
from wav.sim.registry import select_tasks

STATES = ("observation.state", "state")
ACTIONS = ("action", "actions")
#: joint angles beside an end-effector state
JOINTS = ("observation.states.joint_state", "observation.joint_state", "observation.joint_states", "joint_states")


class LeRobotSource(DatasetSource):
    """Reads the LeRobot dataset at ``ingest.path``, limited to ``data.tasks`` where that names any.

    Tasks are named after their instruction (:mod:`wav.data.names`). Of each task the first
    ``ingest.episodes_per_task`` episodes are read. ConfigError where something must be declared, DataError for damage.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        self.dataset = open_dataset(settings.path)
        cameras = _cameras(self.dataset, data, settings.lerobot)
        entries = read_entries(self.dataset, tuple(key for _, key in cameras))
        self.entries = _chosen(self.dataset, entries, data, settings)
        sound = tuple(entry for entry in self.entries if not entry.fault)
        if not sound:
            raise DataError(f"{self.dataset.root}: no episode can be read (first: {self.entries[0].fault})")
        checks.check_instructions(dict.fromkeys(entry.instructions[0] for entry in sound), data.text_tokens)
        self.plan = _plan(self.dataset, cameras, sound, data, settings.lerobot)

    def conventions(self) -> Conventions:
        """Simulated frames end up rotated by 180 degrees, as the simulators here; a real camera's stay as they are."""
        plan, data = self.plan, self.data
        absolute = plan.kind == ABSOLUTE_ACTIONS
        names = plan.names(plan.state)
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
        items = [
            Item(e, e.length * self.frame_bytes, () if e.fault else files_of(e), f"episode {e.index}")
            for e in self.entries
        ]
        scales = [[key, depth.scale] for key, depth in self.plan.depths.items()]
        return self.jobs_of(read_episodes, items, str(self.dataset.root), plan=self.plan, identity=scales)

    def describe(self) -> dict[str, Any]:
        """What was read, declared, detected and changed."""
        plan, info = self.plan, self.dataset.info
        return {
            "format": f"lerobot {info.codebase_version}",
            "path": self.settings.path,
            "robot": str(info.robot_type),
            "fps_recorded": info.fps,
            "drop_noops": self.settings.lerobot.drop_noops,
            "cameras": {
                view: described(key, info.features[key].image_size or (0, 0), self.data) for view, key in plan.cameras
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
) -> tuple[Entry, ...]:
    """Entries of the wanted tasks with their tasks' names, at most ``episodes_per_task`` sound ones of each."""
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
    entries = []
    for entry in listed:
        key = task_name(entry.instructions[0]) if len(entry.instructions) == 1 else ""
        if wanted and key and key not in wanted:
            continue
        counts[key] = counts.get(key, 0) + (not entry.fault)
        if entry.fault or counts[key] <= settings.episodes_per_task:
            entries.append(replace(entry, task=wanted[key] if is_plain(wanted.get(key, "")) else key))
    have = {task for key, task in wanted.items() if key in counts}
    told = (task_name(text) for entry in listed for text in entry.instructions)
    check_tasks(wanted.values(), have, dataset.root, told)
    return tuple(entries)


def _wanted_tasks(data: DataSettings) -> Sequence[str]:
    """Tasks of ``data.tasks``; of several suites all of them where it names none, as no episode says which it is of."""
    if data.tasks or len(data.suites) == 1:
        return data.tasks
    return [task.name for task in select_tasks(data.suite, ())]


def _plan(
    dataset: Dataset,
    cameras: tuple[tuple[str, str], ...],
    entries: tuple[Entry, ...],
    data: DataSettings,
    options: LeRobotOptions,
) -> Plan:
    """Find columns and conventions, or say what must be declared."""
    features, where = dataset.info.features, str(dataset.where)
    state, action = column_of(dataset, STATES), column_of(dataset, ACTIONS)
    for key in (state, action):
        if features[key].dtype not in ("float32", "float64"):
            raise DataError(f"{where}: features.{key}.dtype = {features[key].dtype!r}; record float32")
    checks.check_control_hz(dataset.info.fps, options, data.control_hz, f"{where}: fps")
    _check_width("action_dim", data.action_dim, features[action].shape, f"feature {action!r} of {where}")
    kind = _kind(where, features[state], features[action], options)
    columns = _state_columns(where, state, features[state], options) if kind == DELTA_ACTIONS else None
    _check_width(
        "state_dim", data.state_dim, (8,) if columns else features[state].shape, f"feature {state!r} of {where}"
    )
    if kind == ABSOLUTE_ACTIONS and options.drop_noops:
        raise ConfigError("ingest.lerobot.drop_noops = true: is defined for OSC_POSE deltas alone; set it to false")
    plan = Plan(
        dataset=dataset,
        state=state,
        action=action,
        joints=next((key for key in JOINTS if key in features and kind == DELTA_ACTIONS), ""),
        cameras=cameras,
        kind=kind,
        columns=columns,
        rotation=checks.declared_rotation(options, "", where),
        gripper="absolute",
        success="next.success" in read_parquet(entries[0].data, ["next.success"]).column_names,
        depths=_depths(dataset, cameras, options),
    )
    if kind == ABSOLUTE_ACTIONS:
        check_units(plan, entries, options)
        return plan
    detected = checks.detect_gripper(gripper_samples(plan, entries))
    return replace(plan, gripper=checks.resolve_gripper(options, detected, "", where))


def _check_width(name: str, wanted: int, shape: tuple[int, ...], what: str) -> None:
    if shape != (wanted,):
        raise ConfigError(f"data.{name} = {wanted}: {what} has shape {list(shape)}; set data.{name} to it")


def _state_columns(where: str, key: str, state: Feature, options: LeRobotOptions) -> StateColumns:
    field = f"{options.section}.rotation"
    return state_columns(state.names, state.shape[0], options.rotation, field, f"{where}: features.{key}")


def column_of(dataset: Dataset, names: tuple[str, ...]) -> str:
    """The feature of one of these names; DataError where there is none."""
    features = dataset.info.features
    found = next((name for name in names if name in features), "")
    if not found:
        raise DataError(
            f"{dataset.where}: has no feature {' or '.join(names)}; it has {', '.join(sorted(features))}; rename it"
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


def _cameras(dataset: Dataset, data: DataSettings, options: LeRobotOptions) -> tuple[tuple[str, str], ...]:
    """(view, camera's key) of every view."""
    where, field = dataset.where, options.section
    cameras = {key: feature for key, feature in dataset.info.features.items() if feature.is_camera}
    odd = next((view for view in options.depth if view not in data.views), None)
    if odd is not None:
        raise ConfigError(
            f"{field}.depth: {odd!r} is none of data.views ({', '.join(data.views)}); name the view that the depth "
            "camera is for"
        )
    result: dict[str, str] = {}
    for view in data.views:
        have = [key for key, feature in cameras.items() if feature.depth == (view in options.depth)]
        key = camera_for(view, have, options.cameras)
        other = camera_for(view, cameras, options.cameras)
        if not key and other:
            said = f"{where}: camera {other!r} for {view!r} of data.views"
            named = f"name one of {', '.join(have) or 'none'} in {field}.cameras.{view}"
            if view in options.depth:
                raise ConfigError(f"{said} records colours; leave the view out of {field}.depth, or {named}")
            raise ConfigError(
                f"{said} has one channel (depth, or grey), and views are RGB; {named}, or read it as depth with "
                f"{field}.depth.{view}: [0.1, 2.0], its bounds in metres"
            )
        if not key:
            raise no_camera(where, view, have, field)
        if key in result.values():
            raise ConfigError(f"{field}.cameras: {key!r} serves two views; name another camera for one of them")
        result[view] = key
    return tuple(result.items())


def _depths(dataset: Dataset, cameras: tuple[tuple[str, str], ...], options: LeRobotOptions) -> dict[str, Depth]:
    """Depth cameras: their bounds as declared, the scale of a video's codes as recorded."""
    result = {}
    for view, key in cameras:
        if view in options.depth:
            feature, where = dataset.info.features[key], f"{dataset.where}: features.{key}"
            scale = code_scale(feature.details, where) if feature.dtype == "video" else None
            result[key] = Depth(*options.depth[view], scale)
    return result
