"""ALOHA-style HDF5: one ``episode_N.hdf5`` an episode: ``action``, ``observations/qpos``, ``observations/images/``.

Written by act, Mobile ALOHA, Interbotix' ALOHA 2 and AgileX' Cobot Magic (Piper arms): joint positions (rad) and
grippers, left arm first; action t is the leader's position that was recorded with frame t. The files hold no rate, no
language and nothing that tells red from blue in their JPEGs (recorders give RGB to OpenCV's encoder, which expects
BGR), so ``ingest.aloha_hdf5`` declares them. Grippers are metres, a share of their way, or raw, states and actions on
different scales: they are measured, reported and stored as they are. How far actions run ahead of states is reported as
well; ``shift`` pairs frame t with a later action.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import ABSOLUTE_ACTIONS, Conventions
from wav.data.episode import Episode
from wav.data.names import task_name
from wav.data.sources import checks
from wav.data.sources.checks import Floats
from wav.data.sources.damage import opened_hdf5
from wav.data.sources.demo_files import numbers
from wav.data.sources.finding import camera_for, check_tasks, hdf5_files, no_camera
from wav.data.sources.frames import Images, Preparation, check_frame, decode_image, described, preparation
from wav.data.sources.options import AlohaHdf5Options
from wav.data.sources.staging import DatasetSource, Item, Job, judged
from wav.data.store import Rejection
from wav.errors import ConfigError, DataError
from wav.io.readers import read_json

#: files beside episodes that hold their language, as RDT's and AgileX' tools write them
LANGUAGE = ("expanded_instruction_gpt-4-turbo.json", "instructions.json", "instruction.json")
_ARM = 7  # joints and gripper of an arm
_RAW = 1.5  # a gripper that reads more is neither in metres nor a share of its way
_LAGS = 30  # steps


@dataclass(frozen=True)
class EpisodeFile:
    """One file, as its header says."""

    path: Path
    name: str
    task: str
    instruction: str


class AlohaHdf5Source(DatasetSource):
    """Reads every ``*.hdf5`` at or below ``ingest.path``, by number; a folder is a task.

    ConfigError where what the files do not tell is not declared, DataError where no file can be read.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        self.options = settings.aloha_hdf5
        found = hdf5_files(settings.path, "the folder of episode_N.hdf5 files")
        where = f"{settings.path} (act's recorders run at 50 Hz, AgileX' at 30)"
        checks.check_control_hz(0, self.options, data.control_hz, where)
        self.files = self._chosen(sorted((path for path in found if "features" not in path.stem), key=_order))
        checks.check_instructions(dict.fromkeys(file.instruction for file in self.files), data.text_tokens)
        self.cameras, self.report = self._first_sound()

    def _chosen(self, found: list[Path]) -> list[EpisodeFile]:
        """Files of the wanted tasks, at most ``episodes_per_task`` of each."""
        root = Path(self.settings.path).expanduser()
        root = root if root.is_dir() else root.parent
        wanted = {task_name(task) for task in self.data.tasks}
        counts: dict[str, int] = {}
        files = []
        for path in found:
            folder = path.parent.relative_to(root).as_posix()
            text = self.options.instructions.get(folder) or language(path.parent)
            if not text:
                raise ConfigError(
                    f"{path.parent}: tells no language; declare ingest.aloha_hdf5.instructions: "
                    f"{{{json.dumps(folder)}: ...}} with the command of the episodes in that folder"
                )
            task = task_name(text)
            counts[task] = counts.get(task, 0) + 1
            if (not wanted or task in wanted) and counts[task] <= self.settings.episodes_per_task:
                name = f"{self.data.suite}/{task}/{path.relative_to(root).with_suffix('').as_posix()}"
                files.append(EpisodeFile(path, name, task, text))
        check_tasks(sorted(wanted), counts, self.settings.path)
        return files

    def _first_sound(self) -> tuple[dict[str, tuple[str, tuple[int, int]]], dict[str, Any]]:
        """(view -> camera and its size, what is measured) in the first file that can be read."""
        first: DataError | None = None
        for file in self.files:
            try:
                with opened_hdf5(file.path) as opened:
                    report = measured(*rows(opened, self.data, self.options), self.options)
                    return find_cameras(file.path, opened, self.data, self.options), report
            except DataError as error:
                first = first or DataError(f"{file.path}: {error}")
        raise first or DataError(f"{self.settings.path}: no episode is left")

    def conventions(self) -> Conventions:
        """Joint targets; a real camera's pictures stay as they are."""
        layout = f"joints: {self.data.state_dim}"
        return Conventions.recorded(
            self.data, image_rotation="none", gripper="absolute", state_layout=layout, action=ABSOLUTE_ACTIONS
        )

    def jobs(self) -> list[Job]:
        """A few files each."""
        cameras = {view: name for view, (name, _) in self.cameras.items()}
        items = [Item(f, length(f.path) * self.frame_bytes, (f.path,), f.path.name) for f in self.files]
        return self.jobs_of(read_files, items, self.settings.path, plan=cameras)

    def describe(self) -> dict[str, Any]:
        """What was read, measured in the first sound file, and declared."""
        cameras = {view: described(name, size, self.data) for view, (name, size) in self.cameras.items()}
        declared = {"channels": self.options.channels or "rgb", "shift": self.options.shift, "base": self.options.base}
        return {"format": "aloha_hdf5", "path": self.settings.path, "cameras": cameras, **declared, **self.report}


def _order(path: Path) -> tuple[str, int, str]:
    """Episodes of a folder by number: as text, 10 would come before 2."""
    number = re.search(r"(\d+)$", path.stem)
    return str(path.parent), int(number[1]) if number else -1, path.name


def language(folder: Path) -> str:
    """The command of the episodes in a folder, from a file beside them; empty where there is none."""
    for path in (folder / name for name in LANGUAGE):
        if path.is_file():
            found = read_json(path, "correct it, or declare ingest.aloha_hdf5.instructions")
            if isinstance(found, dict):
                found = found.get("instruction") or found.get("instructions")
            text = found[0] if isinstance(found, list) and found else found
            if isinstance(text, str) and text.strip():
                return text.strip()
    return ""


def length(path: Path) -> int:
    """Frames that a file claims; 0 where it cannot be read, which is told when it is."""
    try:
        with h5py.File(path, "r") as file:
            return int(file["action"].shape[0])
    except (OSError, RuntimeError, KeyError, AttributeError, IndexError):
        return 0


def read_files(
    cameras: Mapping[str, str], files: tuple[EpisodeFile, ...], data: DataSettings, settings: IngestSettings
) -> Iterator[Episode | Rejection]:
    """The episode of each file; one that is not sound comes as a Rejection."""
    prepare = preparation("camera", "camera", False, data.image_height, data.image_width)
    for file in files:
        arguments = (file, cameras, prepare, data, settings.aloha_hdf5)
        yield judged(file.name, file.task, file.path.name, settings, _read, *arguments)


def _read(
    file: EpisodeFile, cameras: Mapping[str, str], prepare: Preparation, data: DataSettings, options: AlohaHdf5Options
) -> Episode:
    with opened_hdf5(file.path) as opened:
        state, action = rows(opened, data, options)
        measured(state, action, options)
        return Episode(
            episode_id=file.name,
            task=file.task,
            instruction=file.instruction,
            images={view: images(opened, name, len(state), prepare, options) for view, name in cameras.items()},
            state=state.astype(np.float32),
            joints=state.astype(np.float32),
            actions=action.astype(np.float32),
            source=f"aloha_hdf5:{file.path.name}",
        )


def rows(file: Any, data: DataSettings, options: AlohaHdf5Options) -> tuple[Floats, Floats]:
    """(T, state_dim) joint states and (T, action_dim) targets of an open file, paired as declared.

    ConfigError where their widths are not those of ``data``, or the base moves and nothing says what to do with it.
    """
    extra = 2 if options.base == "append" else 0
    for field, name, wanted in (
        ("state_dim", "observations/qpos", data.state_dim),
        ("action_dim", "action", data.action_dim - extra),
    ):
        found = file.get(name)
        width = found.shape[1] if isinstance(found, h5py.Dataset) and found.ndim == 2 else wanted
        if width != wanted:
            more = extra if name == "action" else 0
            raise ConfigError(
                f"data.{field} = {wanted + more}: {name} has {width} numbers; set data.{field}: {width + more}"
            )
    state = numbers(file, "observations/qpos", data.state_dim)
    action = numbers(file, "action", data.action_dim - extra, len(state))
    later = np.minimum(np.arange(len(action)) + options.shift, len(action) - 1)
    base = _base(file, len(state), options)
    return state, np.concatenate([action[later], base], axis=1) if extra else action[later]


def _base(file: Any, steps: int, options: AlohaHdf5Options) -> Floats:
    """(T, 2) measured velocity of a mobile base (m/s, rad/s); zeros where there is none."""
    found = numbers(file, "base_action", 2, steps) if "base_action" in file else np.zeros((steps, 2))
    if found.any() and not options.base:
        raise ConfigError(
            f"base_action moves (up to {np.abs(found).max():.3g}), which the arms' actions leave out; declare "
            "ingest.aloha_hdf5.base: ignore, or append (two more numbers of action, measured, not commanded)"
        )
    return found


def measured(state: Floats, action: Floats, options: AlohaHdf5Options) -> dict[str, Any]:
    """What the numbers show: ranges of the grippers, and by how many steps actions run ahead of states.

    ConfigError for raw grippers or actions that are the states themselves, undeclared; DataError for no radians.
    """
    width = state.shape[1]
    grippers = [i for i in range(width) if width % _ARM == 0 and i % _ARM == _ARM - 1]
    joints = [i for i in range(width) if i not in grippers]
    for name, values in (("qpos", state), ("action", action)):
        if np.abs(values[:, joints]).max() > checks.FULL_TURN:
            worst = joints[int(np.abs(values[:, joints]).max(axis=0).argmax())]
            raise DataError(
                f"{name} reaches {np.abs(values[:, worst]).max():.4g} in column {worst}, which is no angle in radians; "
                "convert the file"
            )
        if grippers and np.abs(values[:, grippers]).max() > _RAW and not options.raw_grippers:
            raise ConfigError(
                f"a gripper of {name} reaches {np.abs(values[:, grippers]).max():.4g}: neither metres nor a share of "
                "its way; convert the files, or declare ingest.aloha_hdf5.raw_grippers: true"
            )
    if len(state) > 1 and np.array_equal(state, action[:, :width]) and np.ptp(state, axis=0).any():
        raise ConfigError(
            "action t is the state of frame t in every row, so a policy would learn to stay; declare "
            "ingest.aloha_hdf5.shift: 1"
        )
    misses = [
        np.abs(action[: len(action) - lag, joints] - state[lag:, joints]).mean()
        for lag in range(min(_LAGS, len(state) - 1) + 1)
    ]
    ranges = {
        name: {str(i): [round(float(values[:, i].min()), 4), round(float(values[:, i].max()), 4)] for i in grippers}
        for name, values in (("state", state), ("action", action))
    }
    return {"grippers": ranges, "actions_lead_steps": int(np.argmin(misses))}


def find_cameras(
    path: Path, file: Any, data: DataSettings, options: AlohaHdf5Options
) -> dict[str, tuple[str, tuple[int, int]]]:
    """View -> (camera, (H, W)); ConfigError for a view without one, or for JPEGs of undeclared order of colours."""
    found = file.get("observations/images")
    have = [name for name in found if not name.endswith("_depth")] if isinstance(found, h5py.Group) else []
    cameras = {}
    for view in data.views:
        name = camera_for(view, have, options.cameras)
        if not name:
            raise no_camera(path, view, have, options.section)
        if found[name].ndim != 4 and not options.channels:
            raise ConfigError(
                f"{path}: {name} holds JPEGs, and nothing tells whether red and blue are exchanged in them, as most "
                "recorders of this kind do (they give RGB to OpenCV); look at one and declare "
                "ingest.aloha_hdf5.channels: bgr (exchanged) or rgb"
            )
        first = next(pictures(found[name], name, 1))
        cameras[view] = (name, (first.shape[0], first.shape[1]))
    return cameras


def images(file: Any, name: str, steps: int, prepare: Preparation, options: AlohaHdf5Options) -> Images:
    """(T, height, width, 3) frames of a camera in RGB, read one at a time; DataError for another number of them."""
    found = file.get(f"observations/images/{name}")
    if not isinstance(found, h5py.Dataset) or len(found) != steps:
        raise DataError(f"camera {name} has {0 if found is None else len(found)} frames where qpos has {steps} rows")
    swapped = -1 if options.channels == "bgr" else 1
    return prepare.stack((frame[..., ::swapped] for frame in pictures(found, name, steps)), steps)


def pictures(found: Any, name: str, count: int) -> Iterator[Images]:
    """Frames as stored: raw (T, H, W, 3), JPEGs in rows padded with zeros, or JPEGs as strings of any length."""
    for step in range(count):
        stored, where = found[step], f"camera {name}: frame {step}"
        if found.ndim == 4:
            check_frame(stored, None, where)
            yield stored
        else:
            yield decode_image(stored.tobytes() if isinstance(stored, np.ndarray) else bytes(stored), None, where)
