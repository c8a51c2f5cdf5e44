"""A WAVTransformer prepared for inference: fused products, AdaLN rows once per noise level, keys and values once.

All rows of a pass are at one noise level, so a video pass has two AdaLN rows per view (memory and future) and an
expert one; rows of any number share them. Nothing here is part of the model's state: :meth:`Prepared.current` tells
when its weights have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wav.inference.products import CrossProduct, FeedProduct, Product, SelfProduct, turns
from wav.model.experts import ExpertBlock
from wav.model.layers import modulated_head
from wav.model.rope import token_rope, video_rope
from wav.model.video import VideoBlock, pack, unpack

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

LEVELS = 64  #: noise levels whose AdaLN rows are kept
Modulation = tuple[Tensor, ...]
"""(shift, 1 + scale, gate) of attention, then of the feed-forward; each broadcasts against hidden states."""


def _modulation(table: Tensor, temb: Tensor) -> Modulation:
    """Six AdaLN vectors (..., D) of table (6, D) and temb (..., 6, D), the scales with their 1."""
    rows = table.detach() + temb
    rows[..., 1, :] += 1
    rows[..., 4, :] += 1
    return tuple(row.contiguous() for row in rows.unbind(-2))


class Layer:
    """What video and expert blocks share: self-attention and feed-forward under AdaLN, cross-attention between."""

    def __init__(self, block: VideoBlock | ExpertBlock) -> None:
        self.eps, self.table = block.eps, block.scale_shift_table
        self.own, self.cross = SelfProduct(block.attn1), CrossProduct(block.attn2)
        self.net = FeedProduct(block.ff, block.eps)

    def feed(self, h: Tensor, rows: Modulation) -> Tensor:
        """``h`` plus the gated feed-forward."""
        return self.net.add(h, *rows[3:])


class VideoLayer(Layer):
    """One block of the video DiT."""

    def __init__(self, block: VideoBlock) -> None:
        super().__init__(block)
        self.joint = block.joint

    def projected(self, h: Tensor, rows: Modulation, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention's rotated q and k (N, V, F * S, 2, D) and values of ``h`` (N, V, F, S, D)."""
        n, v = h.shape[:2]
        pair, value = self.own.project(h, rows[0], rows[1], self.eps, rope)
        return pair.unflatten(0, (n, v)), value.unflatten(0, (n, v))

    def finish(
        self, h: Tensor, own: tuple[Tensor, Tensor], rows: Modulation, text: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The rest of the block, given its self-attention's projections."""
        n, v, f, s, d = h.shape
        pair, value = ((x.flatten(1, 2) if self.joint else x.flatten(0, 1)) for x in own)
        h = self.own.out.add(self.own.read(pair, value), h, rows[2])
        flat = h.view(n, v * f * s, d)
        return self.feed(self.cross.add(flat, text, flat, bias).view(h.shape), rows)


class ExpertLayer(Layer):
    """One block of an expert; ``third`` reads the value expert's features."""

    def __init__(self, block: ExpertBlock) -> None:
        super().__init__(block)
        self.third = None if block.attn3 is None else CrossProduct(block.attn3)

    def __call__(
        self,
        h: Tensor,
        rows: Modulation,
        rope: Tensor,
        video: Tensor,
        value: Tensor | None,
    ) -> Tensor:
        """(rows * n, T, d) to the same; ``video`` and ``value`` keys and values of ``rows`` rows."""
        read = self.own.read(*self.own.project(h, rows[0], rows[1], self.eps, rope))
        h = self.own.out.add(read, h, rows[2])
        after = self.cross.add(h, video, h)
        if value is not None and self.third is not None:
            after = self.third.add(h, value, after)
        return self.feed(after, rows)


class Expert:
    """One expert: tokens in, velocities and features out."""

    layer_kind: ClassVar[type[ExpertLayer]] = ExpertLayer
    most_levels: ClassVar[float] = LEVELS

    def __init__(self, model: WAVTransformer, name: str) -> None:
        self.parts = model.expert(name)
        self.layers = [self.layer_kind(cast(ExpertBlock, block)) for block in self.parts.blocks]
        self.proj_in, self.proj_out = Product(self.parts.proj_in), Product(self.parts.proj_out)
        self.levels: dict[tuple[float, int], tuple[list[Modulation], Tensor, Tensor]] = {}

    def rope(self, dim: int, length: int, device: torch.device) -> Tensor:
        """Rotations of ``length`` tokens, as the layers take them."""
        return turns(token_rope(dim, length, self.parts.rope_base, device))

    def at(self, timestep: float, history: int) -> tuple[list[Modulation], Tensor, Tensor]:
        """AdaLN rows of every layer and the head's shift and 1 + scale at a timestep, computed once.

        ``history``: 0, or the number of tokens after a clean token in front.
        """
        found = self.levels.get((timestep, history))  # other threads may clear and fill
        if found is None:
            if len(self.levels) >= self.most_levels:
                self.levels.clear()
            times = torch.tensor([0.0, timestep], device=self.parts.scale_shift_table.device)
            temb, e = self.parts.time_embed(times)
            index = [0] + [1] * history if history else [1]
            rows = temb.unflatten(-1, (6, -1))[index]
            head = self.parts.scale_shift_table + e[1]
            modulations = [_modulation(layer.table, rows) for layer in self.layers]
            found = self.levels[timestep, history] = (modulations, head[0].clone(), 1 + head[1])
        return found

    def __call__(
        self,
        tokens: Tensor,
        timestep: float,
        video: Sequence[Tensor],
        value: Sequence[Tensor] | None = None,
        history: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Velocities like ``tokens`` (n, A, C), and per-layer features (n, A, d) where ``keep``.

        ``video``, ``value``: per layer keys and values of rows that n / rows consecutive rows of tokens share.
        """
        chunk = tokens.shape[1]
        h = self.proj_in(tokens)
        if history is not None:
            h = torch.cat([self.proj_in(history), h], dim=1)
        modulations, shift, scale = self.at(timestep, chunk if history is not None else 0)
        rope = self.rope(h.shape[-1], h.shape[1], h.device)
        features = []
        for index, layer in enumerate(self.layers):
            condition = None if value is None else value[index]
            h = layer(h, modulations[index], rope, video[index], condition)
            if keep:
                features.append(h[:, -chunk:])
        h = torch.addcmul(shift, F.layer_norm(h[:, -chunk:], h.shape[-1:], eps=1e-6), scale)
        return self.proj_out(h), tuple(features)


class Prepared:
    """The whole transformer for inference. Weights are copied: twice the memory, on a CPU and for q, k and v."""

    video_kind: ClassVar[type[VideoLayer]] = VideoLayer
    expert_kind: ClassVar[type[Expert]] = Expert
    most_levels: ClassVar[float] = LEVELS

    def __init__(self, model: WAVTransformer) -> None:
        self.model, self.version = model, _version(model)
        blocks = cast("list[VideoBlock]", list(model.video.transformer_blocks))
        self.layers = [self.video_kind(block) for block in blocks]
        names = (name for name in ("value", "action") if model.config[f"{name}_expert"])
        self.experts = {name: self.expert_kind(model, name) for name in names}
        self.proj_in = Product(model.video.proj_in)
        self.levels: dict[tuple[float, int, int, int], tuple[list[Modulation], Tensor]] = {}

    @property
    def current(self) -> bool:
        """Whether the model's weights are still those that were copied."""
        return self.version == _version(self.model)

    def text(self, states: Tensor) -> list[Tensor]:
        """Every layer's keys and values (B, L, 2, D) of projected instructions (B, L, D)."""
        return [layer.cross.keys_values(states) for layer in self.layers]

    def at(self, timestep: float, views: int, memory: int, future: int) -> tuple[list[Modulation], Tensor]:
        """AdaLN rows of every layer (V, F, 1, D) and e (1, V, F, D), computed once per noise level."""
        key = (timestep, views, memory, future)
        found = self.levels.get(key)  # other threads may clear and fill
        if found is None:
            if len(self.levels) >= self.most_levels:
                self.levels.clear()
            times = torch.tensor([[0.0, timestep]], device=self.model.video.scale_shift_table.device)
            temb, e = self.model.video.embed_time(times, views)  # (1, V, 2, ...)
            index = [0] * memory + [1] * future
            rows = temb[0][:, index].unsqueeze(2)
            found = self.levels[key] = ([_modulation(layer.table, rows) for layer in self.layers], e[:, :, index])
        return found

    def memory(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the memory frames (B, V, C, Fm, h, w) are for all candidates: embedding, layer 0's q, k and values."""
        _, views, _, frames, height, width = latents.shape
        h = self.proj_in(pack(latents))
        rope = self.rope(h.shape[-1], frames, height, width, h.device)
        rows = self.at(0.0, views, frames, 0)[0][0]
        return h, *VideoLayer.projected(self.layers[0], h, rows, rope)  # once per observation: never compiled

    def rope(self, dim: int, frames: int, height: int, width: int, device: torch.device) -> Tensor:
        """Rotations of a latent grid, as the layers take them."""
        first, second, third = self.model.config.rope_interpolation_scale
        return turns(video_rope(dim, frames, height, width, (first, second, third), device))

    def video(
        self,
        memory: tuple[Tensor, Tensor, Tensor],
        future: Tensor,
        timestep: float,
        text: Sequence[Tensor],
        bias: Tensor | None,
        read: Callable[[int, Tensor], None],
        head: bool,
    ) -> Tensor | None:
        """One pass of ``future`` (B * M, V, C, Ff, h, w); ``read(i, features)`` takes layer i's (B * M, V F h w, D).

        Returns:
            velocity (B * M, V, C, F, h, w), or None without ``head``.
        """
        clean, clean_pair, clean_value = memory
        _, views, _, frames, height, width = future.shape
        before, size = clean.shape[2], height * width
        rope = self.rope(clean.shape[-1], before + frames, height, width, clean.device)
        modulations, e = self.at(timestep, views, before, frames)
        h = self.proj_in(pack(future))
        later = tuple(row[:, before:] for row in modulations[0])
        pair, value = self.layers[0].projected(h, later, rope[before * size :])
        h = _joined(clean, h)
        own = _joined(clean_pair, pair), _joined(clean_value, value)
        for index, layer in enumerate(self.layers):
            if index:
                own = layer.projected(h, modulations[index], rope)
            h = layer.finish(h, own, modulations[index], text[index], bias)
            read(index, h.flatten(1, 3))
        if not head:
            return None
        tokens = self.model.video.proj_out(modulated_head(h, self.model.video.scale_shift_table, e.unsqueeze(3)))
        return unpack(tokens, height, width)


def _joined(memory: Tensor, future: Tensor) -> Tensor:
    """Memory tokens (B, V, T, ...) before each of their candidates' (B * M, V, T', ...)."""
    candidates = future.shape[0] // memory.shape[0]
    out = future.new_empty(*future.shape[:2], memory.shape[2] + future.shape[2], *future.shape[3:])
    split = memory.shape[2]
    out.unflatten(0, (-1, candidates))[:, :, :, :split] = memory.unsqueeze(1)
    out[:, :, split:] = future
    return out


def _version(model: WAVTransformer) -> tuple[tuple[int, int], ...]:
    """Changes with every in-place change or replacement of a parameter."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
