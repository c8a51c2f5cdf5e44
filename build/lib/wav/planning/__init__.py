"""Latent planning: the paper's Algorithm 1."""

from typing import Literal, get_args

#: How an action chunk is made: by the whole search, without it, or with its temperature alone (the control).
Variant = Literal["planned", "unplanned", "temperature"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
