"""What a folder of demonstrations says about itself, before any setting is known: what ``wav inspect`` begins with.

Read are names, sizes and tables, no episode. What the readers of :mod:`wav.data.sources` make of it, they say
themselves (:mod:`wav.inspection`).
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from wav.data.conventions import WRIST_NAMES
from wav.data.sources import aloha_hdf5, demo_files, lerobot, libero_hdf5
from wav.data.sources.finding import CAMERAS, hdf5_files
from wav.data.sources.lerobot_entries import read_entries
from wav.data.sources.lerobot_meta import Dataset, open_dataset
from wav.data.sources.recognise import ALOHA, LEROBOT, LIBERO, Format
from wav.errors import DataError
from wav.io.readers import understood

Size = tuple[int, int]
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
    """Look at a dataset whose format a reader takes; DataError where its metadata are missing or damaged."""
    try:
        with understood(path, _REMEDY):
            return _lerobot(path, found) if found is LEROBOT else _hdf5(path, found)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from None


def is_wrist(camera: str) -> bool:
    """Whether a camera's name says that an arm carries it."""
    usual = {name for view, names in CAMERAS.items() for name in names if "wrist" in view}
    return _last(camera) in usual or any(word in _last(camera) for word in WRIST_NAMES)


def choose_views(found: Survey) -> dict[str, str]:
    """View -> camera, as the reward needs them: one third-person view, then a wrist of each arm, left before right."""
    wrists = [name for name in found.cameras if is_wrist(name)]
    others = [name for name in found.cameras if name not in wrists]
    usual = {name for view, names in CAMERAS.items() for name in (view, *names) if "wrist" not in view}
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
    cameras = {key: feature for key, feature in dataset.info.features.items() if feature.is_camera}
    entries = read_entries(dataset, ())
    return Survey(
        found.name,
        found.reader,
        _feature(dataset, lerobot.STATES),
        _feature(dataset, lerobot.ACTIONS),
        {key: feature.image_size or (0, 0) for key, feature in cameras.items() if not feature.depth},
        Counter(entry.instructions[0] if entry.instructions else "" for entry in entries),
        sum(entry.length for entry in entries),
        version=dataset.info.codebase_version,
        robot=str(dataset.info.robot_type or ""),
        rate=dataset.info.fps,
        left_out=tuple(key for key, feature in cameras.items() if feature.depth),
    )


def _feature(dataset: Dataset, keys: tuple[str, ...]) -> Numbers:
    key = lerobot.column_of(dataset, keys)
    feature = dataset.info.features[key]
    return Numbers(key, feature.shape[0] if feature.shape else 0, feature.names)


def _hdf5(path: Path, found: Format) -> Survey:
    """HDF5 files: each adds its episodes, the first that can be read tells the rest."""
    instructions: Counter[str] = Counter()
    made: dict[str, Any] = {}
    frames = 0
    for file in hdf5_files(str(path), "a dataset"):
        text = aloha_hdf5.language(file.parent) if found is ALOHA else ""
        lengths = [0]  # of a file that cannot be read; the reader says what is wrong with it
        with contextlib.suppress(OSError, RuntimeError, KeyError), h5py.File(file, "r") as opened:
            if found is ALOHA:
                lengths = [int(opened["action"].shape[0])]
                made = made or _first_episode(opened)
            else:
                demos = [opened["data"][name] for name in demo_files.demo_names(opened["data"])]
                made = made or _first_demonstration(opened["data"], demos, str(file))
                lengths = [demo_files.claimed_length(demo) for demo in demos]
                if found is LIBERO:
                    text = libero_hdf5.instruction(str(file), opened["data"].attrs, libero_hdf5.task_name(file))
        instructions[text] += len(lengths)
        frames += sum(lengths)
    if not made:
        raise DataError(f"{path}: no file holds a whole episode; {_REMEDY}")
    return Survey(found.name, found.reader, instructions=instructions, frames=frames, **made)


def _first_demonstration(group: Any, demos: list[Any], where: str) -> dict[str, Any]:
    """Cameras, widths and rate that the first demonstration with observations and its file's attributes tell."""
    demo = next((demo for demo in demos if demo_files.observations(demo)), None)
    if demo is None:
        return {}
    seen = demo_files.observations(demo)
    cameras = {n: seen[n].shape[1:3] for n in seen if getattr(seen[n], "ndim", 0) == 4 and seen[n].shape[3] == 3}
    arguments = demo_files.attribute_json(group.attrs.get("env_args"), where)
    suite = re.search(r"(libero_\w+)/", demo_files.attribute_text(group.attrs.get("bddl_file_name")))
    return {
        "state": Numbers("obs", 8, ("eef_pos(3)", "rotation(3)", "gripper(2)")),
        "action": Numbers("actions", int(demo["actions"].shape[-1])),
        "cameras": {name: (int(height), int(width)) for name, (height, width) in cameras.items()},
        "robot": str(arguments.get("env_name", "")),
        "rate": demo_files.control_rate(arguments, where),
        "suite": suite[1] if suite else "",
    }


def _first_episode(opened: Any) -> dict[str, Any]:
    pictures = opened["observations/images"]
    sizes = {}
    for name in pictures:
        if not name.endswith("_depth"):
            shape = next(aloha_hdf5.pictures(pictures[name], name, 1)).shape
            sizes[name] = (int(shape[0]), int(shape[1]))
    return {
        "state": Numbers("observations/qpos", int(opened["observations/qpos"].shape[1])),
        "action": Numbers("action", int(opened["action"].shape[1])),
        "cameras": sizes,
        "left_out": tuple(name for name in pictures if name.endswith("_depth")),
    }
