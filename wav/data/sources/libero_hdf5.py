"""LIBERO's own HDF5 files: one ``<task>_demo.hdf5`` per task, ``data/demo_i/{actions, states, obs/...}``.

Conventions are read from the file's attributes (``problem_info``, ``macros_image_convention``, ``env_args``); where a
file has none (OpenVLA's regenerated files), ``image_rotation``, ``control_hz`` and, if the simulator's
states are missing, ``alignment`` of ``ingest.libero_hdf5`` must declare them.

Non-obvious: LIBERO's ``create_dataset.py`` records observation t AFTER action t, OpenVLA's regeneration before it.
The joints in the recorded simulator state (before action t) tell which; frames are then paired with the action taken
on seeing them. Beyond LIBERO's layout these are read where present (:mod:`wav.data.sinks.libero_hdf5` writes them):
group attributes ``alignment`` (for files without states), ``render`` and ``simulator_versions`` (JSON), ``demo_i``
attributes ``init_index``, ``seed`` and ``success``, datasets ``demo_i/expert_actions`` (T, 7) and
``demo_i/obs/joints`` (T, 8).
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wav.config import DataSettings, IngestSettings
from wav.data.names import LIBERO_SUITES, is_plain, suites_of, task_in
from wav.data.names import task_name as plain_name
from wav.data.sources import checks
from wav.data.sources.damage import opened_hdf5
from wav.data.sources.demo_files import (
    DemoSource,
    Sample,
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

#: macros_image_convention: both are unrotated, "opencv" has its rows reversed
IMAGE_CONVENTIONS = ("opengl", "opencv")
#: frame t is the one after action t, as create_dataset.py records it, or the one before, as regenerated files have it
AFTER, BEFORE = "after_action", "before_action"
_LOG = logging.getLogger(__name__)


class LiberoHdf5Source(DemoSource):
    """Reads every ``*.hdf5`` under ``ingest.path`` whose task is in ``data.tasks`` (empty: all)."""

    def open_files(self) -> list[TaskFile]:
        """Those of the wanted tasks, in the order of ``data.tasks``, else by name."""
        found = task_files(self.settings.path, self.data.suite)
        check_tasks(self.data.tasks, (task for _, task in found), self.settings.path)
        wanted = list(self.data.tasks) or sorted({task for _, task in found})
        chosen = sorted((wanted.index(task), path, task) for path, task in found if task in wanted)
        return [replace(open_task_file(path, self.data, self.settings), task=task) for _, path, task in chosen]

    def about(self, file: TaskFile) -> dict[str, Any]:
        """With the side of its action that a frame was recorded on."""
        return super().about(file) | {"observation": "after its action" if file.after else "before its action"}


def dataset_files(path: str, suite: str) -> list[Path]:
    """The HDF5 files of a suite under ``path`` (a file, a folder, or a folder of suites); ConfigError for none."""
    root = Path(path).expanduser()
    folder = suite_folder(root, suite)
    others = [name for name in LIBERO_SUITES if name != suite and (root / name).is_dir()]
    if path and folder is None and others:
        raise ConfigError(
            f"ingest.path = {path!r}: holds {', '.join(others)} but no folder {suite!r}; name one of them in "
            f"data.suites, or add the files of {suite}"
        )
    return hdf5_files(str(folder) if path and folder else path, "the folder of LIBERO's *_demo.hdf5 files")


def suite_folder(root: Path, suite: str) -> Path | None:
    """The folder of a suite's files below ``root``, as LIBERO or as OpenVLA's regeneration calls it."""
    return next((root / name for name in (suite, f"{suite}_no_noops") if (root / name).is_dir()), None)


def task_files(path: str, suite: str) -> list[tuple[Path, str]]:
    """The HDF5 files of a suite, or of several in a folder each (else ConfigError), and the tasks they are of."""
    root, suites = Path(path).expanduser(), suites_of(suite)
    lacking = next((own for own in suites if len(suites) > 1 and suite_folder(root, own) is None), None)
    if lacking is not None and path and root.exists():
        raise ConfigError(
            f"ingest.path = {path!r}: has no folder {lacking!r}; give a folder with one for each of data.suites "
            f"({', '.join(suites)})"
        )
    return [(file, task_in(suite, own, task_name(file))) for own in suites for file in dataset_files(path, own)]


def task_name(path: Path) -> str:
    """The task a file is named after."""
    name = path.stem.removesuffix("_demo")
    return name if is_plain(name) else plain_name(name)


def open_task_file(path: Path, data: DataSettings, settings: IngestSettings) -> TaskFile:
    """A file's demonstrations and conventions, from its attributes and numbers; DataError where it is not LIBERO's."""
    with opened_hdf5(path) as file:
        names = demo_names(file.get("data"))[: settings.episodes_per_task]
        if not names:
            raise DataError(f"{path}: holds no data/demo_i groups; give LIBERO's HDF5 files, or another ingest.source")
        return _describe(path, file["data"], names, data, settings)


def _describe(path: Path, group: Any, names: list[str], data: DataSettings, settings: IngestSettings) -> TaskFile:
    """A TaskFile from an open ``data`` group."""
    where, attributes, options = str(path), group.attrs, settings.libero_hdf5
    demos = [group[name] for name in names]
    recorded = attribute_text(attributes.get("macros_image_convention"))
    if recorded and recorded not in IMAGE_CONVENTIONS:
        raise DataError(f"{where}: macros_image_convention = {recorded!r} is unknown; expected opengl or opencv")
    rotation = checks.declared_rotation(options, "none" if recorded else "", where)
    rate = control_rate(attribute_json(attributes.get("env_args"), f"{where}: env_args"), where)
    checks.check_control_hz(rate, options, data.control_hz, f"{where}: env_args.env_kwargs.control_freq")
    cameras = find_cameras(where, demos, data, options)
    sound = samples(demos)
    after = _alignment(where, sound, options.alignment, attribute_text(attributes.get("alignment"))) == AFTER
    actions = [checks.shifted_actions(sample.actions) if after else sample.actions for sample in sound]
    detected = checks.detect_gripper((a[:, 6], sample.opening) for a, sample in zip(actions, sound, strict=True))
    simulator = attribute_json(attributes.get("simulator_versions"), f"{where}: simulator_versions")
    return TaskFile(
        path=path,
        task=task_name(path),
        instruction=instruction(where, attributes, task_name(path)),
        demos=tuple(names),
        lengths=tuple(claimed_length(demo) for demo in demos),
        cameras=cameras,
        rotation=rotation,
        mirrored=recorded == "opencv",
        joints=has_joints(demos),
        gripper=checks.resolve_gripper(options, detected, checks.CANONICAL_GRIPPER, where),
        drop_noops=options.drop_noops,
        success="dones",
        after=after,
        render=attribute_text(attributes.get("render")) or "full",
        simulator=tuple(sorted((str(k), str(v)) for k, v in simulator.items())),
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


def _alignment(where: str, sound: list[Sample], declared: str, recorded: str) -> str:
    """Whether observation t was recorded after action t or before it; empty without any sound demonstration.

    ``declared`` is the reader's option, ``recorded`` the attribute that :mod:`wav.data.sinks.libero_hdf5` writes.
    """
    if recorded not in ("", AFTER, BEFORE):
        raise DataError(f"{where}: alignment = {recorded!r} is unknown; expected {AFTER} or {BEFORE}")
    votes = {vote for sample in sound if (vote := _vote(sample))}
    if len(votes) > 1:
        raise DataError(
            f"{where}: observations are recorded before their action in some demonstrations, after it in others"
        )
    shown = next(iter(votes), recorded)
    if shown and declared and shown != declared:
        witness = "simulator states show" if votes else "file's attribute alignment says"
        raise ConfigError(
            f"{where}: ingest.libero_hdf5.alignment = {declared!r}, but the {witness} the other; leave it empty"
        )
    if sound and not (shown or declared):  # without any sound demonstration each will be refused for its own reason
        raise ConfigError(
            f"{where}: states and joint_states do not tell whether frame t is before or after action t; declare "
            f"ingest.libero_hdf5.alignment: {AFTER} (LIBERO's own files) or {BEFORE} (regenerated ones)"
        )
    return shown or declared


def _vote(sample: Sample) -> str:
    """What a demonstration's joints show beside the simulator's state t, which is the one before action t."""
    joints, states = sample.joints, sample.states
    if joints is None or states is None or len(joints) != len(states) or states.ndim != 2 or states.shape[1] < 8:
        return ""
    before = np.abs(joints[1:] - states[1:, 1:8]).max()  # states: time, then joint positions, the arm's first
    after = np.abs(joints[:-1] - states[1:, 1:8]).max()
    if min(before, after) >= 0.1 * max(before, after):
        return ""
    return AFTER if after < before else BEFORE
