"""Small random episodes and stores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wav.config import DataSettings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter


@pytest.fixture
def data() -> DataSettings:
    return DataSettings(
        image_height=16,
        image_width=32,
        memory_frames=3,
        memory_horizon=10,
        future_frames=5,
        frame_stride=2,
        action_chunk=6,
        tasks=("lift_red_cube", "lift_green_cube"),
    )


@pytest.fixture
def conventions(data: DataSettings) -> Conventions:
    return Conventions.for_simulator(data, {"mujoco": "3.3.2"})


@pytest.fixture
def make_episode(data: DataSettings) -> Callable[..., Episode]:
    def make(index: int = 0, length: int = 12, **changes) -> Episode:
        rng = np.random.default_rng(index)
        shape = (length, data.image_height, data.image_width, 3)
        task = changes.pop("task", data.tasks[index % 2])
        actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
        actions[:, 6] = np.where(np.arange(length) < length // 2, -1, 1)
        fields = {
            "episode_id": f"{task}/{index:05d}",
            "task": task,
            "instruction": task.replace("_", " "),
            "images": {view: rng.integers(0, 256, shape, np.uint8) for view in data.views},
            "state": rng.normal(size=(length, 8)).astype(np.float32),
            "joints": rng.normal(size=(length, 8)).astype(np.float32),
            "actions": actions,
            "expert_actions": (actions * 0.5).astype(np.float32),
            "success": True,
            "init_index": 1000 + index,
            "seed": index,
            "source": "test",
        }
        return Episode(**{**fields, **changes})

    return make


@pytest.fixture
def make_store(tmp_path: Path, conventions: Conventions, make_episode) -> Callable[..., EpisodeStore]:
    def make(lengths: tuple[int, ...] = (12, 9, 15, 8), **settings) -> EpisodeStore:
        with EpisodeStoreWriter(tmp_path / "episodes", conventions, **settings) as writer:
            for index, length in enumerate(lengths):
                writer.add(make_episode(index, length))
        return EpisodeStore.open(tmp_path / "episodes")

    return make
