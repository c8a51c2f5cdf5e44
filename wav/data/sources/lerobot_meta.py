"""What a LeRobot dataset says about itself: version, features and tasks of ``meta/``.

Only what is needed is read. ``meta/stats.json`` never is: its quantiles are means of the episodes' quantiles, so the
statistics are our own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from wav.data.sources.damage import unreadable
from wav.errors import ConfigError, DataError
from wav.io.files import read_json
from wav.parameter_files import explain

DOWNLOAD = "download the dataset again"
#: an index or count; tables that went through pandas hold whole numbers as 1.0
Natural = Annotated[int, Field(ge=0)]
Model = TypeVar("Model", bound=BaseModel)


def _names(raw: Any) -> tuple[str, ...]:
    """Names of dimensions: a list, a list of lists or a mapping of lists."""
    if isinstance(raw, str):
        return (raw,)
    if isinstance(raw, dict):
        return _names(list(raw.values()) if all(isinstance(v, list) for v in raw.values()) else list(raw))
    return tuple(name for part in raw for name in _names(part)) if isinstance(raw, list) else ()


class Feature(BaseModel):
    """A column or camera: dtype as LeRobot names it, shape, names of the dimensions."""

    model_config = ConfigDict(frozen=True, extra="allow")

    dtype: str
    shape: tuple[int, ...]
    names: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    info: dict[str, Any] | None = None
    video_info: dict[str, Any] | None = None

    @property
    def is_camera(self) -> bool:
        """Whether it holds pictures."""
        return self.dtype in ("video", "image")

    @property
    def details(self) -> Mapping[str, Any]:
        """What else the metadata say of a camera, wherever a version of LeRobot puts it."""
        return {**(self.model_extra or {}), **(self.video_info or {}), **(self.info or {})}

    @property
    def depth(self) -> bool:
        """Whether it is a camera of one channel: depth, or grey."""
        said = self.details.get("is_depth_map") or self.details.get("video.is_depth_map")
        one = len(self.shape) == 2 or (len(self.shape) == 3 and 1 in (self.shape[0], self.shape[2]))
        return self.is_camera and bool(said or one)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of an image or video, channels first or last; None where the metadata does not tell."""
        if len(self.shape) != 3:
            return None
        told = self.names[:1] in (("channels",), ("channel",))
        first = told or (self.shape[0] in (1, 3) and self.shape[2] not in (1, 3))
        return (self.shape[1], self.shape[2]) if first else (self.shape[0], self.shape[1])


class Info(BaseModel):
    """``meta/info.json``."""

    codebase_version: Literal["v2.0", "v2.1", "v3.0"]
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
    features: dict[str, Feature]
    data_path: str
    video_path: str | None = None
    chunks_size: Annotated[int, Field(gt=0)] = 1000
    robot_type: Any = None
    total_episodes: Any = None


class Task(BaseModel):
    """A row of the table of tasks."""

    task_index: Natural
    task: str


@dataclass(frozen=True)
class Dataset:
    """Metadata of a dataset."""

    root: Path
    info: Info
    tasks: Mapping[int, str]
    """task_index -> instruction."""

    @property
    def where(self) -> Path:
        """The file that ``info`` is of."""
        return self.root / "meta" / "info.json"


def open_dataset(path: str) -> Dataset:
    """What ``meta/`` at ``path`` says of all episodes; DataError where it is damaged, ConfigError for no folder."""
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise ConfigError(f"ingest.path = {path!r}: no such folder; give the folder of a LeRobot dataset (with meta/)")
    where = root / "meta" / "info.json"
    raw = read_json(where, f"give the folder of a LeRobot dataset, or {DOWNLOAD}")
    info = checked(Info, raw, where, f"{DOWNLOAD}, or convert it with lerobot's own scripts")
    return Dataset(root, info, {task.task_index: task.task for task in _tasks(root, info.codebase_version)})


def checked(model: type[Model], raw: Any, where: str | Path, remedy: str = DOWNLOAD) -> Model:
    """What a file holds as ``model``; DataError names ``where``, the field and its value where it does not fit."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{explain(error, model, str(where))}; {remedy}") from None


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, which need not keep to one a line; a byte order mark is no part of them."""
    rows, decoder = [], json.JSONDecoder()
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        while text:
            row, end = decoder.raw_decode(text)
            rows.append(row)
            text = text[end:].lstrip()
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, "JSON-lines file", error) from None
    return rows


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a parquet file into a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise unreadable(path, "parquet file", error) from None


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Columns of a parquet file, those that it has; DataError where it is missing or damaged."""
    with damage_named(path):
        have = pq.read_schema(path).names
        wanted = have if columns is None else [name for name in columns if name in have]
        return pq.read_table(path, columns=wanted, use_threads=False)


def _tasks(root: Path, version: str) -> Iterator[Task]:
    if version == "v3.0":
        path = root / "meta" / "tasks.parquet"
        rows = read_parquet(path, ["task_index", "task", "__index_level_0__"]).to_pylist()
        rows = [{"task": row.get("__index_level_0__")} | row for row in rows]  # the text may be pandas' index
    else:
        path = root / "meta" / "tasks.jsonl"
        rows = lines(path)
    for row in rows:
        yield checked(Task, row, path)
