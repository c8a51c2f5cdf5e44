"""What the backends ``compiled`` and ``cpu`` share: a transformer laid out for many passes at one noise level each.

Linears that read the same input are one product, AdaLN rows are computed once per noise level (all rows of a pass are
at one level, so a video pass has two rows per view, memory and future, and an expert one), and of candidates that only
scoring reads nothing is kept but the value expert's keys and values, projected as the video pass goes. Blocks see their
arithmetic through :class:`wav.inference.operations.Operations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.inference.operations import Operations
from wav.inference.torch import Context, Features, TorchPlannerModel
from wav.model import experts
from wav.model.experts import ExpertBlock
from wav.model.layers import Attention, modulated_head
from wav.model.rope import video_rope
from wav.model.video import VideoBlock, VideoExpert, pack, unpack
from wav.planning.types import NoiseShapes

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

LARGEST = 80.0  #: of a logit, as a power of two, for attention without the maximum: sums stay far inside float32
Modulation = tuple[Tensor, ...]
"""(shift, 1 + scale, gate) of attention, then of the feed-forward; each broadcasts against hidden states."""


class CrossAttention:
    """Cross-attention: keys and values in one product, computed once and read any number of times."""

    def __init__(self, attention: Attention, operations: Operations) -> None:
        self.operations, self.heads, self.bounded = operations, attention.heads, _bounded(attention)
        self.query = operations.product(attention.to_q)
        self.kv = operations.product(attention.to_k, attention.to_v)
        self.out = operations.product(cast(nn.Linear, attention.to_out[0]))
        self.norms = [
            (norm.weight.detach()[None], cast(float, norm.eps)) for norm in (attention.norm_q, attention.norm_k)
        ]

    def keys_values(self, context: Tensor) -> Tensor:
        """Keys and values (rows, L, 2, D) of ``context`` (rows, L, C)."""
        both: Tensor = self.operations.linear(context, self.kv, norms=self.norms[1]).unflatten(-1, (2, -1))
        return both

    def add(self, h: Tensor, kv: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
        """``residual`` plus what ``h`` (rows * n, L, D) reads of ``kv`` (rows, Lk, 2, D)."""
        query = self.operations.linear(h, self.query, norms=self.norms[0]).view(len(kv), -1, h.shape[-1])
        read = self.operations.attend(query, kv[:, :, 0], kv[:, :, 1], self.heads, self.bounded, mask)
        return self.operations.linear(read.view(h.shape), self.out, residual=residual)


class Block:
    """A video or an expert block: self-attention and feed-forward under AdaLN, cross-attentions between."""

    cross_attention: type[CrossAttention] = CrossAttention

    def __init__(self, block: VideoBlock | ExpertBlock, operations: Operations) -> None:
        self.operations, self.eps, self.table = operations, block.eps, block.scale_shift_table.detach()
        own, net = block.attn1, block.ff.net
        self.heads, self.bounded = own.heads, _bounded(own)
        self.qkv = operations.product(own.to_q, own.to_k, own.to_v)
        self.norms = torch.stack([own.norm_q.weight, own.norm_k.weight]).detach(), cast(float, own.norm_q.eps)
        self.out = operations.product(cast(nn.Linear, own.to_out[0]))
        third = getattr(block, "attn3", None)
        self.cross = [self.cross_attention(part, operations) for part in (block.attn2, third) if part is not None]
        self.wide = operations.product(cast(nn.Linear, net[0].proj))
        self.narrow = operations.product(cast(nn.Linear, net[2]))

    def __call__(
        self, h: Tensor, rows: Modulation, rope: Any, groups: int, reads: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states (n, ..., D) to the same.

        ``groups``: tokens attend within so many equal groups. ``reads``: keys and values for each cross-attention,
        all of the same hidden states, of R rows that n / R consecutive rows share; ``mask`` of their tokens (R, Lk).
        """
        operations, (shift, scale, gate, *net), dim = self.operations, rows, h.shape[-1]
        parts = operations.parts(h, self.qkv, self.norms, (shift, scale, self.eps), rope)
        query, key, value = (part.view(groups, -1, dim) for part in parts)
        read = operations.attend(query, key, value, self.heads, self.bounded)
        h = operations.linear(read.view(h.shape), self.out, residual=h, gate=gate)
        flat = h.view(len(h), -1, dim)
        after = flat
        for cross, kv in zip(self.cross, reads, strict=False):  # without value features attn3 is skipped
            after = cross.add(flat, kv, after, mask)
        return operations.feed_forward(after.view(h.shape), (net[0], net[1], self.eps), self.wide, self.narrow, net[2])


class Expert:
    """One expert: tokens in, velocities and features out."""

    def __init__(self, parts: experts.Expert, block: type[Block], operations: Operations) -> None:
        self.parts, self.operations = parts, operations
        self.blocks = [block(cast(ExpertBlock, part), operations) for part in parts.blocks]
        self.proj_in, self.proj_out = operations.product(parts.proj_in), operations.product(parts.proj_out)
        self.levels: dict[tuple[float, int], tuple[list[Modulation], Tensor, Tensor]] = {}
        self.ropes: dict[int, Any] = {}

    def at(self, timestep: float, history: int) -> tuple[list[Modulation], Tensor, Tensor]:
        """AdaLN rows of every block and the head's shift and 1 + scale at a timestep, computed once and kept.

        ``history``: 0, or the number of tokens after a clean token in front.
        """
        if (timestep, history) not in self.levels:
            temb, e = self.parts.time_embed(torch.tensor([0.0, timestep], device=self.parts.scale_shift_table.device))
            rows = temb.unflatten(-1, (6, -1))[[0] + [1] * history if history else [1]]
            shift, scale = self.parts.scale_shift_table + e[1]
            self.levels[timestep, history] = ([_modulation(b.table, rows) for b in self.blocks], shift, 1 + scale)
        return self.levels[timestep, history]

    def __call__(
        self,
        tokens: Tensor,
        timestep: float,
        reads: Sequence[Sequence[Tensor]],
        history: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Velocities like ``tokens`` (n, A, C), and per-block features (n, A, d) where ``keep``.

        ``reads``: per block the keys and values of its cross-attentions.
        """
        chunk, linear = tokens.shape[1], self.operations.linear
        h = linear(tokens, self.proj_in)
        if history is not None:
            h = torch.cat([linear(history, self.proj_in), h], dim=1)
        length = h.shape[1]
        if length not in self.ropes:
            self.ropes[length] = self.operations.rope(self.parts.rope(h))
        modulations, shift, scale = self.at(timestep, chunk if history is not None else 0)
        features = []
        for block, rows, read in zip(self.blocks, modulations, reads, strict=True):
            h = block(h, rows, self.ropes[length], len(h), read)
            if keep:
                features.append(h[:, -chunk:])
        h = torch.addcmul(shift, F.layer_norm(h[:, -chunk:], h.shape[-1:], eps=1e-6), scale)
        return linear(h, self.proj_out), tuple(features)


class Video:
    """The video DiT."""

    def __init__(self, parts: VideoExpert, block: type[Block], operations: Operations) -> None:
        self.parts, self.operations = parts, operations
        blocks = cast("list[VideoBlock]", list(parts.transformer_blocks))
        self.joint = [part.joint for part in blocks]
        self.blocks = [block(part, operations) for part in blocks]
        self.proj_in, self.proj_out = operations.product(self.parts.proj_in), operations.product(self.parts.proj_out)
        self.levels: dict[tuple[float, int, int, int], tuple[list[Modulation], Tensor]] = {}
        self.ropes: dict[tuple[int, int, int], Any] = {}

    def at(self, timestep: float, views: int, memory: int, future: int) -> tuple[list[Modulation], Tensor]:
        """AdaLN rows of every block (V, F, 1, D) and e (1, V, F, 1, D), computed once per noise level and kept."""
        key = (timestep, views, memory, future)
        if key not in self.levels:
            times = torch.tensor([[0.0, timestep]], device=self.parts.scale_shift_table.device)
            temb, e = self.parts.embed_time(times, views)  # (1, V, 2, ...)
            index = [0] * memory + [1] * future
            rows = temb[0][:, index].unsqueeze(2)
            self.levels[key] = ([_modulation(b.table, rows) for b in self.blocks], e[:, :, index].unsqueeze(3))
        return self.levels[key]

    def __call__(
        self, context: FusedContext, future: Tensor, timestep: float, read: Callable[[int, Tensor], None] | None
    ) -> Tensor | None:
        """One pass of ``future`` (B * M, V, C, Ff, h, w): its velocity, or None where ``read`` takes the features.

        ``read(i, features)`` gets block i's (B * M, V * F * h * w, D).
        """
        memory = context.memory.repeat_interleave(len(future) // len(context.memory), 0)
        latents = torch.cat([memory, future], 3)
        n, views, _, frames, height, width = latents.shape
        h = self.operations.linear(pack(latents), self.proj_in)
        grid = (frames, height, width)
        if grid not in self.ropes:
            table = video_rope(h.shape[-1], *grid, self.parts.rope_scale, h.device)
            self.ropes[grid] = self.operations.rope(table)
        modulations, e = self.at(timestep, views, memory.shape[3], future.shape[3])
        for index, (block, rows, text) in enumerate(zip(self.blocks, modulations, context.text, strict=True)):
            groups = n if self.joint[index] else n * views
            h = block(h, rows, self.ropes[grid], groups, (text,), context.mask)
            if read is not None:
                read(index, h.flatten(1, 3))
        if read is not None:
            return None
        later, first = h[:, :, memory.shape[3] :], e[:, :, memory.shape[3] :]
        head = modulated_head(later, self.parts.scale_shift_table, first)
        return unpack(self.operations.linear(head, self.proj_out), height, width)


@dataclass(frozen=True)
class FusedContext(Context):
    """Conditioning of B observations; ``text``: per block keys and values (B, L, 2, D)."""

    mask: Tensor | None  #: (B, L), 1 for tokens that count; None where all do

    def rows(self, part: slice) -> FusedContext:
        """Conditioning of some of the observations, in the same memory."""
        history, mask = (None if x is None else x[part] for x in (self.history, self.mask))
        return FusedContext(self.memory[part], tuple(x[part] for x in self.text), history, mask)


class FusedPlannerModel(TorchPlannerModel):
    """A WAVTransformer behind :class:`wav.planning.types.PlannerModel`, on a copy of its weights.

    Make another one after the weights have changed.
    """

    def __init__(
        self,
        model: WAVTransformer,
        shapes: NoiseShapes,
        operations: Operations | None = None,
        block: type[Block] = Block,
    ) -> None:
        super().__init__(model, shapes)
        operations = operations or Operations()
        with torch.inference_mode(False), torch.no_grad():
            self.video = Video(model.video, block, operations)
            found = {"value": model.value, "action": model.action}
            self.experts = {
                name: Expert(parts, block, operations) for name, parts in found.items() if parts is not None
            }

    @torch.no_grad()
    def begin(self, memory: Tensor, text: Tensor, text_mask: Tensor | None, history: Tensor | None) -> FusedContext:
        """As :meth:`TorchPlannerModel.begin`."""
        mask = None if text_mask is None or bool(text_mask.all()) else self._in(text_mask)
        # one by one: no row decides another's bits
        states = torch.cat([self.model.video.encode_text(self._in(row)).states for row in text.split(1)])
        history = None if history is None else self._in(history)
        return FusedContext(self._in(memory), self.text_keys(states), history, mask)

    def text_keys(self, states: Tensor) -> tuple[Tensor, ...]:
        """What each video block reads of projected instructions (B, L, D)."""
        return tuple(block.cross[0].keys_values(states) for block in self.video.blocks)

    def _velocity(self, context: FusedContext, future: Tensor, timestep: float) -> Tensor:
        return cast(Tensor, self.video(context, future, timestep, None))

    def _features(self, context: FusedContext, future: Tensor, timestep: float, keep: bool) -> Features:
        keys: list[tuple[Tensor]] = []
        layers: list[Tensor] = []
        value = self.experts.get("value")

        def read(index: int, features: Tensor) -> None:
            if value is not None:
                keys.append((value.blocks[index].cross[0].keys_values(features),))
            if keep:
                layers.append(features)

        self.video(context, future, timestep, read)
        return Features(tuple(keys), tuple(layers) if keep else None)

    def _value(
        self, keys: Sequence[Any], tokens: Tensor, timestep: float, keep: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        velocity, features = self.experts["value"](tokens.flatten(0, -3), timestep, keys, keep=keep)
        return velocity.view(tokens.shape), features

    def _action_cache(self, layers: Sequence[Tensor], value: Sequence[Tensor] | None) -> Any:
        reads = [layers] if value is None else [layers, value]
        return [
            [cross.keys_values(read) for cross, read in zip(block.cross, parts, strict=False)]
            for block, *parts in zip(self.experts["action"].blocks, *reads, strict=True)
        ]

    def _action(self, cache: Any, tokens: Tensor, timestep: float, context: FusedContext) -> Tensor:
        return self.experts["action"](tokens, timestep, cache, context.history)[0]


def _modulation(table: Tensor, temb: Tensor) -> Modulation:
    """Six AdaLN vectors (..., D) of table (6, D) and temb (..., 6, D), the scales with their 1."""
    rows = table + temb
    rows[..., 1, :] += 1
    rows[..., 4, :] += 1
    return tuple(row.contiguous() for row in rows.unbind(-2))


def _bounded(attention: Attention) -> bool:
    """Whether norms of q and k keep every logit small enough for attention without the maximum.

    RMS-normed vectors of width D have length sqrt(D), so no logit exceeds D max|w_q| max|w_k| / sqrt(head_dim).
    """
    dim = attention.norm_q.weight.numel()
    widest = attention.norm_q.weight.detach().abs().amax() * attention.norm_k.weight.detach().abs().amax()
    return bool(dim * widest / math.sqrt(dim // attention.heads) / math.log(2) < LARGEST)
