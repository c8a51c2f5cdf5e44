"""Processors: states and actions by quantiles, as wav normalises them; images are left to the policy.

An export holds the processors with wav's own statistics, and LeRobot loads those. This makes new ones, from a dataset's
statistics, as LeRobot asks of every policy.
"""

from __future__ import annotations

from typing import Any

from lerobot.processor import make_default_pre_post_processors

from .configuration_wav import WavConfig


def make_wav_pre_post_processors(config: WavConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Rename, batch, device, normalise; and unnormalise, to the CPU."""
    return make_default_pre_post_processors(config, dataset_stats)
