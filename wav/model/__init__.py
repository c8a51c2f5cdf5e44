"""The model: video DiT, value expert and action expert in one diffusers-style transformer.

Knows torch and diffusers only: no simulator, no storage, no orchestration. ``python -m pytest tests/model`` runs its
tests, ``tests/golden`` compares it with the reference implementation.
"""

from wav.model.build import build_model
from wav.model.transformer import WAVTransformer

__all__ = ["WAVTransformer", "build_model"]
