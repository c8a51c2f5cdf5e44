"""A policy of wav for LeRobot: ``--policy.path`` is a folder of ``wav export --lerobot``, or its hub id."""

from .configuration_wav import WavConfig
from .modeling_wav import WavPolicy
from .processor_wav import make_wav_pre_post_processors

__all__ = ["WavConfig", "WavPolicy", "make_wav_pre_post_processors"]
