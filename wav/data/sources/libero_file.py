"""What a LIBERO HDF5 file says about itself: tasks, cameras and conventions, known before anything is read.

Used by :mod:`wav.data.sources.libero_hdf5`, which says what the conventions are.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wav.data.names import LIBERO_SUITES, is_plain, suites_of, task_in
from wav.data.names import task_name as plain_name
from wav.data.sources import checks
from wav.data.sources.damage import unreadable
from wav.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings
    from wav.data.sources.options import DatasetOptions, LiberoHdf5Options

#: view -> names of its dataset under obs/, in order of preference
CAMERAS = {
    "agentview": ("agentview_rgb", "agentview_image"),
    "wrist": ("eye_in_hand_rgb", "robot0_eye_in_hand_image"),
}
#: macros_image_convention: both are unrotated, "opencv" has its rows reversed
IMAGE_CONVENTIONS = ("opengl", "opencv")
#: frame t is the one after action t, as create_dataset.py records it, or the one before, as regenerated files have it
AFTER, BEFORE = "after_action", "before_action"
_SAMPLES = 3  # demonstrations per file whose numbers decide alignment and gripper
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskFile:
    """What a file says about itself; all that a reading process needs besides the settings."""

    path: Path
    task: str
    instruction: str
    demos: tuple[str, ...]
    lengths: tuple[int, ...]
    cameras: tuple[tuple[str, str, tuple[int, int]], ...]
    """(view, name of the dataset under obs/, recorded (H, W)); one that holds others is refused."""
    rotation: str
    mirrored: bool
    after: bool
    """Observation t was recorded after action t."""
    joints: bool
    """Demonstrations hold joint angles; one without is refused, as its rewards would be in other units."""
    gripper: str
    render: str
    simulator: tuple[tuple[str, str], ...]
    drop_noops: bool
    success: str = "dones"
    """Dataset that is above 0 somewhere if the demonstration succeeded; empty where nothing tells."""


def dataset_files(path: str, suite: str) -> list[Path]:
    """The HDF5 files of a suite under ``path`` (a file, a folder, or a folder of suites).

    Raises:
        ConfigError: ``ingest.path`` is missing, holds no HDF5 file, or only folders of other suites.
    """
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise ConfigError(
            f"ingest.path = {path!r}: no such file or folder; give the folder of LIBERO's *_demo.hdf5 files"
        )
    if root.is_file():
        return [root]
    folder = suite_folder(root, suite) or root
    others = [name for name in LIBERO_SUITES if name != suite and (root / name).is_dir()]
    if folder == root and others:
        raise ConfigError(
            f"ingest.path = {path!r}: holds {', '.join(others)} but no folder {suite!r}; name one of them in "
            f"data.suites, or add the files of {suite}"
        )
    found = sorted(path for path in folder.rglob("*.hdf5") if not is_hidden(path, folder))
    if not found:
        raise ConfigError(
            f"ingest.path = {path!r}: holds no *.hdf5 file; give the folder of LIBERO's *_demo.hdf5 files"
        )
    return found


def suite_folder(root: Path, suite: str) -> Path | None:
    """The folder of a suite's files below ``root``, as LIBERO or as OpenVLA's regeneration calls it."""
    return next((root / name for name in (suite, f"{suite}_no_noops") if (root / name).is_dir()), None)


def task_files(path: str, suite: str) -> list[tuple[Path, str]]:
    """The HDF5 files of a suite, or of several in a folder each below ``path``, and the tasks they are of.

    Raises:
        ConfigError: as from :func:`dataset_files`; or one of the suites has no folder.
    """
    root, suites = Path(path).expanduser(), suites_of(suite)
    lacking = next((own for own in suites if len(suites) > 1 and suite_folder(root, own) is None), None)
    if lacking is not None and path and root.exists():
        raise ConfigError(
            f"ingest.path = {path!r}: has no folder {lacking!r}; give a folder with one for each of data.suites "
            f"({', '.join(suites)})"
        )
    return [(file, task_in(suite, own, task_name(file))) for own in suites for file in dataset_files(path, own)]


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a file below ``root`` is hidden, or in a hidden folder: a Mac's "._" twin, a notebook's checkpoints."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def task_name(path: Path) -> str:
    """The task a file is named after."""
    name = path.stem.removesuffix("_demo")
    return name if is_plain(name) else plain_name(name)


def open_task_file(path: Path, data: DataSettings, settings: IngestSettings) -> TaskFile:
    """Read a file's attributes, list its demonstrations and find its conventions.

    Raises:
        ConfigError: a convention must be declared, or contradicts the file.
        DataError: the file is truncated or no LIBERO file.
    """
    try:
        with h5py.File(path, "r") as file:
            group = file.get("data")
            names = [] if group is None else [name for name in group if re.fullmatch(r"demo_\d+", name)]
            if not names:
                raise DataError(
                    f"{path}: holds no data/demo_i groups; give LIBERO's HDF5 files, or another ingest.source"
                )
            names.sort(key=lambda name: int(name[5:]))
            names = names[: settings.episodes_per_task]
            return _describe(path, group, tuple(names), data, settings.libero_hdf5)
    except (OSError, RuntimeError, KeyError) as error:
        raise unreadable(path, "HDF5 file", error) from None


def _describe(
    path: Path, group: Any, demos: tuple[str, ...], data: DataSettings, options: LiberoHdf5Options
) -> TaskFile:
    """A TaskFile from an open ``data`` group."""
    where, attributes = str(path), group.attrs
    recorded = attribute_text(attributes.get("macros_image_convention"))
    if recorded and recorded not in IMAGE_CONVENTIONS:
        raise DataError(f"{where}: macros_image_convention = {recorded!r} is unknown; expected opengl or opencv")
    rotation = checks.declared_rotation(options, "none" if recorded else "", where)
    arguments = attribute_json(attributes.get("env_args"), f"{where}: env_args")
    rate = control_rate(arguments, where)
    checks.check_control_hz(rate, options, data.control_hz, f"{where}: env_args.env_kwargs.control_freq")
    cameras = find_cameras(where, group, demos, data, options)
    lengths = tuple(claimed_length(group[demo]) for demo in demos)
    joints = any(has_joints(group[demo]) for demo in demos)
    samples = _samples(group, demos)
    after = _alignment(where, samples, options.alignment, attribute_text(attributes.get("alignment")))
    pairs = [(checks.shifted_actions(s.actions) if after else s.actions)[:, 6] for s in samples]
    detected = checks.detect_gripper((command, s.opening) for command, s in zip(pairs, samples, strict=True))
    simulator = attribute_json(attributes.get("simulator_versions"), f"{where}: simulator_versions")
    return TaskFile(
        path=path,
        task=task_name(path),
        instruction=instruction(where, attributes, task_name(path)),
        demos=demos,
        lengths=lengths,
        cameras=cameras,
        rotation=rotation,
        mirrored=recorded == "opencv",
        after=after,
        joints=joints,
        gripper=checks.resolve_gripper(options, detected, checks.CANONICAL_GRIPPER, where),
        render=attribute_text(attributes.get("render")) or "full",
        simulator=tuple(sorted((str(k), str(v)) for k, v in simulator.items())),
        drop_noops=options.drop_noops,
    )


def instruction(where: str, attributes: Any, task: str) -> str:
    """The language command of problem_info, or LIBERO's rule for file names (no scene, spaces) where it is missing."""
    info = attribute_json(attributes.get("problem_info"), f"{where}: problem_info")
    raw = info.get("language_instruction", "")
    text = ("".join(map(str, raw)) if isinstance(raw, list) else str(raw)).strip().strip('"')
    if not text:
        text = re.sub(r"^[A-Z_]*SCENE\d+_", "", task).replace("_", " ")
        _LOG.info("%s: no problem_info; the instruction is taken from the file's name: %r", where, text)
    return text


def find_cameras(
    where: str, group: Any, demos: tuple[str, ...], data: DataSettings, options: DatasetOptions
) -> tuple[tuple[str, str, tuple[int, int]], ...]:
    """(view, dataset, (H, W)) of every view, as most of the demonstrations that have all cameras hold it.

    Raises:
        ConfigError: no demonstration has the camera of a view; names those that there are.
    """
    found = [_recorded(group[demo], data, options) for demo in demos]
    whole = [cameras for cameras in found if len(cameras) == len(data.views)]
    if whole:
        size = (data.image_height, data.image_width)
        return tuple((view, *_usual([cameras[view] for cameras in whole], size)) for view in data.views)
    best = max(found, key=len)
    lacking = next(view for view in data.views if view not in best)
    have = sorted(observations(group[demos[0]]))
    raise ConfigError(
        f"{where}: no demonstration has camera {lacking!r} of data.views; obs/ holds {', '.join(have)}; "
        f"name the right one in {options.section}.cameras.{lacking}"
    )


def _recorded(demo: Any, data: DataSettings, options: DatasetOptions) -> dict[str, tuple[str, tuple[int, int]]]:
    """(dataset, (H, W)) of the views that a demonstration holds."""
    observed, found = observations(demo), {}
    for view in data.views:
        usual = (*CAMERAS.get(view, ()), f"{view}_rgb", view)
        names = (options.cameras[view],) if view in options.cameras else usual
        name = next((n for n in names if n in observed and getattr(observed[n], "ndim", 0) == 4), "")
        if name:
            found[view] = (name, (int(observed[name].shape[1]), int(observed[name].shape[2])))
    return found


def _usual(cameras: list[tuple[str, tuple[int, int]]], size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """The (dataset, (H, W)) that most demonstrations have; of equally many the one of ``size``, then the first."""
    counts = Counter(cameras)
    return max(counts, key=lambda camera: (counts[camera], camera[1] == size))


def claimed_length(demo: Any) -> int:
    """Number of steps a demonstration claims."""
    actions = demo["actions"] if isinstance(demo, h5py.Group) and "actions" in demo else None
    return int(actions.shape[0]) if isinstance(actions, h5py.Dataset) and actions.shape else 0


def observations(demo: Any) -> Any:
    """The group ``obs`` of a demonstration; an empty mapping where there is none."""
    found = demo.get("obs") if isinstance(demo, h5py.Group) else None
    return found if isinstance(found, h5py.Group) else {}


def has_joints(demo: Any) -> bool:
    """Whether a demonstration holds joint angles."""
    return any(name in observations(demo) for name in ("joints", "joint_states", "robot0_joint_pos"))


def control_rate(arguments: dict[str, Any], where: str) -> float:
    """The control rate (Hz) of env_args; 0 where it tells none.

    Raises:
        DataError: it is no number.
    """
    kwargs = arguments.get("env_kwargs") or {}
    rate = kwargs.get("control_freq") or 0 if isinstance(kwargs, dict) else kwargs
    if not isinstance(rate, (int, float)):
        raise DataError(f"{where}: env_args.env_kwargs: {rate!r} is no control_freq; download the file again")
    return float(rate)


@dataclass(frozen=True)
class _Sample:
    """Numbers of one demonstration (T rows each)."""

    actions: NDArray[np.float64]
    opening: NDArray[np.float64]
    joints: NDArray[np.float64] | None
    states: NDArray[np.float64] | None


def _samples(group: Any, demos: tuple[str, ...]) -> list[_Sample]:
    """The first few demonstrations whose numbers are sound; damaged ones are judged when they are read."""
    samples: list[_Sample] = []
    for demo in demos:
        try:
            actions = np.asarray(group[demo]["actions"], np.float64)
            fingers = np.asarray(group[demo]["obs/gripper_states"], np.float64)
            joints = _optional(group[demo], "obs/joint_states")
            states = _optional(group[demo], "states")
        except (KeyError, OSError, ValueError, TypeError):
            continue
        sound = actions.shape == (len(fingers), 7) and fingers.shape[1:] == (2,) and len(actions) > 1
        if sound and np.isfinite(actions).all() and np.isfinite(fingers).all():
            samples.append(_Sample(actions, fingers[:, 0] - fingers[:, 1], joints, states))
        if len(samples) == _SAMPLES:
            break
    return samples


def _optional(demo: Any, name: str) -> NDArray[np.float64] | None:
    return np.asarray(demo[name], np.float64) if name in demo else None


def _alignment(where: str, samples: list[_Sample], declared: str, recorded: str = "") -> bool:
    """Whether observation t was recorded after action t: the simulator's state t is the one before it.

    ``declared`` is the reader's option, ``recorded`` the attribute that :mod:`wav.data.sinks.libero_hdf5` writes.
    """
    if recorded not in ("", AFTER, BEFORE):
        raise DataError(f"{where}: alignment = {recorded!r} is unknown; expected {AFTER} or {BEFORE}")
    votes = []
    for sample in samples:
        joints, states = sample.joints, sample.states
        if joints is None or states is None or len(joints) != len(states) or states.ndim != 2 or states.shape[1] < 8:
            continue
        before = np.abs(joints[1:] - states[1:, 1:8]).max()  # states: time, then joint positions, the arm's first
        after = np.abs(joints[:-1] - states[1:, 1:8]).max()
        if min(before, after) < 0.1 * max(before, after):
            votes.append(bool(after < before))
    if votes and len(set(votes)) > 1:
        raise DataError(
            f"{where}: observations are recorded before their action in some demonstrations, after it in others"
        )
    shown = (AFTER if votes[0] else BEFORE) if votes else recorded
    if shown and declared and shown != declared:
        witness = "simulator states show" if votes else "file's attribute alignment says"
        raise ConfigError(
            f"{where}: ingest.libero_hdf5.alignment = {declared!r}, but the {witness} the other; leave it empty"
        )
    if samples and not (shown or declared):  # without any sound demonstration each will be refused for its own reason
        raise ConfigError(
            f"{where}: states and joint_states do not tell whether frame t is before or after action t; declare "
            f"ingest.libero_hdf5.alignment: {AFTER} (LIBERO's own files) or {BEFORE} (regenerated ones)"
        )
    return (shown or declared) == AFTER


def attribute_text(value: Any) -> str:
    """A text attribute, bytes or str; empty where it is missing."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "" if value is None or isinstance(value, h5py.Empty) else str(value)


def attribute_json(value: Any, where: str) -> dict[str, Any]:
    """A JSON attribute; {} where it is missing.

    Raises:
        DataError: it is no JSON, or no object.
    """
    text = attribute_text(value)
    if not text:
        return {}
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}); download the file again") from None
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is {type(raw).__name__} where an object is expected; download the file again")
    return raw


def flat(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())
