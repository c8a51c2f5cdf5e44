"""What a LeRobot dataset says about itself: versions 2.0, 2.1 and 3.0, as one table of episodes.

v2.x: one parquet (and one mp4 per camera) for each episode, ``meta/episodes.jsonl``, ``meta/tasks.jsonl``.
v3.0: many episodes in one parquet and one mp4, found through ``meta/episodes/chunk-*/file-*.parquet`` and
``meta/tasks.parquet``. Only columns that are needed are read; statistics are our own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wav.errors import ConfigError, DataError
from wav.io.files import read_json

VERSIONS = ("v2.0", "v2.1", "v3.0")
DOWNLOAD = "download the dataset again"


@dataclass(frozen=True)
class Video:
    """Where an episode's frames of one camera begin."""

    key: str
    path: Path
    start: float
    """Time (s) of the episode's first frame in the file."""
    alone: bool
    """The file is this episode's (v2.x). In v3.0 the metadata names a range of it; frames in no range are nobody's."""


@dataclass(frozen=True)
class Entry:
    """One episode of the dataset."""

    index: int
    length: int
    instructions: tuple[str, ...]
    data: Path
    videos: tuple[Video, ...]


@dataclass(frozen=True)
class Feature:
    """A column or camera: dtype as LeRobot names it, shape, names of the dimensions."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of an image or video, channels first or last; None where the metadata does not tell."""
        if len(self.shape) != 3:
            return None
        first = self.names[:1] in (("channels",), ("channel",)) or (self.shape[0] == 3 and self.shape[2] != 3)
        return (self.shape[1], self.shape[2]) if first else (self.shape[0], self.shape[1])


@dataclass(frozen=True)
class Dataset:
    """Metadata of a dataset."""

    root: Path
    version: str
    fps: float
    robot: str
    features: Mapping[str, Feature]
    tasks: Mapping[int, str]
    entries: tuple[Entry, ...]


def open_dataset(path: str) -> Dataset:
    """Read ``meta/`` of the dataset at ``path`` and check that every file it names is there.

    Raises:
        ConfigError: no such folder.
        DataError: an unknown version, or a missing, damaged or inconsistent file.
    """
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise ConfigError(f"ingest.path = {path!r}: no such folder; give the folder of a LeRobot dataset (with meta/)")
    where = root / "meta" / "info.json"
    info = read_json(where, f"give the folder of a LeRobot dataset, or {DOWNLOAD}")
    version = str(info.get("codebase_version")) if isinstance(info, dict) else "none"
    if version not in VERSIONS:
        raise DataError(
            f"{where}: codebase_version = {version!r} is unknown; this reader knows {', '.join(VERSIONS)}, so convert "
            "the dataset with lerobot's own scripts"
        )
    fps = _number(info, "fps", where)
    raw = _part(info, "features", where)
    if not isinstance(raw, dict):
        raise DataError(f"{where}: features is {type(raw).__name__} where an object is expected; {DOWNLOAD}")
    features = {str(key): _feature(value, f"{where}: features.{key}") for key, value in raw.items()}
    tasks = _tasks(root, version)
    keys = tuple(key for key, feature in features.items() if feature.dtype == "video")
    entries = (_entries_v3 if version == "v3.0" else _entries_v2)(root, info, keys, where)
    if not entries:
        raise DataError(f"{root}: lists no episode; {DOWNLOAD}")
    _check_present(entries)
    return Dataset(root, version, fps, str(info.get("robot_type")), features, tasks, entries)


def _check_present(entries: tuple[Entry, ...]) -> None:
    """Refuse an incomplete download, naming the first missing file and their number."""
    paths = {path for entry in entries for path in (entry.data, *(video.path for video in entry.videos))}
    missing = sorted(path for path in paths if not path.is_file())
    if missing:
        raise DataError(f"{missing[0]}: missing ({len(missing)} of {len(paths)} files of the dataset are); {DOWNLOAD}")


def _part(raw: Any, name: str, where: Path) -> Any:
    """A required field of a mapping."""
    if not isinstance(raw, dict) or name not in raw:
        raise DataError(f"{where}: field {name!r} is missing; {DOWNLOAD}")
    return raw[name]


def _number(raw: Any, name: str, where: Path) -> float:
    value = _part(raw, name, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise DataError(f"{where}: {name} = {value!r}: must be a positive number; correct it")
    return float(value)


def _natural(raw: Any, name: str, where: Path) -> int:
    """A required index or count."""
    value = _part(raw, name, where)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{where}: {name} = {value!r}: must be a number from 0 on; {DOWNLOAD}")
    return value


def _sentences(raw: Any, where: Path) -> tuple[str, ...]:
    """An episode's field ``tasks``."""
    value = _part(raw, "tasks", where)
    if not isinstance(value, list) or not value or not all(isinstance(task, str) for task in value):
        raise DataError(
            f"{where}: tasks of episode {raw.get('episode_index')} = {value!r}: must be a list of instructions; "
            f"{DOWNLOAD}"
        )
    return tuple(value)


def _feature(raw: Any, where: str) -> Feature:
    if not isinstance(raw, dict) or "dtype" not in raw or "shape" not in raw:
        raise DataError(f"{where}: needs dtype and shape; {DOWNLOAD}")
    shape = raw["shape"]
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise DataError(f"{where}: shape = {shape!r}: must be a list of integers; {DOWNLOAD}")
    return Feature(str(raw["dtype"]), tuple(shape), _names(raw.get("names")))


def _names(raw: Any) -> tuple[str, ...]:
    """Names of dimensions: a list, a list of lists or a mapping of lists."""
    if isinstance(raw, str):
        return (raw,)
    if isinstance(raw, dict):
        return _names(list(raw.values()) if all(isinstance(v, list) for v in raw.values()) else list(raw))
    return tuple(name for part in raw for name in _names(part)) if isinstance(raw, list) else ()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {DOWNLOAD}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); {DOWNLOAD}") from None
    return rows


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a parquet file into a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {DOWNLOAD}") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: truncated or damaged parquet ({' '.join(str(error).split())}); {DOWNLOAD}") from None


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Columns of a parquet file.

    Raises:
        DataError: it is missing, damaged, or lacks a column.
    """
    with damage_named(path):
        return pq.read_table(path, columns=columns, use_threads=False)


def parquet_columns(path: Path) -> list[str]:
    """Names of a parquet file's columns; DataError as :func:`read_parquet`."""
    with damage_named(path):
        return list(pq.read_schema(path).names)


def _tasks(root: Path, version: str) -> dict[int, str]:
    """task_index -> instruction."""
    if version != "v3.0":
        path = root / "meta" / "tasks.jsonl"
        return {_natural(row, "task_index", path): str(_part(row, "task", path)) for row in _lines(path)}
    path = root / "meta" / "tasks.parquet"
    names = parquet_columns(path) if path.is_file() else []
    text = next((name for name in ("task", "__index_level_0__") if name in names), "")
    if not text or "task_index" not in names:
        raise DataError(f"{path}: needs columns task_index and task, has {', '.join(names) or 'none'}; {DOWNLOAD}")
    rows = read_parquet(path, ["task_index", text]).to_pylist()
    return {_natural(row, "task_index", path): str(row[text]) for row in rows}


def _entries_v2(root: Path, info: dict[str, Any], keys: tuple[str, ...], where: Path) -> tuple[Entry, ...]:
    """Episodes of meta/episodes.jsonl."""
    chunk = int(_number(info, "chunks_size", where))
    path = root / "meta" / "episodes.jsonl"
    entries = []
    for row in _lines(path):
        index = _natural(row, "episode_index", path)
        place = {"episode_chunk": index // chunk, "episode_index": index}
        videos = tuple(
            Video(key, root / _placed(info, "video_path", where, video_key=key, **place), 0.0, alone=True)
            for key in keys
        )
        entries.append(
            Entry(
                index,
                _natural(row, "length", path),
                _sentences(row, path),
                root / _placed(info, "data_path", where, **place),
                videos,
            )
        )
    return tuple(sorted(entries, key=lambda entry: entry.index))


def _entries_v3(root: Path, info: dict[str, Any], keys: tuple[str, ...], where: Path) -> tuple[Entry, ...]:
    """Episodes of meta/episodes/*.parquet."""
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise DataError(f"{root / 'meta' / 'episodes'}: holds no chunk-*/file-*.parquet; {DOWNLOAD}")
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{part}" for key in keys for part in ("chunk_index", "file_index", "from_timestamp")]
    entries = []
    for path in files:
        lacking = [name for name in columns if name not in parquet_columns(path)]
        if lacking:
            raise DataError(f"{path}: column {lacking[0]!r} is missing; {DOWNLOAD}")
        for row in read_parquet(path, columns).to_pylist():
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            data = root / _placed(info, "data_path", where, **place)
            videos = tuple(_video_v3(root, info, key, row, path) for key in keys)
            index, length = _natural(row, "episode_index", path), _natural(row, "length", path)
            entries.append(Entry(index, length, _sentences(row, path), data, videos))
    return tuple(sorted(entries, key=lambda entry: entry.index))


def _video_v3(root: Path, info: dict[str, Any], key: str, row: dict[str, Any], where: Path) -> Video:
    place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
    path = root / _placed(info, "video_path", root / "meta" / "info.json", video_key=key, **place)
    start = row[f"videos/{key}/from_timestamp"]
    if not isinstance(start, (int, float)) or not 0 <= start < math.inf:
        name = f"videos/{key}/from_timestamp of episode {row['episode_index']}"
        raise DataError(f"{where}: {name} = {start!r}: must be seconds from 0 on; {DOWNLOAD}")
    return Video(key, path, float(start), alone=False)


def _placed(info: dict[str, Any], name: str, where: Path, **values: Any) -> str:
    """A path pattern of info.json filled in."""
    pattern = str(_part(info, name, where))
    try:
        return pattern.format(**values)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise DataError(f"{where}: {name} = {pattern!r}: cannot be filled in ({error}); {DOWNLOAD}") from None
