"""What kind of robot data lies at a path: told by content, never by a suffix or a folder's name.

:func:`recognise` looks at one file of a kind; the first whole signature wins. Formats that no reader takes are told
with the way to one that is taken: :func:`check_source` says so before a reader looks for what is not there.
"""

from __future__ import annotations

import re
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py

from wav.errors import ConfigError

_HDF5, _MCAP, _SQLITE, _ZIP = b"\x89HDF\r\n\x1a\n", b"\x89MCAP0\r\n", b"SQLite format 3\x00", b"PK\x03\x04"
_LOOKED_AT = 2000  # files of a folder: enough to meet one of every kind
_CONVERT = "convert it to LeRobot v3.0"
_NEAR = r"((?:[^/]+/){0,3})"  # the folder itself, or up to three below it


@dataclass(frozen=True)
class Format:
    """A kind of robot data."""

    name: str
    reader: str
    """``ingest.source`` that reads it; empty where none does."""
    remedy: str = ""
    """What to do with it where none does."""


LEROBOT = Format("a LeRobot dataset", "lerobot")
LIBERO = Format("LIBERO HDF5", "libero_hdf5")
ROBOMIMIC = Format("robomimic HDF5", "robomimic_hdf5")
ALOHA = Format("ALOHA-style HDF5", "aloha_hdf5")
_RAW = Format("robosuite's raw demonstrations", "", "extract observations first (robomimic's dataset_states_to_obs.py)")
_AGILEX = Format("AgileX data_tools HDF5", "", "turn it to ALOHA's form with data_tools' own scripts, or convert it")
_ROBOTWIN = Format("RoboTwin HDF5", "", "turn it to ALOHA's form with RoboTwin's policy/ACT/process_data.py")
_ROBOMIND = Format("RoboMIND-like HDF5", "", f"{_CONVERT} (any4lerobot has a script)")
_MANISKILL = Format("ManiSkill trajectories", "", f"replay them with an observation mode, then {_CONVERT}")
_D4RL = Format("D4RL-like HDF5", "", f"it holds no episodes; cut it at terminals and timeouts, then {_CONVERT}")
_SWM = Format("a stable-worldmodel dataset", "", f"{_CONVERT} with its own exporter")
_MINARI = Format("a minari dataset", "", f"{_CONVERT}, one minari episode an episode")
_ZARR = Format("a zarr store of UMI or diffusion policy", "", f"{_CONVERT} (any4lerobot, or UMI's own scripts)")
_RLDS = Format("an RLDS (TFDS) dataset", "", f"{_CONVERT} (openpi and any4lerobot have scripts)")
_BAG = Format("a ROS bag", "", "cut it into episodes and convert it to LeRobot v3.0 (rosbags reads it without ROS)")
_MCAP_FILE = Format("an MCAP recording", "", _BAG.remedy)
_LANCE = Format("a Lance table", "", f"{_CONVERT} with the tool that wrote it")

_OWN = Format("an episode store that ingest has made", "", "it needs no ingest: put it at data/episodes of a workspace")


def recognise(path: Path) -> Format | None:
    """The kind of data at a file or folder; None where it is none that is known."""
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return None
    if (path / "meta" / "info.json").is_file():
        return LEROBOT
    files = list(islice(_visible(path), _LOOKED_AT))
    names = {file.relative_to(path).as_posix() for file in files}
    for format_, signature in _FOLDERS:
        if signature(names):
            return format_
    seen: dict[str, Format | None] = {}
    for file in files:  # one file a kind
        if file.suffix not in seen:
            seen[file.suffix] = _file(file)
            if found := seen[file.suffix]:
                return found
    return None


def check_source(path: Path, source: str) -> None:
    """ConfigError for data that the reader ``ingest.source`` does not take, with its name and what to do.

    A reader that somebody has added may take anything.
    """
    found = recognise(path) if source in {known.reader for known in (LEROBOT, LIBERO, ROBOMIMIC, ALOHA)} else None
    if found is None or found.reader == source:
        return
    remedy = f"set ingest.source: {found.reader}" if found.reader else found.remedy
    raise ConfigError(f"ingest.path = {str(path)!r} holds {found.name}, which {source!r} does not read; {remedy}")


def refuse_unknown(path: Path) -> None:
    """ConfigError for an HDF5 file of no known layout: what it holds, and what to do; others may judge other files."""
    try:
        with h5py.File(path, "r") as file:
            names = sorted(file)
    except (OSError, RuntimeError):
        return
    raise ConfigError(
        f"{path}: is HDF5 of an unknown layout ({', '.join(names[:12]) or 'empty'} at its root); {_CONVERT}, or "
        "write a reader (docs/extending/dataset-reader.md)"
    )


def _visible(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") and entry.name not in (".zgroup", ".zarray"):
            continue
        if entry.is_dir():
            yield from _visible(entry)
        elif entry.is_file():
            yield entry


def _matches(pattern: str, *beside: str) -> Callable[[set[str]], bool]:
    """Whether a name matches, and these stand in the folder that the pattern's first group names."""

    def signature(names: set[str]) -> bool:
        bases = {found[1] for name in names if (found := re.fullmatch(pattern, name))}
        return any(all(base + other in names for other in beside) for base in bases)

    return signature


_FOLDERS: tuple[tuple[Format, Callable[[set[str]], bool]], ...] = (
    (_MINARI, _matches(r"(|.*/)data/(?:main_data\.hdf5|\d+/[^/]+\.arrow)", "data/metadata.json")),
    (_RLDS, _matches(rf"{_NEAR}dataset_info\.json", "features.json")),
    (_ZARR, _matches(rf"{_NEAR}meta/episode_ends/(?:\.zarray|zarr\.json)")),
    (_SWM, _matches(rf"{_NEAR}ep_len\.npz", "ep_offset.npz")),
    (_LANCE, _matches(r"(|.*\.lance/)_versions/.*")),
    (_OWN, _matches(rf"{_NEAR}manifest\.json", "quarantine.json", "statistics.json")),
)


def _file(path: Path) -> Format | None:
    try:
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(_HDF5):
            with h5py.File(path, "r") as opened:
                return _hdf5(opened, path)
        if head.startswith(_MCAP):
            return _MCAP_FILE
        if head.startswith(b"#ROSBAG"):
            return _BAG
        if head.startswith(_SQLITE):
            with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True) as database:
                tables = {row[0] for row in database.execute("select name from sqlite_master")}
            return _BAG if {"topics", "messages"} <= tables else None
        if head.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                return _ZARR if any(n.startswith("meta/episode_ends/") for n in archive.namelist()) else None
    except (OSError, RuntimeError, sqlite3.Error, zipfile.BadZipFile):  # the reader says what is wrong with it
        return None
    return None


def _hdf5(file: Any, path: Path) -> Format | None:
    """The layout of an open HDF5 file."""
    data = file.get("data")
    if isinstance(data, h5py.Group) and (demo := next((data[n] for n in data if n.startswith("demo_")), None)):
        observed = demo.get("obs") if isinstance(demo, h5py.Group) else None
        libero = "bddl_file_name" in data.attrs or "problem_info" in data.attrs
        if libero or (isinstance(observed, h5py.Group) and "agentview_rgb" in observed):
            return LIBERO
        if "env_args" in data.attrs and "num_samples" in demo.attrs:
            return ROBOMIMIC
        return _RAW if {"env", "env_info"} <= set(data.attrs) and observed is None else None
    for format_, kind, names in _ROOTS:
        if all(isinstance(file.get(name), kind) for name in names):
            return format_
    if path.with_suffix(".json").is_file() and any(name.startswith("traj_") for name in file):
        return _MANISKILL
    return None


_ROOTS: tuple[tuple[Format, Any, tuple[str, ...]], ...] = (
    (ALOHA, h5py.Dataset, ("action", "observations/qpos")),
    (_AGILEX, h5py.Group, ("camera/color", "arm/jointStatePosition")),
    (_AGILEX, h5py.Group, ("camera/color", "localization/pose")),
    (_ROBOTWIN, h5py.Group, ("joint_action", "observation")),
    (_ROBOTWIN, h5py.Group, ("state", "action", "vision")),
    (_ROBOMIND, h5py.Dataset, ("puppet/joint_position", "master/joint_position")),
    (_D4RL, h5py.Dataset, ("observations", "actions", "rewards", "terminals")),
    (_SWM, h5py.Dataset, ("ep_len", "ep_offset")),
)
