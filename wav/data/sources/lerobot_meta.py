"""What a LeRobot dataset says about itself: version, features and tasks of ``meta/``.

Only what is needed is read. ``meta/stats.json`` never is: its quantiles are means of the episodes' quantiles, so the
statistics are our own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wav.data.sources.damage import unreadable
from wav.errors import ConfigError, DataError
from wav.io.files import read_json

VERSIONS = ("v2.0", "v2.1", "v3.0")
DOWNLOAD = "download the dataset again"


@dataclass(frozen=True)
class Feature:
    """A column or camera: dtype as LeRobot names it, shape, names of the dimensions."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    depth: bool = False
    """A camera of one channel: depth, or grey."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the metadata say of a camera."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of an image or video, channels first or last; None where the metadata does not tell."""
        if len(self.shape) != 3:
            return None
        told = self.names[:1] in (("channels",), ("channel",))
        first = told or (self.shape[0] in (1, 3) and self.shape[2] not in (1, 3))
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
    info: Mapping[str, Any]
    """``meta/info.json``."""

    @property
    def where(self) -> Path:
        """The file that ``info`` is of."""
        return self.root / "meta" / "info.json"


def open_dataset(path: str) -> Dataset:
    """Read what ``meta/`` of the dataset at ``path`` says of all its episodes.

    Raises:
        ConfigError: no such folder.
        DataError: an unknown version, or a missing or damaged file.
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
    fps = positive(info, "fps", where)
    raw = part(info, "features", where)
    if not isinstance(raw, dict):
        raise DataError(f"{where}: features is {type(raw).__name__} where an object is expected; {DOWNLOAD}")
    features = {str(key): _feature(value, f"{where}: features.{key}") for key, value in raw.items()}
    return Dataset(root, version, fps, str(info.get("robot_type")), features, _tasks(root, version), info)


def part(raw: Any, name: str, where: Path) -> Any:
    """A required field of a mapping.

    Raises:
        DataError: it is not there.
    """
    if not isinstance(raw, dict) or name not in raw:
        raise DataError(f"{where}: field {name!r} is missing; {DOWNLOAD}")
    return raw[name]


def positive(raw: Any, name: str, where: Path) -> float:
    """A required number above 0.

    Raises:
        DataError: it is missing or no such number.
    """
    value = part(raw, name, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise DataError(f"{where}: {name} = {value!r}: must be a positive number; correct it")
    return float(value)


def natural(raw: Any, name: str, where: Path) -> int:
    """A required index or count; tables that went through pandas hold whole numbers as 1.0.

    Raises:
        DataError: it is missing, below 0 or no whole number.
    """
    value = part(raw, name, where)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise DataError(f"{where}: {name} = {value!r}: must be a number from 0 on; {DOWNLOAD}")
    return int(value)


def _feature(raw: Any, where: str) -> Feature:
    if not isinstance(raw, dict) or "dtype" not in raw or "shape" not in raw:
        raise DataError(f"{where}: needs dtype and shape; {DOWNLOAD}")
    shape = raw["shape"]
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise DataError(f"{where}: shape = {shape!r}: must be a list of integers; {DOWNLOAD}")
    camera = raw["dtype"] in ("video", "image")
    parts = [part for part in (raw, raw.get("video_info"), raw.get("info")) if isinstance(part, dict)]
    details = {str(key): value for part in parts for key, value in part.items()} if camera else {}
    said = bool(details.get("is_depth_map") or details.get("video.is_depth_map"))
    depth = camera and (said or len(shape) == 2 or (len(shape) == 3 and 1 in (shape[0], shape[2])))
    return Feature(str(raw["dtype"]), tuple(shape), _names(raw.get("names")), depth, details)


def _names(raw: Any) -> tuple[str, ...]:
    """Names of dimensions: a list, a list of lists or a mapping of lists."""
    if isinstance(raw, str):
        return (raw,)
    if isinstance(raw, dict):
        return _names(list(raw.values()) if all(isinstance(v, list) for v in raw.values()) else list(raw))
    return tuple(name for part in raw for name in _names(part)) if isinstance(raw, list) else ()


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, which need not keep to one a line; a byte order mark is no part of them."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "JSON-lines file", error) from None
    rows, decoder = [], json.JSONDecoder()
    while text:
        try:
            row, end = decoder.raw_decode(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise unreadable(path, "JSON-lines file", error) from None
        rows.append(row)
        text = text[end:].lstrip()
    return rows


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a parquet file into a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise unreadable(path, "parquet file", error) from None


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
        return {natural(row, "task_index", path): str(part(row, "task", path)) for row in lines(path)}
    path = root / "meta" / "tasks.parquet"
    names = parquet_columns(path) if path.is_file() else []
    text = next((name for name in ("task", "__index_level_0__") if name in names), "")
    if not text or "task_index" not in names:
        raise DataError(f"{path}: needs columns task_index and task, has {', '.join(names) or 'none'}; {DOWNLOAD}")
    rows = read_parquet(path, ["task_index", text]).to_pylist()
    return {natural(row, "task_index", path): str(row[text]) for row in rows}
