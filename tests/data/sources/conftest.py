"""Settings and folders of the dataset readers' tests."""

from pathlib import Path

import pytest

from tests.data.sources.datasets import TASKS, libero_file
from wav.config import DataSettings, IngestSettings
from wav.data.sources.options import LeRobotOptions


@pytest.fixture
def data() -> DataSettings:
    return DataSettings(
        suite="libero_object", tasks=(), image_height=32, image_width=32, memory_frames=2, action_chunk=4, render="full"
    )


@pytest.fixture
def libero(tmp_path: Path) -> Path:
    folder = tmp_path / "libero"
    folder.mkdir()
    for task in TASKS:
        libero_file(folder / f"{task}_demo.hdf5")
    return folder


@pytest.fixture
def hdf5_settings(libero: Path) -> IngestSettings:
    return IngestSettings(source="libero_hdf5", path=str(libero), min_length=4)


@pytest.fixture
def lerobot_settings(tmp_path: Path) -> IngestSettings:
    return IngestSettings(
        source="lerobot", path=str(tmp_path / "lerobot"), min_length=4, lerobot=LeRobotOptions(image_rotation="180")
    )
