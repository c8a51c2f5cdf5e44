"""Episodes of a LeRobot dataset, read one by one as :mod:`wav.data.sources.lerobot` has planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from wav.data.conventions import ABSOLUTE_ACTIONS, DELTA_ACTIONS
from wav.data.episode import Episode
from wav.data.names import full_name
from wav.data.sources import checks
from wav.data.sources.depth import Depth
from wav.data.sources.frames import decode_image, preparation
from wav.data.sources.lerobot_entries import Entry
from wav.data.sources.lerobot_meta import Feature
from wav.data.sources.lerobot_rows import episode_rows
from wav.data.sources.open_files import files_closed
from wav.data.sources.state_names import StateColumns
from wav.data.sources.videos import Clip, decode_video
from wav.data.store import Rejection
from wav.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings
    from wav.data.sources.options import LeRobotOptions

_SAMPLES = 6  # episodes whose numbers decide the gripper, and whether joints are in radians


@dataclass(frozen=True)
class Plan:
    """How the dataset is read: what every reading process needs besides the settings."""

    version: str
    fps: float
    features: Mapping[str, Feature]
    tasks: Mapping[int, str]
    state: str
    action: str
    joints: str
    cameras: tuple[tuple[str, str], ...]
    """(view, key)."""
    kind: str
    """Kind of action, as in Conventions.action."""
    columns: StateColumns | None
    """Of the end-effector state; None: joints."""
    rotation: str
    gripper: str
    success: bool
    """The dataset has a column next.success."""
    depths: Mapping[str, Depth]
    """Camera -> how its frames become pictures, of depth cameras."""


def gripper_samples(plan: Plan, entries: tuple[Entry, ...]) -> Iterator[tuple[checks.Floats, checks.Floats]]:
    """(command, opening) of a few episodes from all over the dataset; unsound ones are judged when they are read.

    Raises:
        DataError: none of them is sound; what is wrong with the first.
    """
    for state, command in _samples(plan, entries):
        if len(command):
            yield command[:, 6], state[:, 6] - state[:, 7]


def check_units(plan: Plan, entries: tuple[Entry, ...], options: LeRobotOptions) -> None:
    """Refuse joints that are no radians before anything is read; ConfigError as :func:`.checks.to_radians`."""
    for state, action in _samples(plan, entries):
        for key, rows in ((plan.state, state), (plan.action, action)):
            checks.to_radians(rows, plan.features[key].names, options, f"feature {key!r}")


def _samples(plan: Plan, entries: tuple[Entry, ...]) -> Iterator[tuple[checks.Floats, checks.Floats]]:
    """(state, action) rows of a few episodes from all over the dataset."""
    refused: DataError | None = None
    sound = False
    with files_closed():
        for entry in entries[:: max(1, len(entries) // _SAMPLES)][:_SAMPLES]:
            try:
                table = episode_rows(entry, [plan.state, plan.action])
                state, action = _state(plan, table), _numbers(table, plan.action, plan.features[plan.action].shape[0])
            except DataError as error:
                refused = refused or DataError(f"episode {entry.index}: {error}")
                continue
            sound = True
            yield state, action
    if refused is not None and not sound:
        raise refused


def _state(plan: Plan, table: pa.Table) -> checks.Floats:
    """States (T, D): end-effector poses in this library's layout, joints as recorded."""
    rows = _numbers(table, plan.state, plan.features[plan.state].shape[0])
    if plan.columns is None:
        return rows
    if not len(rows):
        return np.zeros((0, 8))
    state = plan.columns(rows)
    checks.check_state_layout(state)
    return state


def read_episodes(
    plan: Plan, entries: tuple[Entry, ...], names: tuple[str, ...], data: DataSettings, settings: IngestSettings
) -> Iterator[Episode | Rejection]:
    """Episodes one by one; one that is not sound comes as a Rejection with the DataError's file, episode and field."""
    for entry, task in zip(entries, names, strict=True):
        name = f"{full_name(data.suite, task or 'no_task')}/episode_{entry.index:06d}"
        try:
            if entry.fault:
                raise DataError(entry.fault)
            episode = _read_episode(plan, entry, task, name, data, settings)
            episode.validate()
        except (ConfigError, DataError, OSError, pa.ArrowException) as error:
            yield Rejection(name, task, f"episode {entry.index}: {' '.join(str(error).split())}")
            continue
        yield episode


def _read_episode(
    plan: Plan, entry: Entry, task: str, name: str, data: DataSettings, settings: IngestSettings
) -> Episode:
    """One episode; DataError names file, field and remedy."""
    columns = ["frame_index", "timestamp", "task_index", plan.state, plan.action]
    columns += [plan.joints] if plan.joints else []
    columns += ["next.success"] if plan.success else []
    table = episode_rows(entry, columns)
    _check_rows(plan, entry, table)
    state, actions = _state(plan, table), _numbers(table, plan.action, data.action_dim)
    if plan.kind == DELTA_ACTIONS:
        checks.check_deltas(actions)
        actions = np.array(actions)
        actions[:, 6] = checks.canonical_gripper(actions[:, 6], plan.gripper)
    else:
        names = {key: plan.features[key].names for key in (plan.state, plan.action)}
        state = checks.to_radians(state, names[plan.state], settings.lerobot, plan.state)
        actions = checks.to_radians(actions, names[plan.action], settings.lerobot, plan.action)
    if plan.success and not any(table["next.success"].to_pylist()):
        raise DataError(f"{entry.data}: next.success is never true: the demonstration failed; drop it at the source")
    keep = checks.keep_steps(actions) if settings.lerobot.drop_noops else np.ones(len(actions), bool)
    if keep.sum() < settings.min_length:
        raise DataError(f"{int(keep.sum())} steps, fewer than ingest.min_length = {settings.min_length}")
    joints = _joints(plan, table, state)
    return Episode(
        episode_id=name,
        task=task,
        instruction=entry.instructions[0],
        images={view: _images(plan, entry, key, keep, data) for view, key in plan.cameras},
        state=state[keep].astype(np.float32),
        joints=None if joints is None else joints[keep].astype(np.float32),
        actions=actions[keep].astype(np.float32),
        expert_actions=None,
        success=True,
        init_index=-1,
        seed=-1,
        source=f"lerobot:{plan.version}#{entry.index}",
    )


def _check_rows(plan: Plan, entry: Entry, table: pa.Table) -> None:
    """Frames complete, evenly timed, and of the task the metadata names."""
    frames = table["frame_index"].to_numpy()
    if not entry.length:
        raise DataError(f"{entry.data}: the metadata says length = 0; drop the episode at the source")
    if len(frames) != entry.length:
        more = len(frames) > entry.length
        raise DataError(
            f"{entry.data}: holds {len(frames)} rows of the episode where the metadata says {entry.length}; "
            + ("some are left from a recording that failed; drop the episode" if more else "download the file again")
        )
    frames = frames - frames[0]  # some count on from episode to episode
    if not np.array_equal(frames, np.arange(entry.length)):
        step = int(np.argmax(frames != np.arange(entry.length)))
        raise DataError(
            f"{entry.data}: frame_index does not count the frames: it goes from {frames[step - 1]} to {frames[step]} "
            f"at row {step}; drop the episode"
        )
    times = table["timestamp"].to_numpy()
    late = np.abs(times - frames / plan.fps)
    if not (late < 0.5 / plan.fps).all():
        step = int(np.argmax(~(late < 0.5 / plan.fps)))
        raise DataError(
            f"{entry.data}: timestamp of frame {step} is {float(times[step]):.4f} s where fps = {plan.fps:g} gives "
            f"{step / plan.fps:.4f} s; drop the episode or correct fps"
        )
    tasks = {plan.tasks.get(index, f"(unknown index {index})") for index in table["task_index"].unique().to_pylist()}
    if tasks != set(entry.instructions):
        raise DataError(
            f"{entry.data}: task_index means {sorted(tasks)} where the episode's metadata says "
            f"{list(entry.instructions)}; download the dataset again"
        )


def _numbers(table: pa.Table, name: str, width: int) -> NDArray[np.floating]:
    """A finite column of vectors as (T, width)."""
    column = table[name].combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise DataError(f"column {name!r} has type {kind}; record lists of float32")
    values = column.flatten()
    if column.null_count or values.null_count or len(values) != len(column) * width:
        raise DataError(f"column {name!r} holds rows that are not {width} numbers; record every step")
    array = values.to_numpy(zero_copy_only=False).reshape(len(column), width)
    if not np.isfinite(array).all():
        step = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise DataError(f"column {name!r} holds NaN or infinity at step {step}; repair or drop the episode")
    return np.asarray(array)


def _joints(plan: Plan, table: pa.Table, state: NDArray[np.floating]) -> NDArray[np.floating] | None:
    """Joint angles (rad) with the gripper: the state itself, or a column beside an end-effector state."""
    if plan.kind == ABSOLUTE_ACTIONS:
        return state
    if not plan.joints:
        return None
    angles = _numbers(table, plan.joints, plan.features[plan.joints].shape[0])
    return np.concatenate([angles, state[:, 6:7] - state[:, 7:8]], axis=1) if angles.shape[1] == 7 else angles


def _images(plan: Plan, entry: Entry, key: str, keep: NDArray[np.bool_], data: DataSettings) -> NDArray[np.uint8]:
    """(kept, height, width, 3) frames of a camera; encoded images of an episode are held, decoded ones one by one."""
    target = "camera" if plan.rotation == "camera" else "180"
    prepare = preparation(plan.rotation, target, False, data.image_height, data.image_width)
    feature, depth = plan.features[key], plan.depths.get(key)
    if feature.dtype == "video":
        video = next(video for video in entry.videos if video.key == key)
        clip = Clip(video.path, video.start, entry.length, plan.fps, feature.image_size, video.alone, depth)
        frames = decode_video(clip, prepare)
        return frames if keep.all() else frames[keep]
    column = episode_rows(entry, [key])[key].combine_chunks()
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise DataError(f"{entry.data}: column {key!r} has type {column.type}; store images as bytes, or as video")
    pictures = column.field("bytes")
    places = np.flatnonzero(keep)
    where = f"{entry.data}: {key}: frame"
    pixels = depth.image if depth else None
    decoded = (decode_image(pictures[int(i)].as_py(), feature.image_size, f"{where} {i}", pixels) for i in places)
    return prepare.stack(decoded, len(places))
