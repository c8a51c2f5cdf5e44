"""The episodes of a LeRobot dataset as its metadata list them, and what speaks against each before it is read.

v2.x: one parquet (and one mp4 per camera) for each episode, ``meta/episodes.jsonl``.
v3.0: many episodes in one parquet and one mp4, found through ``meta/episodes/chunk-*/file-*.parquet``.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field

from wav.data.sources.lerobot_meta import DOWNLOAD, Dataset, Natural, checked, damage_named, lines, read_parquet
from wav.errors import DataError
from wav.io.files import inside

_LOG = logging.getLogger(__name__)


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
    """One; none or several only where ``fault`` says so."""
    data: Path
    videos: tuple[Video, ...]
    fault: str = ""
    """Why it must not be read; empty where nothing in the metadata speaks against it."""
    task: str = ""
    """Name of its task."""


def files_of(entry: Entry) -> tuple[Path, ...]:
    """The files that an episode's rows and frames lie in."""
    return (entry.data, *(video.path for video in entry.videos))


class _Listed(BaseModel):
    """An episode as the table of episodes has it; LeRobot's own image-to-video conversion leaves out ``tasks``."""

    length: Natural
    tasks: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value or [])] = []


class _Place(BaseModel):
    """Where v3.0 keeps an episode's rows."""

    chunk_index: Natural
    file_index: Natural


class _VideoPlace(_Place):
    """Where it keeps an episode's frames of a camera."""

    from_timestamp: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    to_timestamp: float | None = None


Place = TypeVar("Place", bound=_Place)


class _Index(BaseModel):
    episode_index: Natural


def read_entries(dataset: Dataset, cameras: tuple[str, ...]) -> tuple[Entry, ...]:
    """All episodes, by index, with the videos of ``cameras`` (keys of features) alone: others need not be there.

    DataError where the table of episodes cannot be read, or files are missing.
    """
    keys = tuple(key for key in cameras if dataset.info.features[key].dtype == "video")
    entries = list((_entries_v3 if dataset.info.codebase_version == "v3.0" else _entries_v2)(dataset, keys))
    if not entries:
        raise DataError(f"{dataset.root}: lists no episode; {DOWNLOAD}")
    total = dataset.info.total_episodes
    if total not in (None, len(entries)):
        _LOG.warning("%s: total_episodes = %s, but meta/ lists %d episodes", dataset.where, total, len(entries))
    _check_present(entries)
    entries = _without_overlap(_without_twins(entries), dataset.info.fps)
    return tuple(sorted(_instructed(dataset, entries), key=lambda entry: entry.index))


def _check_present(entries: list[Entry]) -> None:
    """Refuse an incomplete download, naming the first missing file and their number."""
    sound = [entry for entry in entries if not entry.fault]
    paths = {path for entry in sound for path in files_of(entry)}
    missing = sorted(path for path in paths if not path.is_file())
    if missing:
        raise DataError(f"{missing[0]}: missing ({len(missing)} of {len(paths)} files that are needed); {DOWNLOAD}")


def _entries_v2(dataset: Dataset, keys: tuple[str, ...]) -> Iterator[Entry]:
    """Episodes of meta/episodes.jsonl."""
    path = dataset.root / "meta" / "episodes.jsonl"
    for row in lines(path):
        index = checked(_Index, row, path).episode_index
        place = {"episode_chunk": index // dataset.info.chunks_size, "episode_index": index}
        data = _placed(dataset, "data_path", **place)
        videos = tuple(Video(key, _placed(dataset, "video_path", video_key=key, **place), 0.0, True) for key in keys)
        try:
            listed = checked(_Listed, row, path)
            yield Entry(index, listed.length, tuple(listed.tasks), data, videos)
        except DataError as error:
            yield Entry(index, 0, (), data, videos, str(error))


def _entries_v3(dataset: Dataset, keys: tuple[str, ...]) -> Iterator[Entry]:
    """Episodes of meta/episodes/*.parquet."""
    folder = dataset.root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise DataError(f"{folder}: holds no chunk-*/file-*.parquet: {_unfinished(dataset.root)}")
    columns = ["episode_index", "length", "tasks", *(f"data/{name}" for name in _Place.model_fields)]
    columns += [f"videos/{key}/{name}" for key in keys for name in _VideoPlace.model_fields]
    _placed(dataset, "data_path", chunk_index=0, file_index=0)  # a pattern that does not fit is no episode's fault
    for path in files:
        for row in read_parquet(path, columns).to_pylist():
            index = checked(_Index, row, path).episode_index
            try:
                listed, data = checked(_Listed, row, path), _place(_Place, row, "data", path)
                placed = _placed(dataset, "data_path", chunk_index=data.chunk_index, file_index=data.file_index)
                videos = tuple(_video_v3(dataset, key, listed.length, row, path) for key in keys)
                yield Entry(index, listed.length, tuple(listed.tasks), placed, videos)
            except DataError as error:
                yield Entry(index, 0, (), path, (), str(error))


def _place(model: type[Place], row: Mapping[str, Any], what: str, where: Path) -> Place:
    found = {name: row[f"{what}/{name}"] for name in model.model_fields if f"{what}/{name}" in row}
    return checked(model, found, f"{where}: {what}")


def _video_v3(dataset: Dataset, key: str, length: int, row: Mapping[str, Any], where: Path) -> Video:
    place, fps = _place(_VideoPlace, row, f"videos/{key}", where), dataset.info.fps
    start, end = place.from_timestamp, place.to_timestamp
    if end is not None and abs((end - start) * fps - length) > 1.5:
        raise DataError(
            f"{where}: videos/{key} runs from {start:g} to {end:g} s, which at fps = {fps:g} is not its length of "
            f"{length} frames; correct the metadata or drop the episode"
        )
    path = _placed(dataset, "video_path", video_key=key, chunk_index=place.chunk_index, file_index=place.file_index)
    return Video(key, path, start, alone=False)


def _unfinished(root: Path) -> str:
    """What a recording without a table of episodes still holds."""
    files = sorted((root / "data").glob("chunk-*/file-*.parquet"))
    rows = 0
    for path in files:
        try:
            rows += len(read_parquet(path, ["episode_index"]))
        except DataError:
            continue
    return (
        f"the recording was not finished (LeRobot writes them in dataset.finalize()), or not all of it was downloaded; "
        f"of its {len(files)} data files {rows} rows can be read, but not which videos belong to them; record or "
        "download it again"
    )


def _placed(dataset: Dataset, name: str, **values: Any) -> Path:
    """A path pattern of info.json filled in."""
    pattern = str(getattr(dataset.info, name))
    try:
        return inside(dataset.root, pattern.format(**values))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{dataset.where}: {name} = {pattern!r}: cannot be filled in ({error}); {DOWNLOAD}") from None


def _faulted(entries: list[Entry], faults: Mapping[int, str]) -> list[Entry]:
    """Entries (by place in the list) with their faults; one that has a fault keeps it."""
    return [replace(e, fault=faults[i]) if i in faults and not e.fault else e for i, e in enumerate(entries)]


def _without_twins(entries: list[Entry]) -> list[Entry]:
    """Of entries with one index, the first: which rows belong to which is unknown, so it is at fault."""
    counts = Counter(entry.index for entry in entries)
    single = list({entry.index: entry for entry in reversed(entries)}.values())[::-1]
    twice = {i: f"meta/ lists it {n} times; correct it" for i, e in enumerate(single) if (n := counts[e.index]) > 1}
    return _faulted(single, twice)


def _without_overlap(entries: list[Entry], fps: float) -> list[Entry]:
    """Faults for episodes that claim the same frames of a file, as after a bad merge: whose they are is unknown."""
    spans: dict[Path, list[tuple[float, float, int]]] = defaultdict(list)
    for place, entry in enumerate(entries):
        for video in entry.videos if not entry.fault else ():
            spans[video.path].append((video.start, video.start + (entry.length - 1) / fps, place))
    faults: dict[int, str] = {}
    for path, claims in spans.items():
        claims.sort()
        last = claims[0]
        for claim in claims[1:]:
            if claim[0] < last[1]:
                for mine, other in ((claim, last), (last, claim)):
                    faults[mine[2]] = (
                        f"{path}: the metadata give it frames (from {mine[0]:.3f} s) that episode "
                        f"{entries[other[2]].index} has as well; correct from_timestamp, or merge the datasets again"
                    )
            last = max(last, claim, key=lambda span: span[1])
    return _faulted(entries, faults)


def _instructed(dataset: Dataset, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Entries with the one instruction that ``task_index`` of their rows names, where the metadata leave it open."""
    told: dict[Path, dict[int, set[int]]] = {}
    for entry in entries:
        unique = tuple(dict.fromkeys(entry.instructions))
        try:
            if len(unique) != 1 and not entry.fault:
                unique = _told_by_rows(dataset, entry, told)
            if not entry.fault and not unique[0].strip():
                raise DataError("its instruction is empty; give every episode its language command")
            yield replace(entry, instructions=unique)
        except DataError as error:
            yield replace(entry, instructions=unique, fault=str(error))


def _told_by_rows(dataset: Dataset, entry: Entry, told: dict[Path, dict[int, set[int]]]) -> tuple[str]:
    """The instruction that an episode's rows name; ``told``: episode -> task indices, of files that were read."""
    if entry.data not in told:
        found: dict[int, set[int]] = defaultdict(set)
        keys = ["episode_index", "task_index"]
        with damage_named(entry.data):
            for row in read_parquet(entry.data, keys).group_by(keys).aggregate([]).to_pylist():
                found[row["episode_index"]].add(row["task_index"])
        told[entry.data] = found
    indices = sorted(told[entry.data].get(entry.index, ()))
    names = [dataset.tasks.get(index, f"(unknown index {index})") for index in indices]
    if entry.instructions and not set(names) <= set(entry.instructions):
        raise DataError(f"{entry.data}: task_index means {names}, which is none of {list(entry.instructions)}")
    if len(names) != 1:
        raise DataError(f"{entry.data}: has {len(names)} tasks {names}; split it by task")
    return (names[0],)
