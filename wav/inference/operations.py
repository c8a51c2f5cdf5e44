"""The arithmetic of fused blocks in torch: products with what surrounds them, feed-forward, attention.

:mod:`wav.inference.cpu.kernels` is its other form, in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wav.model.rope import Rope, rotate

SHORT = 64  #: keys, up to which a GPU's attention for any length is the fastest: others work in tiles of 128


@dataclass(frozen=True)
class Product:
    """One or several linears of the same input as one matrix product (..., in) -> (..., outs)."""

    weight: Tensor
    bias: Tensor | None
    outs: int


class Operations:
    """What blocks are computed with, in torch. Tensors are (..., L, D); shift, scale and gate (..., 1 or L, D)."""

    def product(self, *linears: nn.Linear) -> Product:
        """The linears' weights, side by side."""
        weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears]).detach()
        return Product(weight.detach(), bias, len(weight))

    def rope(self, table: Rope) -> Any:
        """A rotation table as :meth:`linear` takes it."""
        return table

    def linear(
        self,
        x: Tensor,
        product: Product,
        modulation: tuple[Tensor, Tensor, float] | None = None,
        norms: tuple[Tensor, float] | None = None,
        rope: Any = None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Residual + gate * ((RMS(x) * scale + shift) W + b), each part where it is given.

        ``modulation``: (shift, scale, eps). ``norms``: weights (parts, width) and eps of the RMS norms of the result's
        first parts, which ``rope`` of the L positions of x then rotates.
        """
        if norms is not None:
            return torch.cat(tuple(self.parts(x, product, norms, modulation, rope)), -1)
        y = F.linear(_modulated(x, modulation), product.weight, product.bias)
        if residual is None:
            return y
        return residual + y if gate is None else torch.addcmul(residual, y, gate)

    def parts(
        self,
        x: Tensor,
        product: Product,
        norms: tuple[Tensor, float],
        modulation: tuple[Tensor, Tensor, float] | None = None,
        rope: Any = None,
    ) -> Sequence[Tensor]:
        """As :meth:`linear` with ``norms``, in parts (..., L, width): those without a norm are not copied."""
        weights, eps = norms
        y = F.linear(_modulated(x, modulation), product.weight, product.bias)
        parts = list(y.unflatten(-1, (-1, weights.shape[-1])).unbind(-2))
        for index, weight in enumerate(weights):
            part = F.rms_norm(parts[index], weight.shape, weight, eps)
            if rope is not None:
                part = rotate(part.view(-1, len(rope[0]), len(weight)), rope).view(part.shape)
            parts[index] = part
        return parts

    def feed_forward(
        self, x: Tensor, modulation: tuple[Tensor, Tensor, float], wide: Product, narrow: Product, gate: Tensor
    ) -> Tensor:
        """X + gate * (GELU((RMS(x) * scale + shift) wide + b) narrow + b)."""
        inner = _modulated(x, modulation)
        if inner.is_cuda and inner.dtype != torch.float32:  # the product's own epilogue; Inductor would write it out
            bias = cast(Tensor, wide.bias)
            flat = torch._addmm_activation(bias, inner.flatten(0, -2), wide.weight.t(), use_gelu=True)
            inner = flat.view(*inner.shape[:-1], wide.outs)
        else:
            inner = F.gelu(F.linear(inner, wide.weight, wide.bias), approximate="tanh")
        return self.linear(inner, narrow, residual=x, gate=gate)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bounded: bool, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of query (rows, Lq, D) on key and value (rows, Lk, D), heads side by side.

        ``bounded``: the norms keep every logit below what a power of two takes. ``mask`` (rows, Lk): 1 for keys that
        count, 0 for others.
        """
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        counts = None if mask is None else mask[:, None, None].bool()
        if query.is_cuda and key.shape[1] <= SHORT:
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                read = F.scaled_dot_product_attention(q, k, v, attn_mask=counts)
        else:
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=counts)
        return read.transpose(1, 2).flatten(2)


def _modulated(x: Tensor, modulation: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """RMS(x) * scale + shift, or ``x`` where there is no modulation (shift, scale, eps)."""
    if modulation is None:
        return x
    shift, scale, eps = modulation
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=eps), scale)
