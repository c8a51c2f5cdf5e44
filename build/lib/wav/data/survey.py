"""What a folder of demonstrations says about itself, before any setting is known: what ``wav inspect`` begins with.

Read are names, sizes and tables, no episode. What the readers of :mod:`wav.data.sources` make of it, they say
themselves (:mod:`wav.inspection`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from wav.data.conventions import WRIST_NAMES
from wav.data.sources import aloha_file, lerobot, libero_file
from wav.data.sources.lerobot_entries import read_entries
from wav.data.sources.lerobot_meta import Dataset, open_dataset
from wav.data.sources.recognise import ALOHA, LEROBOT, Format
from wav.errors import DataError
from wav.io.readers import understood

Size = tuple[int, int]
#: view -> usual names of its camera, of all readers
USUAL = [*lerobot.CAMERAS.items(), *libero_file.CAMERAS.items(), *aloha_file.CAMERAS.items()]
_REMEDY = "give a whole dataset, or download it again"


@dataclass(frozen=True)
class Numbers:
    """A vector of each step: its column, width, and names of its numbers (none where nothing tells)."""

    column: str
    width: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What the metadata of a dataset say."""

    format: str
    reader: str
    """``ingest.source`` that reads it."""
    state: Numbers
    action: Numbers
    cameras: Mapping[str, Size]
    """Camera -> (H, W) in pixels; (0, 0) where nothing tells."""
    instructions: Mapping[str, int]
    """Instruction -> episodes; the instruction is empty where the data hold none."""
    frames: int
    version: str = ""
    robot: str = ""
    rate: float = 0.0
    """Steps per second; 0: not recorded."""
    suite: str = ""
    left_out: tuple[str, ...] = field(default=())
    """Cameras of one channel: depth, or grey."""

    @property
    def episodes(self) -> int:
        """Episodes that the dataset lists, fit or not."""
        return sum(self.instructions.values())

    @property
    def arms(self) -> int:
        """2 where cameras at two wrists, or 14 numbers, say so."""
        pair = len([name for name in self.cameras if is_wrist(name)]) > 1
        return 2 if (pair or self.state.width == 14) and not (self.state.width % 2 or self.action.width % 2) else 1


def survey(path: Path, found: Format) -> Survey:
    """Look at a dataset whose format a reader takes.

    Raises:
        DataError, ConfigError: its metadata are missing or damaged.
    """
    look = {LEROBOT.reader: _lerobot, ALOHA.reader: _aloha}.get(found.reader, _demonstrations)
    try:
        with understood(path, _REMEDY):
            return look(path, found)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from None


def is_wrist(camera: str) -> bool:
    """Whether a camera's name says that an arm carries it."""
    usual = {name for view, names in USUAL for name in names if "wrist" in view}
    return _last(camera) in usual or any(word in _last(camera) for word in WRIST_NAMES)


def choose_views(found: Survey) -> dict[str, str]:
    """View -> camera, as the reward needs them: one third-person view, then a wrist of each arm, left before right."""
    wrists = [name for name in found.cameras if is_wrist(name)]
    others = [name for name in found.cameras if name not in wrists]
    usual = {name for view, names in USUAL for name in (view, *names) if "wrist" not in view}
    chosen = {}
    if others:
        chosen["top" if found.arms == 2 else "agentview"] = min(others, key=lambda name: _last(name) not in usual)
    if found.arms == 2 and len(wrists) > 1:
        left = min(wrists, key=lambda name: (("right" in name) - ("left" in name), name))
        right = next(name for name in wrists if name != left and ("left" not in name or len(wrists) == 2))
        return chosen | {"left_wrist": left, "right_wrist": right}
    return chosen | ({"wrist": wrists[0]} if wrists else {})


def _last(camera: str) -> str:
    return camera.lower().rsplit(".", 1)[-1]


def _lerobot(path: Path, found: Format) -> Survey:
    dataset = open_dataset(str(path))
    cameras = {key: feature for key, feature in dataset.features.items() if feature.dtype in ("video", "image")}
    entries = read_entries(dataset, ())
    return Survey(
        found.name,
        found.reader,
        _feature(dataset, lerobot.STATES),
        _feature(dataset, lerobot.ACTIONS),
        {key: feature.image_size or (0, 0) for key, feature in cameras.items() if not feature.depth},
        Counter(entry.instructions[0] if entry.instructions else "" for entry in entries),
        sum(entry.length for entry in entries),
        version=dataset.version,
        robot="" if dataset.robot == "None" else dataset.robot,
        rate=dataset.fps,
        left_out=tuple(key for key, feature in cameras.items() if feature.depth),
    )


def _feature(dataset: Dataset, keys: Iterable[str]) -> Numbers:
    for key in keys:
        if feature := dataset.features.get(key):
            return Numbers(key, feature.shape[0] if feature.shape else 0, feature.names)
    raise DataError(
        f"{dataset.where}: has no feature {' or '.join(keys)}; it has {', '.join(dataset.features)}; rename it"
    )


def _files(path: Path) -> list[Path]:
    """HDF5 files by content's usual ending; hidden ones are nobody's."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*.hdf5") if not libero_file.is_hidden(file, path))


def _demonstrations(path: Path, found: Format) -> Survey:
    """LIBERO's and robomimic's layout: ``data/demo_i/{actions, obs/...}``."""
    instructions: Counter[str] = Counter()
    made: dict[str, Any] = {}
    frames = 0
    for file in _files(path):
        try:
            with h5py.File(file, "r") as opened:
                group = opened["data"]
                demos = [group[name] for name in group if re.fullmatch(r"demo_\d+", name)]
                frames += sum(libero_file.claimed_length(demo) for demo in demos)
                text = ""
                if found.reader == "libero_hdf5":
                    text = libero_file.instruction(str(file), group.attrs, libero_file.task_name(file))
                instructions[text] += len(demos)
                made = made or _first_demonstration(group, demos, str(file))
        except (OSError, RuntimeError, KeyError):
            instructions[""] += 1  # the reader says what is wrong with it
    if not made:
        raise DataError(f"{path}: no file holds data/demo_i with observations; {_REMEDY}")
    return Survey(found.name, found.reader, instructions=instructions, frames=frames, **made)


def _first_demonstration(group: Any, demos: list[Any], where: str) -> dict[str, Any]:
    """Cameras, widths and rate that the first demonstration with observations and its file's attributes tell."""
    demo = next((demo for demo in demos if libero_file.observations(demo)), None)
    if demo is None:
        return {}
    seen = libero_file.observations(demo)
    cameras = {n: seen[n].shape[1:3] for n in seen if getattr(seen[n], "ndim", 0) == 4 and seen[n].shape[3] == 3}
    arguments = libero_file.attribute_json(group.attrs.get("env_args"), where)
    suite = re.search(r"(libero_\w+)/", libero_file.attribute_text(group.attrs.get("bddl_file_name")))
    return {
        "state": Numbers("obs", 8, ("eef_pos(3)", "rotation(3)", "gripper(2)")),
        "action": Numbers("actions", int(demo["actions"].shape[-1])),
        "cameras": {name: (int(height), int(width)) for name, (height, width) in cameras.items()},
        "robot": str(arguments.get("env_name", "")),
        "rate": libero_file.control_rate(arguments, where),
        "suite": suite[1] if suite else "",
    }


def _aloha(path: Path, found: Format) -> Survey:
    """One file an episode: ``action``, ``observations/qpos``, ``observations/images``."""
    instructions: Counter[str] = Counter()
    made: dict[str, Any] = {}
    frames = 0
    for file in _files(path):
        frames += aloha_file.length(file)
        instructions[aloha_file.language(file.parent)] += 1
        try:
            with h5py.File(file, "r") as opened:
                made = made or _first_episode(opened)
        except (OSError, RuntimeError, KeyError):
            continue
    if not made:
        raise DataError(f"{path}: no file can be read; {_REMEDY}")
    return Survey(found.name, found.reader, instructions=instructions, frames=frames, **made)


def _first_episode(opened: Any) -> dict[str, Any]:
    pictures = opened["observations/images"]
    sizes = {}
    for name in pictures:
        if not name.endswith("_depth"):
            shape = next(aloha_file.pictures(pictures[name], name, 1)).shape
            sizes[name] = (int(shape[0]), int(shape[1]))
    return {
        "state": Numbers("observations/qpos", int(opened["observations/qpos"].shape[1])),
        "action": Numbers("action", int(opened["action"].shape[1])),
        "cameras": sizes,
        "left_out": tuple(name for name in pictures if name.endswith("_depth")),
    }
