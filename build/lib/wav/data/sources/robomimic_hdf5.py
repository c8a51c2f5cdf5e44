"""robomimic's HDF5 files: ``data/demo_i/{actions, obs/...}`` of one environment, which ``env_args`` describes.

Frame t is the one before action t, as robomimic renders it from the recorded state; only ``obs`` is read, never
``next_obs``. Pictures of robosuite are stored upright, its rows reversed: to this library's rotation by 180 degrees
only the columns are missing. What does not stand in the file is declared in ``ingest.robomimic_hdf5``: the language,
and for environments other than robosuite's the pictures' rotation. ``dones`` proves no success (it may mark every end),
rewards do, unless they are shaped.
"""

from __future__ import annotations

import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from wav.data.conventions import Conventions
from wav.data.names import task_name
from wav.data.sources import checks
from wav.data.sources.damage import unreadable
from wav.data.sources.frames import described
from wav.data.sources.libero_file import (
    TaskFile,
    attribute_json,
    attribute_text,
    claimed_length,
    control_rate,
    find_cameras,
    has_joints,
    is_hidden,
    observations,
)
from wav.data.sources.libero_hdf5 import demo_jobs
from wav.data.sources.staging import DatasetSource, Job
from wav.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings

_ROBOSUITE = 1  # robomimic's EnvType
_SAMPLES = 3
_LOG = logging.getLogger(__name__)


class RobomimicHdf5Source(DatasetSource):
    """Reads the HDF5 file at ``ingest.path``, or every one below it; a task is an instruction.

    Raises:
        ConfigError: the path, a camera or a mask is missing, or a convention must be declared.
        DataError: a file is damaged or none of robomimic's.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        if (data.state_dim, data.action_dim) != (8, 7):
            raise ConfigError(
                f"data.state_dim, data.action_dim = {data.state_dim}, {data.action_dim}: robomimic's one-armed data "
                "has 8 and 7; set them so, or choose another ingest.source"
            )
        root = Path(settings.path).expanduser()
        if not settings.path or not root.exists():
            raise ConfigError(f"ingest.path = {settings.path!r}: no such file or folder; give robomimic's HDF5 files")
        found = [root] if root.is_file() else sorted(p for p in root.rglob("*.hdf5") if not is_hidden(p, root))
        if not found:
            raise ConfigError(f"ingest.path = {settings.path!r}: holds no *.hdf5 file; give robomimic's HDF5 files")
        opened = [open_file(path, data, settings) for path in found]
        wanted = {task_name(task) for task in data.tasks}
        self.files = [file for file in opened if not wanted or file.task in wanted]
        missing = wanted - {file.task for file in self.files}
        if missing:
            have = ", ".join(sorted({file.task for file in opened}))
            raise ConfigError(f"data.tasks: {min(missing)!r} has no file under {settings.path}; it holds {have}")
        twice = next((p for p in pairwise(sorted(self.files, key=lambda f: f.task)) if p[0].task == p[1].task), None)
        if twice is not None:
            raise ConfigError(
                f"ingest.path = {settings.path!r}: {twice[0].path} and {twice[1].path} are of one task; give one file"
            )
        checks.check_instructions((file.instruction for file in self.files), data.text_tokens)

    def conventions(self) -> Conventions:
        """As the simulators of this library; a real camera's pictures stay as they are."""
        rotation = "none" if self.files[0].rotation == "camera" else "180"
        return Conventions.recorded(self.data, image_rotation=rotation, gripper=checks.CANONICAL_GRIPPER)

    def jobs(self) -> list[Job]:
        """A few demonstrations of one file each."""
        return demo_jobs(self, self.files)

    def describe(self) -> dict[str, Any]:
        """Per file what was read, detected and declared."""
        return {
            "format": "robomimic_hdf5",
            "path": self.settings.path,
            "mask": self.settings.robomimic_hdf5.mask,
            "drop_noops": self.settings.robomimic_hdf5.drop_noops,
            "files": [
                {
                    "file": file.path.name,
                    "task": file.task,
                    "cameras": {view: described(key, size, self.data) for view, key, size in file.cameras},
                    "rotation_stored": file.rotation,
                    "rows_reversed": file.mirrored,
                    "gripper_stored": file.gripper,
                    "success": file.success or "not told",
                }
                for file in self.files
            ],
        }


def open_file(path: Path, data: DataSettings, settings: IngestSettings) -> TaskFile:
    """Read a file's attributes, list its demonstrations and find its conventions.

    Raises:
        ConfigError: a convention must be declared, or contradicts the file.
        DataError: the file is damaged or none of robomimic's.
    """
    try:
        with h5py.File(path, "r") as file:
            group = file.get("data")
            names = [] if group is None else [name for name in group if re.fullmatch(r"demo_\d+", name)]
            if not names or "env_args" not in group.attrs:
                raise DataError(f"{path}: has no data/demo_i groups with env_args; give robomimic's HDF5 files")
            return _describe(path, file, sorted(names, key=lambda name: int(name[5:])), data, settings)
    except (OSError, RuntimeError, KeyError) as error:
        raise unreadable(path, "HDF5 file", error) from None


def _describe(path: Path, file: Any, names: list[str], data: DataSettings, settings: IngestSettings) -> TaskFile:
    """A TaskFile from an open file."""
    group, where, options = file["data"], str(path), settings.robomimic_hdf5
    environment = attribute_json(group.attrs["env_args"], f"{where}: env_args")
    arguments = environment.get("env_kwargs") or {}
    _check_actions(arguments, group[names[0]], where)
    rate = control_rate(environment, where)
    checks.check_control_hz(rate, options, data.control_hz, f"{where}: env_args.env_kwargs.control_freq")
    simulated = environment.get("type") == _ROBOSUITE
    upright = simulated and not options.image_rotation
    demos = tuple(_chosen(file, names, options.mask, where)[: settings.episodes_per_task])
    instruction = _instruction(group[demos[0]], str(environment.get("env_name", "")), options.instructions, where)
    detected = checks.detect_gripper(_gripper_samples(group, demos))
    return TaskFile(
        path=path,
        task=task_name(instruction),
        instruction=instruction,
        demos=demos,
        lengths=tuple(claimed_length(group[demo]) if demo in group else 0 for demo in demos),
        cameras=find_cameras(where, group, tuple(d for d in demos if d in group), data, options),
        rotation="none" if upright else checks.declared_rotation(options, "", where),
        mirrored=upright,
        after=False,
        joints=any(has_joints(group[demo]) for demo in demos if demo in group),
        gripper=checks.resolve_gripper(options, detected, checks.CANONICAL_GRIPPER if simulated else "", where),
        render="full",
        simulator=(),
        drop_noops=options.drop_noops,
        success="" if isinstance(arguments, dict) and arguments.get("reward_shaping") else "rewards",
    )


def _check_actions(arguments: Any, demo: Any, where: str) -> None:
    """Refuse actions that the environment does not take as OSC_POSE deltas of one arm."""
    width = demo["actions"].shape[-1]
    if width != 7:
        raise ConfigError(
            f"{where}: actions have {width} numbers; this reader takes one arm's OSC_POSE deltas and gripper (7): "
            "convert others to LeRobot v3.0 with joint targets"
        )
    todo, controllers = [arguments.get("controller_configs") if isinstance(arguments, dict) else None], []
    while todo:  # a mapping, or one for each part of the body
        config = todo.pop()
        if isinstance(config, dict):
            controllers += [config] if str(config.get("type", "")).startswith(("OSC", "IK", "JOINT")) else []
            todo += list(config.values())
    for config in controllers:
        delta = config.get("control_delta", config.get("input_type", "delta") == "delta")
        if config["type"] != "OSC_POSE" or not delta:
            raise ConfigError(
                f"{where}: env_args say controller {config['type']} with {'delta' if delta else 'absolute'} actions; "
                "this reader takes OSC_POSE deltas: collect or convert them so"
            )


def _chosen(file: Any, names: list[str], mask: str, where: str) -> list[str]:
    """Demonstrations of ``mask/<mask>``, or all of them; one that the mask names and the file lacks is quarantined."""
    masks = list(file["mask"]) if isinstance(file.get("mask"), h5py.Group) else []
    if not mask:
        if "valid" in masks:
            _LOG.warning("%s: has mask/valid; all are ingested: choose with ingest.robomimic_hdf5.mask: train", where)
        return names
    if mask not in masks:
        raise ConfigError(
            f"ingest.robomimic_hdf5.mask = {mask!r}: {where} has no such mask; it has {', '.join(masks) or 'none'}"
        )
    chosen = sorted({attribute_text(name) for name in file["mask"][mask][()]}, key=lambda name: (len(name), name))
    if not any(name in names for name in chosen):
        raise ConfigError(
            f"ingest.robomimic_hdf5.mask = {mask!r}: {where}: names {len(chosen)} demonstrations, none of which is "
            "there (robomimic's split of few demonstrations leaves a mask empty); choose another"
        )
    return sorted(chosen, key=lambda name: name not in names)  # those that are there come first: they tell conventions


def _instruction(demo: Any, environment: str, declared: dict[str, str], where: str) -> str:
    """The declared language of an environment, or what the simulator wrote down (``ep_meta`` of RoboCasa)."""
    told = attribute_json(demo.attrs.get("ep_meta"), f"{where}: ep_meta").get("lang", "")
    text = declared.get(environment) or str(told).strip()
    if not text:
        raise ConfigError(
            f"{where}: holds no language; declare ingest.robomimic_hdf5.instructions: "
            f"{{{environment}: ...}} with the command of environment {environment!r}"
        )
    return text


def _gripper_samples(group: Any, demos: tuple[str, ...]) -> list[tuple[checks.Floats, checks.Floats]]:
    """(command, opening) of the first few demonstrations; damaged ones are judged when they are read."""
    samples: list[tuple[checks.Floats, checks.Floats]] = []
    for demo in demos[:_SAMPLES]:
        fingers = observations(group.get(demo)).get("robot0_gripper_qpos")
        actions = group[demo].get("actions") if fingers is not None else None
        if actions is not None and fingers.shape == (len(actions), 2) and len(actions):
            opening = np.asarray(fingers, np.float64)
            samples.append((np.asarray(actions, np.float64)[:, 6], opening[:, 0] - opening[:, 1]))
    return samples
