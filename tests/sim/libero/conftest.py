"""One simulator of libero_spatial for all tests of a process: a scene of it takes two seconds to build."""

from __future__ import annotations

import os

import pytest

from tests.helpers.libero import INSTALLED, KIT
from wav.config import DataSettings

SPATIAL = DataSettings(suite="libero_spatial", tasks=(), image_height=64, image_width=64)


@pytest.fixture(scope="session")
def env():
    if not (INSTALLED and KIT.is_dir()):
        pytest.skip(f"{KIT}: no LIBERO assets here; set WAV_LIBERO_ASSETS (and make libero)")
    os.environ["WAV_LIBERO_ASSETS"] = str(KIT)
    from wav.sim.libero.env import LiberoEnv

    environment = LiberoEnv(SPATIAL)
    yield environment
    environment.close()
