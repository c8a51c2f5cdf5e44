"""LeRobot datasets (v2.0, v2.1, v3.0): numbers in parquet, cameras as mp4 or as images in the parquet.

LeRobot's metadata does not tell how images are rotated, so ``image_rotation`` in ``ingest.lerobot`` must: "180" for
``lerobot/libero`` and the other LIBERO conversions (rotated already), "none" for a simulator's raw buffer, "camera" for
real robots. The gripper's sign is measured on the fingers or declared in ``gripper``. Actions are absolute
joint targets where action and state have the same named dimensions, OSC_POSE deltas for 7-D actions with the 8-D
end-effector state; anything else is declared in ``action``. LIBERO conversions declare 10 fps but ran at 20:
``control_hz``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wav.data.conventions import ABSOLUTE_ACTIONS, DELTA_ACTIONS, Conventions
from wav.data.sources import checks
from wav.data.sources.frames import described
from wav.data.sources.lerobot_episodes import Plan, gripper_samples, read_episodes
from wav.data.sources.lerobot_meta import Dataset, Entry, Feature, open_dataset, parquet_columns
from wav.data.sources.staging import DatasetSource, Job, grouped
from wav.data.state import STATE_LAYOUT
from wav.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings, LeRobotOptions

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

    Tasks are named by their instruction in lower case with underscores. Of each task the first
    ``ingest.episodes_per_task`` episodes are read.

    Raises:
        ConfigError: the path, a task or a camera is missing, or a convention must be declared.
        DataError: unknown version, missing or damaged metadata, wrong types.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        self.dataset: Dataset = open_dataset(settings.path)
        self.entries, self.names = _chosen(self.dataset, data, settings)
        self.plan = _plan(self.dataset, self.entries, data, settings)

    def conventions(self) -> Conventions:
        """Simulated frames end up rotated by 180 degrees, as the simulators here; a real camera's stay as they are."""
        plan, data = self.plan, self.data
        absolute = plan.kind == ABSOLUTE_ACTIONS
        names = self.dataset.features[plan.state].names
        layout = "joints: " + " ".join(names if len(names) == data.state_dim else [f"{data.state_dim}"])
        return Conventions(
            suite=data.suite,
            views=tuple(data.views),
            image_height=data.image_height,
            image_width=data.image_width,
            render="full",
            image_rotation="none" if plan.rotation == "camera" else "180",
            gripper="absolute" if absolute else checks.CANONICAL_GRIPPER,
            state_layout=layout if absolute else STATE_LAYOUT,
            control_hz=data.control_hz,
            action=plan.kind,
            simulator={},
        )

    def jobs(self) -> list[Job]:
        """A few episodes each, in the dataset's order."""
        data, frame = self.data, len(self.data.views) * self.data.image_height * self.data.image_width * 3
        jobs = []
        for part in grouped([entry.length * frame for entry in self.entries]):
            entries = self.entries[part.start : part.stop]
            names = self.names[part.start : part.stop]
            wanted = {key for _, key in self.plan.cameras}
            jobs.append(
                self.job(
                    read_episodes,
                    (self.plan, entries, names, data, self.settings),
                    sum(entry.length for entry in entries) * frame,
                    label=f"{self.dataset.root}: episodes {entries[0].index} to {entries[-1].index}",
                    episodes=len(entries),
                    files=[p for e in entries for p in (e.data, *(v.path for v in e.videos if v.key in wanted))],
                    identity=[[e.index, e.length, list(e.instructions), [v.start for v in e.videos]] for e in entries],
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
            "rotation_stored": plan.rotation,
            "gripper_stored": plan.gripper,
            "state": plan.state,
            "action": plan.action,
            "joints": plan.joints,
        }


def slug(text: str) -> str:
    """An instruction as a task's name: lower case, underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _chosen(
    dataset: Dataset, data: DataSettings, settings: IngestSettings
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Entries of the wanted tasks, at most ``episodes_per_task`` of each, and their task names."""
    wanted: dict[str, str] = {}
    for task in data.tasks:
        same = wanted.setdefault(slug(re.sub(r"^[A-Z_]*SCENE\d+_", "", task)), task)
        if same != task:
            raise ConfigError(
                f"data.tasks: {same!r} and {task!r} have one instruction, by which alone LeRobot tells tasks apart; "
                "leave one out, or ingest LIBERO's HDF5 files"
            )
    counts: dict[str, int] = {}
    entries, names = [], []
    for entry in dataset.entries:
        key = slug(entry.instructions[0]) if entry.instructions else ""
        if wanted and key not in wanted:
            continue
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= settings.episodes_per_task:
            entries.append(entry)
            names.append(wanted.get(key, key))
    missing = [task for key, task in wanted.items() if key not in counts]
    if missing:
        have = sorted({slug(text) for entry in dataset.entries for text in entry.instructions})
        raise ConfigError(f"data.tasks: {missing[0]!r} is not in {dataset.root}; it holds {', '.join(have[:50])}")
    return tuple(entries), tuple(names)


def _plan(dataset: Dataset, entries: tuple[Entry, ...], data: DataSettings, settings: IngestSettings) -> Plan:
    """Find columns, cameras and conventions, or say what must be declared."""
    options, features = settings.lerobot, dataset.features
    where = f"{dataset.root / 'meta' / 'info.json'}"
    state, action = _column(where, features, STATES), _column(where, features, ACTIONS)
    for name, key, wanted in (("state_dim", state, data.state_dim), ("action_dim", action, data.action_dim)):
        found = features[key]
        if found.dtype not in ("float32", "float64"):
            raise DataError(f"{where}: features.{key}.dtype = {found.dtype!r}; record float32")
        if found.shape != (wanted,):
            raise ConfigError(
                f"data.{name} = {wanted}: feature {key!r} of {where} has shape {list(found.shape)}; "
                f"set data.{name} to it"
            )
    checks.check_control_hz(dataset.fps, options, data.control_hz, f"{where}: fps")
    kind = _kind(where, features[state], features[action], options.action)
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
        cameras=_cameras(where, features, data, options),
        kind=kind,
        rotation=rotation,
        gripper="absolute",
        success="next.success" in parquet_columns(entries[0].data),
    )
    if kind == ABSOLUTE_ACTIONS:
        return plan
    detected = checks.detect_gripper(gripper_samples(plan, entries))
    gripper = checks.resolve_gripper(options, detected, "", where)
    return replace(plan, gripper=gripper)


def _column(where: str, features: Mapping[str, Feature], names: tuple[str, ...]) -> str:
    """The feature of one of these names."""
    found = next((name for name in names if name in features), "")
    if not found:
        raise DataError(
            f"{where}: has no feature {' or '.join(names)}; it has {', '.join(sorted(features))}; rename it"
        )
    return found


def _kind(where: str, state: Feature, action: Feature, declared: str) -> str:
    """Kind of action from the metadata, or as declared."""
    found = ""
    if action.names and action.names == state.names and len(action.names) == action.shape[0]:
        found = ABSOLUTE_ACTIONS
    elif action.shape == (7,) and state.shape == (8,):
        found = DELTA_ACTIONS
    kind = declared or found
    if not kind:
        raise ConfigError(
            f"{where}: {state.shape[0]}-D states with {action.shape[0]}-D actions do not tell the kind of action; "
            f"declare ingest.lerobot.action: {ABSOLUTE_ACTIONS} (joint targets) or {DELTA_ACTIONS}"
        )
    if kind == DELTA_ACTIONS and (action.shape, state.shape) != ((7,), (8,)):
        raise ConfigError(
            f"ingest.lerobot.action = {kind!r}: needs 7-D actions with the 8-D end-effector state, {where} has "
            f"{action.shape[0]} and {state.shape[0]}; declare {ABSOLUTE_ACTIONS}, or convert the dataset"
        )
    return kind


def _cameras(
    where: str, features: Mapping[str, Feature], data: DataSettings, options: LeRobotOptions
) -> tuple[tuple[str, str], ...]:
    """The camera's key for every view."""
    have = [key for key, feature in features.items() if feature.dtype in ("video", "image")]
    result = []
    for view in data.views:
        usual = [prefix + name for name in (view, *CAMERAS.get(view, ())) for prefix in PREFIXES]
        names = [options.cameras[view]] if view in options.cameras else usual
        key = next((name for name in names if name in have), "")
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
