"""robomimic's HDF5 files: ``data/demo_i/{actions, obs/...}`` of one environment, which ``env_args`` describes.

Frame t is the one before action t, as robomimic renders it from the recorded state; only ``obs`` is read, never
``next_obs``. Pictures of robosuite are stored upright, its rows reversed: to this library's rotation by 180 degrees
only the columns are missing. What does not stand in the file is declared in ``ingest.robomimic_hdf5``: the language,
and for environments other than robosuite's the pictures' rotation. ``dones`` proves no success (it may mark every end),
rewards do, unless they are shaped.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import h5py

from wav.config import DataSettings, IngestSettings
from wav.data.names import task_name
from wav.data.sources import checks
from wav.data.sources.damage import opened_hdf5
from wav.data.sources.demo_files import (
    DemoSource,
    TaskFile,
    attribute_json,
    attribute_text,
    claimed_length,
    control_rate,
    demo_names,
    find_cameras,
    has_joints,
    samples,
)
from wav.data.sources.finding import check_tasks, hdf5_files
from wav.errors import ConfigError, DataError

_ROBOSUITE = 1  # robomimic's EnvType
_LOG = logging.getLogger(__name__)


class RobomimicHdf5Source(DemoSource):
    """Reads the HDF5 file at ``ingest.path``, or every one below it; a task is an instruction."""

    def open_files(self) -> list[TaskFile]:
        """Those of the wanted tasks, by name."""
        found = hdf5_files(self.settings.path, "robomimic's HDF5 files")
        opened = [open_file(path, self.data, self.settings) for path in found]
        wanted = {task_name(task) for task in self.data.tasks}
        check_tasks(sorted(wanted), (file.task for file in opened), self.settings.path)
        return [file for file in opened if not wanted or file.task in wanted]

    def about(self, file: TaskFile) -> dict[str, Any]:
        """With what tells success."""
        return super().about(file) | {"success": file.success or "not told"}

    def describe(self) -> dict[str, Any]:
        """With the mask that chose the demonstrations."""
        return super().describe() | {"mask": self.settings.robomimic_hdf5.mask}


def open_file(path: Path, data: DataSettings, settings: IngestSettings) -> TaskFile:
    """A file's demonstrations and conventions; DataError where it is damaged or none of robomimic's."""
    with opened_hdf5(path) as file:
        names = demo_names(file.get("data"))
        if not names or "env_args" not in file["data"].attrs:
            raise DataError(f"{path}: has no data/demo_i groups with env_args; give robomimic's HDF5 files")
        return _describe(path, file, names, data, settings)


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
    chosen = _chosen(file, names, options.mask, where)[: settings.episodes_per_task]
    demos = [group[name] for name in chosen if name in group]
    instruction = _instruction(demos[0], str(environment.get("env_name", "")), options.instructions, where)
    detected = checks.detect_gripper((sample.actions[:, 6], sample.opening) for sample in samples(demos))
    return TaskFile(
        path=path,
        task=task_name(instruction),
        instruction=instruction,
        demos=tuple(chosen),
        lengths=tuple(claimed_length(group.get(name)) for name in chosen),
        cameras=find_cameras(where, demos, data, options),
        rotation="none" if upright else checks.declared_rotation(options, "", where),
        mirrored=upright,
        joints=has_joints(demos),
        gripper=checks.resolve_gripper(options, detected, checks.CANONICAL_GRIPPER if simulated else "", where),
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
