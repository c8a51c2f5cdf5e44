"""An example reader of demonstrations: one ``.npz`` an episode, joints of one arm, two cameras.

``presets/own.yaml`` names it (``ingest.source: reader:NpzSource``). ``python reader.py demonstrations`` writes three
made-up episodes to try it on. A reader says what its arrays mean (conventions), cuts the dataset into jobs, and yields
an Episode, or a Rejection with the reason, for each episode; processes of their own run the jobs.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import ABSOLUTE_ACTIONS, Conventions
from wav.data.episode import Episode
from wav.data.names import task_name
from wav.data.sources.frames import preparation
from wav.data.sources.staging import DatasetSource, Item, Job, judged
from wav.data.store import Rejection
from wav.errors import ConfigError, DataError


class NpzSource(DatasetSource):
    """Reads every ``*.npz`` at ``ingest.path``: state (T, S), action (T, A) in radians, pictures of every view."""

    def files(self) -> list[Path]:
        """The episodes, in order.

        Raises:
            ConfigError: the folder has none.
        """
        found = sorted(project(self.settings.path).glob("*.npz"))
        if not found:
            raise ConfigError(f"ingest.path = {self.settings.path!r}: holds no *.npz; name the folder of your episodes")
        return found

    def conventions(self) -> Conventions:
        """What the arrays mean: a real camera's upright pictures, absolute joint targets."""
        return Conventions.recorded(
            self.data,
            image_rotation="none",
            gripper="absolute",
            state_layout=f"joints: {self.data.state_dim}",
            action=ABSOLUTE_ACTIONS,
        )

    def jobs(self) -> list[Job]:
        """A few files each."""
        items = [Item(path, path.stat().st_size, (path,), path.name) for path in self.files()]
        return self.jobs_of(read, items, self.settings.path)

    def describe(self) -> dict[str, Any]:
        """For the store's ``source.json``."""
        return {"format": "npz", "path": self.settings.path}


def project(path: str) -> Path:
    """A path beside this file, from wherever the stage runs (a preset has a workspace of its own)."""
    return Path(__file__).parent / path


def read(
    plan: None, paths: tuple[Path, ...], data: DataSettings, settings: IngestSettings
) -> Iterator[Episode | Rejection]:
    """The episode of each file."""
    for path in paths:
        yield judged(f"{data.suite}/{path.stem}", "", path.name, settings, read_file, path, data)


def read_file(path: Path, data: DataSettings) -> Episode:
    """The episode of a file; DataError where it is not fit."""
    prepare = preparation("none", "none", mirrored=False, height=data.image_height, width=data.image_width)
    try:
        with np.load(path) as file:
            text = str(file["instruction"])
            state, action = file["state"].astype(np.float32), file["action"].astype(np.float32)
            images = {view: prepare.stack(file[view], len(file[view])) for view in data.views}
    except (ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"is no archive of an episode ({error})") from None
    return Episode(
        episode_id=f"{data.suite}/{path.stem}",
        task=task_name(text),
        instruction=text,
        images=images,
        state=state,
        joints=state,
        actions=action,
        source=f"npz:{path.name}",
    )


def make(folder: Path, episodes: int = 3, steps: int = 90) -> None:
    """Made-up episodes: an arm that moves, seen as a square that moves."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(episodes):
        rng = np.random.default_rng(number)
        path = np.cumsum(rng.normal(scale=0.02, size=(steps + 1, 6)), axis=0)
        pictures = np.full((2, steps, 96, 128, 3), 60, np.uint8)
        for step in range(steps):
            row, column = (40 + 20 * np.tanh(path[step, :2])).astype(int)
            pictures[:, step, row : row + 12, column : column + 12] = (220, 40, 40)
        np.savez_compressed(
            folder / f"episode_{number:03d}.npz",
            state=path[:-1],
            action=path[1:],
            agentview=pictures[0],
            wrist=pictures[1],
            instruction="move the red square",
        )


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "demonstrations"))
