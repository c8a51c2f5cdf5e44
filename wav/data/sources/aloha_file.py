"""One ALOHA-style HDF5 file: its numbers, what they show about units and timing, its pictures in their three forms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wav.data.sources.checks import FULL_TURN
from wav.data.sources.frames import Images, Preparation, check_frame, decode_image
from wav.data.sources.libero_hdf5 import numbers
from wav.errors import ConfigError, DataError
from wav.io.readers import read_json

if TYPE_CHECKING:
    from wav.config import DataSettings
    from wav.data.sources.options import AlohaHdf5Options

Floats = NDArray[np.floating]
#: view -> usual names of its camera
CAMERAS = {
    "top": ("cam_high", "top", "head_camera"),
    "left_wrist": ("cam_left_wrist", "left_wrist", "left_camera"),
    "right_wrist": ("cam_right_wrist", "right_wrist", "right_camera"),
}
#: files beside episodes that hold their language, as RDT's and AgileX' tools write them
LANGUAGE = ("expanded_instruction_gpt-4-turbo.json", "instructions.json", "instruction.json")
_ARM = 7  # joints and gripper of an arm
_RAW = 1.5  # a gripper that reads more is neither in metres nor a share of its way
_LAGS = 30  # steps


def order(path: Path) -> tuple[str, int, str]:
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


def rows(file: Any, data: DataSettings, options: AlohaHdf5Options) -> tuple[Floats, Floats]:
    """(T, state_dim) joint states and (T, action_dim) targets of an open file, paired as declared.

    Raises:
        ConfigError: their widths are not those of ``data``, or the base moves and nothing says what to do with it.
        DataError: they are missing, of other lengths or not finite.
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

    Raises:
        ConfigError: grippers are raw, or actions are the states themselves, and it is not declared.
        DataError: joints turn further than radians do.
    """
    width = state.shape[1]
    grippers = [i for i in range(width) if width % _ARM == 0 and i % _ARM == _ARM - 1]
    joints = [i for i in range(width) if i not in grippers]
    for name, values in (("qpos", state), ("action", action)):
        if np.abs(values[:, joints]).max() > FULL_TURN:
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
    """View -> (camera, (H, W)) in an open file.

    Raises:
        ConfigError: a view has no camera, or its pictures are JPEG and their order of colours is not declared.
    """
    found = file.get("observations/images")
    have = {name: found[name] for name in found} if isinstance(found, h5py.Group) else {}
    have = {name: pictures for name, pictures in have.items() if not name.endswith("_depth")}
    cameras = {}
    for view in data.views:
        usual = (*CAMERAS.get(view, ()), view, f"cam_{view}")
        names = (options.cameras[view],) if view in options.cameras else usual
        name = next((name for name in names if name in have), "")
        if not name:
            raise ConfigError(
                f"{path}: has no camera for {view!r} of data.views; it has {', '.join(have) or 'none'}; name the right "
                f"one in ingest.aloha_hdf5.cameras.{view}"
            )
        if have[name].ndim != 4 and not options.channels:
            raise ConfigError(
                f"{path}: {name} holds JPEGs, and nothing tells whether red and blue are exchanged in them, as most "
                "recorders of this kind do (they give RGB to OpenCV); look at one and declare "
                "ingest.aloha_hdf5.channels: bgr (exchanged) or rgb"
            )
        first = next(pictures(have[name], name, 1))
        cameras[view] = (name, (first.shape[0], first.shape[1]))
    return cameras


def images(file: Any, name: str, steps: int, prepare: Preparation, options: AlohaHdf5Options) -> Images:
    """(T, height, width, 3) frames of a camera in RGB, read one at a time.

    Raises:
        DataError: the camera is missing, or has another number of frames than qpos has rows.
    """
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
