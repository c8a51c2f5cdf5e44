"""The model: video DiT, value expert and action expert in one diffusers-style transformer.

Knows torch and diffusers only: no simulator, no storage, no orchestration. ``python -m pytest tests/model`` runs its
tests, ``tests/golden`` compares it with the reference implementation.
"""

from wav.model.build import build_model
from wav.model.experts import ActionCache, ExpertOutput
from wav.model.layers import KeyValue
from wav.model.transformer import WAVOutput, WAVTransformer
from wav.model.video import TextContext, VideoOutput

__all__ = [
    "ActionCache",
    "ExpertOutput",
    "KeyValue",
    "TextContext",
    "VideoOutput",
    "WAVOutput",
    "WAVTransformer",
    "build_model",
]
