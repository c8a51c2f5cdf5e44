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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from wav.data.conventions import ABSOLUTE_ACTIONS, Conventions
from wav.data.episode import Episode
from wav.data.names import task_name
from wav.data.sources import checks
from wav.data.sources.aloha_file import find_cameras, images, language, length, measured, order, rows
from wav.data.sources.damage import unreadable
from wav.data.sources.frames import Preparation, described, preparation
from wav.data.sources.libero_file import flat, is_hidden
from wav.data.sources.staging import DatasetSource, Job
from wav.data.store import Rejection
from wav.errors import ConfigError, DataError
from wav.shards import grouped

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings


@dataclass(frozen=True)
class EpisodeFile:
    """One file, as its header says."""

    path: Path
    name: str
    task: str
    instruction: str
    length: int


class AlohaHdf5Source(DatasetSource):
    """Reads every ``*.hdf5`` at or below ``ingest.path``, by number; a folder is a task.

    Raises:
        ConfigError: the path or a camera is missing, or what the files do not tell is not declared.
        DataError: no file can be read.
    """

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        super().__init__(data, settings)
        self.options = settings.aloha_hdf5
        self.root = Path(settings.path).expanduser()
        if not settings.path or not self.root.is_dir():
            raise ConfigError(
                f"ingest.path = {settings.path!r}: no such folder; give the folder of episode_N.hdf5 files"
            )
        found = [path for path in self.root.rglob("*.hdf5") if not is_hidden(path, self.root)]
        found = sorted((path for path in found if "features" not in path.stem), key=order)
        if not found:
            raise ConfigError(f"ingest.path = {settings.path!r}: holds no *.hdf5 file; give the folder of episodes")
        where = f"{self.root} (act's recorders run at 50 Hz, AgileX' at 30)"
        checks.check_control_hz(0, self.options, data.control_hz, where)
        self.files = self._chosen(found)
        checks.check_instructions(dict.fromkeys(file.instruction for file in self.files), data.text_tokens)
        self.cameras, self.report = self._first_sound()

    def _chosen(self, found: list[Path]) -> list[EpisodeFile]:
        """Files of the wanted tasks, at most ``episodes_per_task`` of each."""
        wanted = {task_name(task) for task in self.data.tasks}
        counts: dict[str, int] = {}
        files = []
        for path in found:
            folder = path.parent.relative_to(self.root).as_posix()
            text = self.options.instructions.get(folder) or language(path.parent)
            if not text:
                raise ConfigError(
                    f"{path.parent}: tells no language; declare ingest.aloha_hdf5.instructions: "
                    f"{{{json.dumps(folder)}: ...}} with the command of the episodes in that folder"
                )
            task = task_name(text)
            counts[task] = counts.get(task, 0) + 1
            if (not wanted or task in wanted) and counts[task] <= self.settings.episodes_per_task:
                name = f"{self.data.suite}/{task}/{path.relative_to(self.root).with_suffix('').as_posix()}"
                files.append(EpisodeFile(path, name, task, text, length(path)))
        if missing := wanted - set(counts):
            have = ", ".join(sorted(counts))
            raise ConfigError(f"data.tasks: {min(missing)!r} is not in {self.settings.path}; it holds {have}")
        return files

    def _first_sound(self) -> tuple[dict[str, tuple[str, tuple[int, int]]], dict[str, Any]]:
        """(view -> camera and its size, what is measured) in the first file that can be read."""
        first: DataError | None = None
        for file in self.files:
            try:
                with h5py.File(file.path, "r") as opened:
                    report = measured(*rows(opened, self.data, self.options), self.options)
                    return find_cameras(file.path, opened, self.data, self.options), report
            except (OSError, RuntimeError, KeyError) as error:
                first = first or unreadable(file.path, "HDF5 file", error)
            except DataError as error:
                first = first or DataError(f"{file.path}: {error}")
        raise first or DataError(f"{self.root}: no episode is left")

    def conventions(self) -> Conventions:
        """Joint targets; a real camera's pictures stay as they are."""
        layout = f"joints: {self.data.state_dim}"
        return Conventions.recorded(
            self.data, image_rotation="none", gripper="absolute", state_layout=layout, action=ABSOLUTE_ACTIONS
        )

    def jobs(self) -> list[Job]:
        """A few files each."""
        data, jobs = self.data, []
        frame = len(data.views) * data.image_height * data.image_width * 3
        for part in grouped([file.length * frame for file in self.files]):
            files = tuple(self.files[part.start : part.stop])
            jobs.append(
                self.job(
                    read_files,
                    (files, {view: name for view, (name, _) in self.cameras.items()}, data, self.settings),
                    sum(file.length for file in files) * frame,
                    label=f"{files[0].path} to {files[-1].path.name}",
                    episodes=len(files),
                    files=[file.path for file in files],
                    identity=[[file.name, file.instruction] for file in files],
                )
            )
        return jobs

    def describe(self) -> dict[str, Any]:
        """What was read, measured in the first sound file, and declared."""
        cameras = {view: described(name, size, self.data) for view, (name, size) in self.cameras.items()}
        declared = {"channels": self.options.channels or "rgb", "shift": self.options.shift, "base": self.options.base}
        return {"format": "aloha_hdf5", "path": self.settings.path, "cameras": cameras, **declared, **self.report}


def read_files(
    files: tuple[EpisodeFile, ...], cameras: dict[str, str], data: DataSettings, settings: IngestSettings
) -> Iterator[Episode | Rejection]:
    """The episode of each file; one that is not sound comes as a Rejection."""
    prepare = preparation("camera", "camera", False, data.image_height, data.image_width)
    for file in files:
        try:
            with h5py.File(file.path, "r") as opened:
                episode = _read(opened, file, cameras, prepare, data, settings)
            episode.validate()
        except (ConfigError, DataError) as error:
            yield Rejection(file.name, file.task, f"{file.path.name}: {flat(error)}")
            continue
        except (OSError, RuntimeError, KeyError) as error:
            yield Rejection(file.name, file.task, str(unreadable(file.path, "HDF5 file", error)))
            continue
        yield episode


def _read(
    opened: Any,
    file: EpisodeFile,
    cameras: dict[str, str],
    prepare: Preparation,
    data: DataSettings,
    settings: IngestSettings,
) -> Episode:
    options = settings.aloha_hdf5
    state, action = rows(opened, data, options)
    measured(state, action, options)
    if len(state) < settings.min_length:
        raise DataError(f"{len(state)} steps, fewer than ingest.min_length = {settings.min_length}")
    return Episode(
        episode_id=file.name,
        task=file.task,
        instruction=file.instruction,
        images={view: images(opened, name, len(state), prepare, options) for view, name in cameras.items()},
        state=state.astype(np.float32),
        joints=state.astype(np.float32),
        actions=action.astype(np.float32),
        expert_actions=None,
        success=True,
        init_index=-1,
        seed=-1,
        source=f"aloha_hdf5:{file.path.name}",
    )
