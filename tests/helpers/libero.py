"""Where LIBERO's assets are, and marks for tests that need them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

KIT = Path(os.environ.get("WAV_LIBERO_ASSETS") or Path(__file__).parents[3] / "shared" / "libero-assets")
INSTALLED = importlib.util.find_spec("libero") is not None
needs_libero = pytest.mark.skipif(not INSTALLED, reason="hf-libero is not installed: make libero")
needs_assets = pytest.mark.skipif(
    not (INSTALLED and KIT.is_dir()), reason=f"{KIT}: no LIBERO assets here; set WAV_LIBERO_ASSETS (and make libero)"
)
