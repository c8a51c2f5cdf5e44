"""Episodes of a LeRobot dataset, read one by one as :mod:`wav.data.sources.lerobot` has planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import dataset as tables

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import ABSOLUTE_ACTIONS, DELTA_ACTIONS
from wav.data.episode import Episode
from wav.data.names import full_name
from wav.data.sources import checks
from wav.data.sources.depth import Depth
from wav.data.sources.frames import decode_image, preparation
from wav.data.sources.lerobot_entries import Entry
from wav.data.sources.lerobot_meta import DOWNLOAD, Dataset, damage_named
from wav.data.sources.open_files import files_closed, stays_open
from wav.data.sources.options import LeRobotOptions
from wav.data.sources.staging import judged
from wav.data.sources.state_names import StateColumns
from wav.data.sources.videos import Clip, decode_video
from wav.data.store import Rejection
from wav.errors import DataError

_SAMPLES = 6  # episodes whose numbers decide the gripper, and whether joints are in radians
_INTEGERS: tuple[Callable[[pa.DataType], bool], str] = (pa.types.is_integer, "integers")
#: column -> (test of its type, what it should hold)
_SCALARS = {
    **dict.fromkeys(("episode_index", "frame_index", "task_index"), _INTEGERS),
    "timestamp": (pa.types.is_floating, "seconds as floating-point numbers"),
}
#: a parquet file of episodes; of its row groups only those are read that may hold an episode's rows
open_rows = stays_open(lambda path: tables.dataset(path, format="parquet"))


@dataclass(frozen=True)
class Plan:
    """How the dataset is read: what every reading process needs besides the settings."""

    dataset: Dataset
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

    def names(self, key: str) -> tuple[str, ...]:
        """Names of a feature's numbers."""
        return self.dataset.info.features[key].names

    def numbers(self, table: pa.Table, key: str) -> checks.Floats:
        """A feature's column as (T, width)."""
        return _numbers(table, key, self.dataset.info.features[key].shape[0])


def episode_rows(entry: Entry, columns: list[str]) -> pa.Table:
    """Columns, and ``frame_index``, of one episode, by frame; DataError for one that is missing or of another type."""
    wanted = list(dict.fromkeys([*columns, "frame_index"]))
    with damage_named(entry.data):
        file = open_rows(entry.data)
        for name in (*wanted, "episode_index"):
            if name not in file.schema.names:
                raise DataError(f"{entry.data}: column {name!r} is missing; {DOWNLOAD}")
            kind, (fits, holds) = file.schema.field(name).type, _SCALARS.get(name, (lambda _: True, ""))
            if not fits(kind):
                raise DataError(f"{entry.data}: column {name!r} has type {kind}; record {holds}")
        mine = tables.field("episode_index") == entry.index
        return file.to_table(columns=wanted, filter=mine, use_threads=False).sort_by("frame_index")


def gripper_samples(plan: Plan, entries: tuple[Entry, ...]) -> Iterator[tuple[checks.Floats, checks.Floats]]:
    """(command, opening) of a few episodes from all over the dataset; DataError where none of them is sound."""
    for state, command in _samples(plan, entries):
        if len(command):
            yield command[:, 6], state[:, 6] - state[:, 7]


def check_units(plan: Plan, entries: tuple[Entry, ...], options: LeRobotOptions) -> None:
    """Refuse joints that are no radians before anything is read; ConfigError as :func:`.checks.to_radians`."""
    for state, action in _samples(plan, entries):
        for key, rows in ((plan.state, state), (plan.action, action)):
            checks.to_radians(rows, plan.names(key), options, f"feature {key!r}")


def _samples(plan: Plan, entries: tuple[Entry, ...]) -> Iterator[tuple[checks.Floats, checks.Floats]]:
    """(state, action) rows of a few episodes from all over the dataset."""
    refused: DataError | None = None
    sound = False
    with files_closed():
        for entry in entries[:: max(1, len(entries) // _SAMPLES)][:_SAMPLES]:
            try:
                table = episode_rows(entry, [plan.state, plan.action])
                state, action = _state(plan, table), plan.numbers(table, plan.action)
            except DataError as error:
                refused = refused or DataError(f"episode {entry.index}: {error}")
                continue
            sound = True
            yield state, action
    if refused is not None and not sound:
        raise refused


def _state(plan: Plan, table: pa.Table) -> checks.Floats:
    """States (T, D): end-effector poses in this library's layout, joints as recorded."""
    rows = plan.numbers(table, plan.state)
    if plan.columns is None:
        return rows
    if not len(rows):
        return np.zeros((0, 8))
    state = plan.columns(rows)
    checks.check_state_layout(state)
    return state


def read_episodes(
    plan: Plan, entries: tuple[Entry, ...], data: DataSettings, settings: IngestSettings
) -> Iterator[Episode | Rejection]:
    """Episodes one by one; one that is not sound comes as a Rejection with file, episode and field."""
    for entry in entries:
        name = f"{full_name(data.suite, entry.task or 'no_task')}/episode_{entry.index:06d}"
        yield judged(name, entry.task, f"episode {entry.index}", settings, _read, plan, entry, name, data, settings)


def _read(plan: Plan, entry: Entry, name: str, data: DataSettings, settings: IngestSettings) -> Episode:
    if entry.fault:
        raise DataError(entry.fault)
    with damage_named(entry.data):
        return _read_episode(plan, entry, name, data, settings.lerobot)


def _read_episode(plan: Plan, entry: Entry, name: str, data: DataSettings, options: LeRobotOptions) -> Episode:
    """One episode; DataError names file, field and remedy."""
    columns = ["frame_index", "timestamp", "task_index", plan.state, plan.action]
    columns += [plan.joints] if plan.joints else []
    columns += ["next.success"] if plan.success else []
    table = episode_rows(entry, columns)
    _check_rows(plan, entry, table)
    state, actions = _state(plan, table), plan.numbers(table, plan.action)
    if plan.kind == DELTA_ACTIONS:
        checks.check_deltas(actions)
        actions = np.array(actions)
        actions[:, 6] = checks.canonical_gripper(actions[:, 6], plan.gripper)
    else:
        state = checks.to_radians(state, plan.names(plan.state), options, plan.state)
        actions = checks.to_radians(actions, plan.names(plan.action), options, plan.action)
    if plan.success and not any(table["next.success"].to_pylist()):
        raise DataError(f"{entry.data}: next.success is never true: the demonstration failed; drop it at the source")
    keep = checks.keep_steps(actions) if options.drop_noops else np.ones(len(actions), bool)
    joints = _joints(plan, table, state)
    return Episode(
        episode_id=name,
        task=entry.task,
        instruction=entry.instructions[0],
        images={view: _images(plan, entry, key, keep, data) for view, key in plan.cameras},
        state=state[keep].astype(np.float32),
        joints=None if joints is None else joints[keep].astype(np.float32),
        actions=actions[keep].astype(np.float32),
        source=f"lerobot:{plan.dataset.info.codebase_version}#{entry.index}",
    )


def _check_rows(plan: Plan, entry: Entry, table: pa.Table) -> None:
    """Frames complete, evenly timed, and of the task the metadata names."""
    frames, fps = table["frame_index"].to_numpy(), plan.dataset.info.fps
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
    late = np.abs(times - frames / fps)
    if not (late < 0.5 / fps).all():
        step = int(np.argmax(~(late < 0.5 / fps)))
        raise DataError(
            f"{entry.data}: timestamp of frame {step} is {float(times[step]):.4f} s where fps = {fps:g} gives "
            f"{step / fps:.4f} s; drop the episode or correct fps"
        )
    tasks = {
        plan.dataset.tasks.get(index, f"(unknown index {index})") for index in table["task_index"].unique().to_pylist()
    }
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
    angles = plan.numbers(table, plan.joints)
    return np.concatenate([angles, state[:, 6:7] - state[:, 7:8]], axis=1) if angles.shape[1] == 7 else angles


def _images(plan: Plan, entry: Entry, key: str, keep: NDArray[np.bool_], data: DataSettings) -> NDArray[np.uint8]:
    """(kept, height, width, 3) frames of a camera; encoded images of an episode are held, decoded ones one by one."""
    target = "camera" if plan.rotation == "camera" else "180"
    prepare = preparation(plan.rotation, target, False, data.image_height, data.image_width)
    info, depth = plan.dataset.info, plan.depths.get(key)
    feature = info.features[key]
    if feature.dtype == "video":
        video = next(video for video in entry.videos if video.key == key)
        clip = Clip(video.path, video.start, entry.length, info.fps, feature.image_size, video.alone, depth)
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
