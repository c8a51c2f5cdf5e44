"""The episodes of a LeRobot dataset as its metadata list them, and what speaks against each before it is read.

v2.x: one parquet (and one mp4 per camera) for each episode, ``meta/episodes.jsonl``.
v3.0: many episodes in one parquet and one mp4, found through ``meta/episodes/chunk-*/file-*.parquet``.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wav.data.sources.lerobot_meta import (
    DOWNLOAD,
    Dataset,
    lines,
    natural,
    parquet_columns,
    part,
    positive,
    read_parquet,
)
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


def read_entries(dataset: Dataset, cameras: tuple[str, ...]) -> tuple[Entry, ...]:
    """All episodes, by index, with the videos of ``cameras`` (keys of features) alone: others need not be there.

    Raises:
        DataError: the table of episodes cannot be read, or files are missing.
    """
    keys = tuple(key for key in cameras if dataset.features[key].dtype == "video")
    entries = list((_entries_v3 if dataset.version == "v3.0" else _entries_v2)(dataset, keys))
    if not entries:
        raise DataError(f"{dataset.root}: lists no episode; {DOWNLOAD}")
    total = dataset.info.get("total_episodes", len(entries))
    if total != len(entries):
        _LOG.warning("%s: total_episodes = %s, but meta/ lists %d episodes", dataset.where, total, len(entries))
    _check_present(entries)
    entries = _without_overlap(_without_twins(entries), dataset.fps)
    return tuple(sorted(_instructed(dataset, entries), key=lambda entry: entry.index))


def _check_present(entries: list[Entry]) -> None:
    """Refuse an incomplete download, naming the first missing file and their number."""
    sound = [entry for entry in entries if not entry.fault]
    paths = {path for entry in sound for path in (entry.data, *(video.path for video in entry.videos))}
    missing = sorted(path for path in paths if not path.is_file())
    if missing:
        raise DataError(f"{missing[0]}: missing ({len(missing)} of {len(paths)} files that are needed); {DOWNLOAD}")


def _entries_v2(dataset: Dataset, keys: tuple[str, ...]) -> Iterator[Entry]:
    """Episodes of meta/episodes.jsonl."""
    chunk = int(positive(dataset.info, "chunks_size", dataset.where))
    path = dataset.root / "meta" / "episodes.jsonl"
    for row in lines(path):
        index = natural(row, "episode_index", path)
        place = {"episode_chunk": index // chunk, "episode_index": index}
        data = _placed(dataset, "data_path", **place)
        videos = tuple(Video(key, _placed(dataset, "video_path", video_key=key, **place), 0.0, True) for key in keys)
        try:
            yield Entry(index, natural(row, "length", path), _sentences(row, path), data, videos)
        except DataError as error:
            yield Entry(index, 0, (), data, videos, str(error))


def _entries_v3(dataset: Dataset, keys: tuple[str, ...]) -> Iterator[Entry]:
    """Episodes of meta/episodes/*.parquet."""
    folder = dataset.root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise DataError(f"{folder}: holds no chunk-*/file-*.parquet: {_unfinished(dataset.root)}")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{name}" for key in keys for name in ("chunk_index", "file_index", "from_timestamp")]
    optional = ["tasks", *(f"videos/{key}/to_timestamp" for key in keys)]
    _placed(dataset, "data_path", chunk_index=0, file_index=0)  # a pattern that does not fit is no episode's fault
    for path in files:
        have = parquet_columns(path)
        lacking = [name for name in columns if name not in have]
        if lacking:
            raise DataError(f"{path}: column {lacking[0]!r} is missing; {DOWNLOAD}")
        for row in read_parquet(path, [*columns, *(name for name in optional if name in have)]).to_pylist():
            index = natural(row, "episode_index", path)
            try:
                yield _entry_v3(dataset, keys, index, row, path)
            except DataError as error:
                yield Entry(index, 0, (), path, (), str(error))


def _entry_v3(dataset: Dataset, keys: tuple[str, ...], index: int, row: Mapping[str, Any], path: Path) -> Entry:
    length = natural(row, "length", path)
    place = {name: natural(row, f"data/{name}", path) for name in ("chunk_index", "file_index")}
    videos = tuple(_video_v3(dataset, key, length, row, path) for key in keys)
    return Entry(index, length, _sentences(row, path), _placed(dataset, "data_path", **place), videos)


def _video_v3(dataset: Dataset, key: str, length: int, row: Mapping[str, Any], where: Path) -> Video:
    place = {name: natural(row, f"videos/{key}/{name}", where) for name in ("chunk_index", "file_index")}
    name = f"videos/{key}/from_timestamp"
    start, end = row[name], row.get(f"videos/{key}/to_timestamp")
    if not isinstance(start, (int, float)) or not 0 <= start < math.inf:
        raise DataError(f"{where}: {name} = {start!r}: must be seconds from 0 on; {DOWNLOAD}")
    if isinstance(end, float) and abs((end - start) * dataset.fps - length) > 1.5:
        raise DataError(
            f"{where}: videos/{key} runs from {start:g} to {end:g} s, which at fps = {dataset.fps:g} is not its length "
            f"of {length} frames; correct the metadata or drop the episode"
        )
    return Video(key, _placed(dataset, "video_path", video_key=key, **place), float(start), alone=False)


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


def _sentences(row: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """An episode's field ``tasks``; empty where it is left out, as LeRobot's own image-to-video conversion does."""
    value = row.get("tasks")
    value = [value] if isinstance(value, str) else value or []
    if not isinstance(value, list) or not all(isinstance(task, str) for task in value):
        raise DataError(f"{where}: tasks = {value!r}: must be a list of instructions; {DOWNLOAD}")
    return tuple(value)


def _placed(dataset: Dataset, name: str, **values: Any) -> Path:
    """A path pattern of info.json filled in."""
    pattern = str(part(dataset.info, name, dataset.where))
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
    told: dict[Path, dict[int, set[int]] | str] = {}
    for entry in entries:
        unique = tuple(dict.fromkeys(entry.instructions))
        fault = entry.fault
        if len(unique) != 1 and not fault:
            if entry.data not in told:
                told[entry.data] = _task_indices(entry.data)
            found = told[entry.data]
            indices = found if isinstance(found, str) else found.get(entry.index, set())
            if isinstance(indices, str):
                fault = indices
            else:
                unique = tuple(dataset.tasks.get(index, f"(unknown index {index})") for index in sorted(indices))
                if entry.instructions and not set(unique) <= set(entry.instructions):
                    fault = (
                        f"{entry.data}: task_index means {list(unique)}, which is none of {list(entry.instructions)}"
                    )
        if len(unique) != 1 and not fault:
            fault = f"{entry.data}: has {len(unique)} tasks {list(unique)}; split it by task"
        if not fault and not unique[0].strip():
            fault = "its instruction is empty; give every episode its language command"
        yield replace(entry, instructions=unique, fault=fault)


def _task_indices(path: Path) -> dict[int, set[int]] | str:
    """Episode -> indices of its rows' tasks; what is wrong with the file where it cannot be read."""
    try:
        table = read_parquet(path, ["episode_index", "task_index"])
    except DataError as error:
        return str(error)
    found: dict[int, set[int]] = defaultdict(set)
    for row in table.group_by(["episode_index", "task_index"]).aggregate([]).to_pylist():
        found[row["episode_index"]].add(row["task_index"])
    return found
