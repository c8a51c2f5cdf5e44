"""One seeded generator per purpose, derived from (seed, purpose, index...).

Every random number in the library comes from a generator made here, so that a result is a pure function of
what its caller names and never of how many workers ran or in which order.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *index: int | str) -> int:
    """63-bit seed that is a pure function of ``(seed, purpose, *index)`` (SHA-256, stable across machines).

    >>> derive_seed(7, "episode", 12) == derive_seed(7, "episode", 12) != derive_seed(7, "episode", 13)
    True
    """
    text = "\x1f".join([str(seed), purpose, *(str(i) for i in index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_generator(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """NumPy generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, purpose, *index))


def torch_generator(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """CPU torch generator for one purpose; draws are made on the CPU so that they are equal on every device."""
    import torch  # simulator processes use the NumPy generators alone and must not pay for torch

    return torch.Generator(device="cpu").manual_seed(derive_seed(seed, purpose, *index))
