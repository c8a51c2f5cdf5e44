"""The value stage's frozen video expert, computed as inference computes it: fused, no gradients, no head.

Every sample of that stage is at t = 1000, so a view has two AdaLN rows, made once. Features equal those of
:meth:`wav.model.WAVTransformer.video` up to float32 rounding.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wav.inference.fused import Prepared

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

NOISE_LEVEL = 1000.0  #: timestep of pure noise
LAYER_WEIGHTS = 14
"""Weights of a block, in squares of its width: on the compiled kernels a pass takes as many rows as have that many
numbers, which stay in a core's cache from one product to the next; with fewer the weights would be read too often."""


class FrozenVideo:
    """Features of one model's video expert; weights are copied at the first call and again after they have changed."""

    def __init__(self, model: WAVTransformer) -> None:
        self._model = [model]  # in a list: the model must not become a submodule of whoever holds this
        self._prepared: Prepared | None = None
        self._version: tuple[tuple[int, int], ...] = ()

    @property
    def usable(self) -> bool:
        """Whether the weights are whole on this process: ZeRO-3 gathers them only where a module runs."""
        return not any(hasattr(parameter, "ds_tensor") for parameter in self._model[0].parameters())

    @torch.no_grad()
    def features(self, memory: Tensor, noise: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        """Output (B, V * F * h * w, D) of every block.

        Args:
            memory: latents (B, V, C, Fm, h, w) of the memory frames, at t = 0.
            noise: (B, V, C, Ff, h, w), pure noise at t = 1000.
            text: (B, L, Ct).
            text_mask: (B, L).
        """
        model, prepared = self._model[0], self._current()
        context = model.encode_text(text, text_mask)
        keys, (clean, *own) = prepared.text(context.states), prepared.memory(memory)
        size, tokens, width = len(noise), clean.shape[1:4].numel() + noise[0].numel() // noise.shape[2], clean.shape[-1]
        layers = [clean.new_empty(size, tokens, width) for _ in prepared.layers]
        rows = max(1, LAYER_WEIGHTS * width // tokens) if prepared.proj_in.native else size

        def read(part: slice, index: int, features: Tensor) -> None:
            layers[index][part] = features

        for part in (slice(start, start + rows) for start in range(0, size, rows)):
            prepared.video(
                (clean[part], own[0][part], own[1][part]),
                noise[part],
                NOISE_LEVEL,
                [layer[part] for layer in keys],
                None if context.bias is None else context.bias[part],
                partial(read, part),
                head=False,
            )
        return tuple(layers)

    def _current(self) -> Prepared:
        """The video part's weights as they are now."""
        frozen = (p for n, p in self._model[0].named_parameters() if not n.startswith(("value_", "action_")))
        version = tuple((p.data_ptr(), p._version) for p in frozen)
        if self._prepared is None or version != self._version:
            self._prepared, self._version = Prepared(self._model[0]), version
        return self._prepared
