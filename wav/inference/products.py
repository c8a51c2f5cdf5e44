"""What inference computes with, faster than training's modules and equal to them up to float32 rounding.

Linears that read the same input are one product. On a CPU in float32 the kernels of :mod:`wav.inference.native` run
products with the norms, modulation, rotation, GELU, gate and residual around them in one pass over memory; without a
compiler, oneDNN runs products with bias, GELU and residual. Attention takes powers of two without looking for the
largest logit first, which is exact where the normalised queries and keys bound every logit. Elsewhere (CUDA, bfloat16)
the library's kernels run.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.inference import native
from wav.inference.native import LOG2E
from wav.model.layers import Attention, FeedForward
from wav.model.rope import Rope

LARGEST = 80.0  #: of a logit, as a power of two, for attention without the maximum: sums stay far inside float32
LANES = 64  #: exp2 gives other last bits past the last whole vector, so it is always given whole ones
SCORES = 1 << 18  #: logits computed at a time, 1 MiB, so that they stay in a core's cache


def plain_cpu(x: Tensor) -> bool:
    """Whether ``x`` is computed on by the CPU kernels of this module."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def turns(table: Rope) -> Tensor:
    """The model's table as unit complex numbers (L, dim / 2): cosine and sine lie side by side, as the kernels read."""
    cos, sin = table
    return torch.complex(cos[:, 1::2].contiguous(), sin[:, 1::2].contiguous())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension of ``x`` (..., L, dim) by ``table``, in float32.

    ``table``: :func:`turns`, or its ``torch.view_as_real`` (L, dim / 2, 2).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if table.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
    (first, second), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
    rotated = torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1)
    return rotated.flatten(-2).to(x.dtype)


def has_onednn() -> bool:
    """Whether torch can run linears on oneDNN with what follows them in the same pass."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


class Product:
    """One or several linears of the same input as one matrix product (..., in) -> (..., sum of outs).

    Holds its own copy of the weights, in the order that oneDNN wants where it is used.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        first = linears[0]
        weight = first.weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
        self.outs = weight.shape[0]
        self.bias: Tensor | None = None
        if first.bias is not None:
            self.bias = torch.cat([linear.bias for linear in linears]).detach()
        self.native = plain_cpu(weight) and native.available()
        self.onednn = plain_cpu(weight) and not self.native and has_onednn()
        self.weight: Tensor = weight.detach()
        if self.native:
            self.weight, self.bias = native.pack(weight, self.bias)
        elif self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    @property
    def packed(self) -> tuple[Tensor, Tensor, int]:
        """Weight, bias and width as the native kernels take them."""
        return self.weight, cast(Tensor, self.bias), self.outs

    def unpack(self) -> None:
        """Hold the weights in torch's own order, which is the only one that ``torch.compile`` takes."""
        if self.onednn:
            self.weight, self.onednn = self.weight.to_dense(), False

    def __call__(self, x: Tensor) -> Tensor:
        """X W^T + b."""
        if self.native:
            return native.linear(x, *self.packed)
        if self.onednn:
            return self._pointwise(x, "none", "")
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU-tanh of the product; the native kernels have it inside :class:`FeedProduct`."""
        if self.onednn:
            return self._pointwise(x, "gelu", "tanh")
        return F.gelu(F.linear(x, self.weight, self.bias), approximate="tanh")

    def add(self, x: Tensor, residual: Tensor, gate: Tensor | None = None) -> Tensor:
        """``residual`` (..., outs) plus the product, times ``gate`` where given."""
        if self.native:
            return native.linear(x.view(*residual.shape[:-1], -1), *self.packed, residual=residual, gate=gate)
        if gate is not None:
            return torch.addcmul(residual, self(x).view(residual.shape), gate)
        if self.onednn:
            flat = residual.reshape(-1, self.outs)
            both = torch.ops.mkldnn._linear_pointwise.binary
            total: Tensor = both(x.reshape(-1, x.shape[-1]), flat, self.weight, self.bias, "add")
            return total.view(residual.shape)
        return residual + F.linear(x, self.weight, self.bias)

    def _pointwise(self, x: Tensor, name: str, algorithm: str) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.mkldnn._linear_pointwise(flat, self.weight, self.bias, name, [], algorithm)
        return y.view(*x.shape[:-1], self.outs)  # type: ignore[no-any-return]


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dimension of ``x`` (..., dim), which need not be contiguous."""
    if not plain_cpu(x):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    y = x * _inverse_rms(x, eps)
    return y if weight is None else y.mul_(weight)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMS(x) * scale + shift."""
    return torch.addcmul(shift, normed(x, None, eps), scale)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def bounded(attention: Attention) -> bool:
    """Whether norms of q and k keep every logit small enough for attention without the maximum.

    RMS-normed vectors of width D have length sqrt(D), so no logit exceeds D max|w_q| max|w_k| / sqrt(head_dim).
    """
    dim = attention.norm_q.weight.numel()
    widest = attention.norm_q.weight.detach().abs().amax() * attention.norm_k.weight.detach().abs().amax()
    return bool(dim * widest / math.sqrt(dim // attention.heads) * LOG2E < LARGEST)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, small: bool, bias: Tensor | None = None) -> Tensor:
    """Attention of ``query`` (rows, Lq, D) on ``key`` and ``value`` (rows, Lk, D), heads still side by side.

    ``small``: logits are :func:`bounded`. ``bias`` (rows, 1, 1, Lk) is added to the logits: they have no bound, and the
    library's kernel runs, as in compiled code.
    """
    if torch.compiler.is_compiling():
        return _library_attention(query, key, value, heads, bias)
    plain = small and bias is None and plain_cpu(query)
    if plain and native.available():
        return native.attend(query, key, value, heads)
    if not plain:
        return _library_attention(query, key, value, heads, bias)
    rows, length, dim = query.shape
    size, others = dim // heads, key.shape[1]
    read = query.new_empty(heads, rows, length, size)
    total = query.new_empty(heads, rows, length, 1)
    step = max(1, SCORES // (length * others))
    lanes = LANES * torch.get_num_threads()
    buffer = query.new_zeros(-(-min(step, rows) * length * others // lanes) * lanes)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for start in range(0, rows, step):
            row = slice(start, min(start + step, rows))
            count = (row.stop - start) * length * others
            logits = buffer[:count].view(-1, length, others)
            keys = key[row, :, part].transpose(1, 2)
            torch.baddbmm(logits, query[row, :, part], keys, beta=0, alpha=LOG2E / math.sqrt(size), out=logits)
            buffer[: -(-count // lanes) * lanes].exp2_()
            torch.sum(logits, -1, keepdim=True, out=total[head, row])
            torch.bmm(logits, value[row, :, part], out=read[head, row])
    return (read / total).permute(1, 2, 0, 3).flatten(2)


def _library_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class SelfProduct:
    """Self-attention: q, k and v in one product."""

    def __init__(self, attention: Attention) -> None:
        self.heads, self.small = attention.heads, bounded(attention)
        self.qkv = Product(attention.to_q, attention.to_k, attention.to_v)
        self.norms = torch.stack([attention.norm_q.weight, attention.norm_k.weight]).detach()
        self.eps = cast(float, attention.norm_q.eps)
        self.out = Product(cast(nn.Linear, attention.to_out[0]))

    def project(self, h: Tensor, shift: Tensor, scale: Tensor, eps: float, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys (rows, L, 2, D) and values (rows, L, D) of RMS(h) * scale + shift.

        ``h`` (..., D) holds ``rows`` times the L positions of ``rope``.
        """
        if self.qkv.native:
            qkv = native.linear(
                h, *self.qkv.packed, shift, scale, eps, norms=self.norms, norm_eps=self.eps, rope=rope
            ).view(-1, len(rope), 3, h.shape[-1])
            return qkv[:, :, :2], qkv[:, :, 2]
        qkv = self.qkv(modulated(h, shift, scale, eps).view(-1, len(rope), h.shape[-1])).unflatten(-1, (3, -1))
        pair = qkv[:, :, :2]
        if plain_cpu(h):
            pair.mul_(_inverse_rms(pair, self.eps)).mul_(self.norms)
        else:
            pair = torch.stack([normed(pair[:, :, i], self.norms[i], self.eps) for i in range(2)], 2)
        return rotate(pair.transpose(1, 2), rope).transpose(1, 2), qkv[:, :, 2]

    def read(self, pair: Tensor, value: Tensor) -> Tensor:
        """What the tokens read (rows, L, D), before the output projection."""
        return attend(pair[:, :, 0], pair[:, :, 1], value, self.heads, self.small)


class CrossProduct:
    """Cross-attention: k and v in one product, computed once and read any number of times."""

    def __init__(self, attention: Attention) -> None:
        self.heads, self.small = attention.heads, bounded(attention)
        self.query, self.norm_q = Product(attention.to_q), attention.norm_q.weight.detach()
        self.kv, self.norm_k = Product(attention.to_k, attention.to_v), attention.norm_k.weight.detach()
        self.eps = cast(float, attention.norm_q.eps)
        self.out = Product(cast(nn.Linear, attention.to_out[0]))

    def keys_values(self, context: Tensor) -> Tensor:
        """Keys and values (rows, L, 2, D) of ``context`` (rows, L, C)."""
        if self.kv.native:
            both = native.linear(context, *self.kv.packed, norms=self.norm_k[None], norm_eps=self.eps)
            return both.view(*both.shape[:-1], 2, -1)
        kv: Tensor = self.kv(context).unflatten(-1, (2, -1))
        kv[:, :, 0] = normed(kv[:, :, 0], self.norm_k, self.eps)
        return kv

    def read(self, h: Tensor, kv: Tensor, bias: Tensor | None = None) -> Tensor:
        """What ``h`` (rows * n, L, D) reads of ``kv`` (rows, Lk, 2, D), before the output projection."""
        if self.query.native:
            query = native.linear(h, *self.query.packed, norms=self.norm_q[None], norm_eps=self.eps)
        else:
            query = normed(self.query(h), self.norm_q, self.eps)
        query = query.view(kv.shape[0], -1, h.shape[-1])
        return attend(query, kv[:, :, 0], kv[:, :, 1], self.heads, self.small, bias).view(h.shape)

    def add(self, h: Tensor, kv: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """``residual`` plus the attention's output for ``h``."""
        return self.out.add(self.read(h, kv, bias), residual)


class FeedProduct:
    """Feed-forward under AdaLN."""

    def __init__(self, feed: FeedForward, eps: float) -> None:
        net = feed.net
        self.wide, self.narrow = Product(cast(nn.Linear, net[0].proj)), Product(cast(nn.Linear, net[2]))
        self.eps = eps

    def add(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """``h`` plus gate times the feed-forward of RMS(h) * scale + shift."""
        if self.wide.native:
            weight, bias, _ = self.narrow.packed
            return native.feed(h, shift, scale, self.eps, *self.wide.packed, weight, bias, gate)
        return torch.addcmul(h, self.narrow(self.wide.gelu(modulated(h, shift, scale, self.eps))), gate)
