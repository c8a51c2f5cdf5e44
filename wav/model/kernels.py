"""What a transformer block computes with in training: products, norms, AdaLN, GELU and attention, under autograd.

In float32 training on a CPU each is one pass of a compiled kernel with a hand-written gradient
(:mod:`wav.model.native_training`). Elsewhere (GPU, bfloat16, no gradient wanted, no compiler, ``WAV_NATIVE=0``) the
library's operations run, but for an RMS norm whose gradient autograd would take apart into a dozen passes over memory.
All agree to float32 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.model import native_training
from wav.model.rope import rotate

_ops = torch.ops.wav


def trains_here(x: Tensor) -> bool:
    """Whether ``x`` is computed on in float32 on a CPU with gradients wanted."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled()


def native(x: Tensor) -> bool:
    """Whether the compiled kernels compute on ``x``."""
    return trains_here(x) and native_training.available()


class _Linear(torch.autograd.Function):
    """A linear layer of ``x``, or of its GELU, plus a residual. Inner activations are computed again backwards."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool
    ) -> Tensor:
        ctx.save_for_backward(x if gelu or weight.requires_grad else None, weight)
        ctx.gelu = gelu
        return _ops.product(x, weight, bias, residual, turned=True, gelu=gelu)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
        grad_x = _ops.product(grad, weight, slope=x if ctx.gelu else None) if wants_x else None
        residual = grad if wants_residual else None
        if not wants_weight:
            return grad_x, None, grad.flatten(0, -2).sum(0) if wants_bias else None, residual, None
        grad_weight, grad_bias = _ops.product_gradient(grad, x, wants_bias, ctx.gelu)
        return grad_x, grad_weight, grad_bias if wants_bias else None, residual, None


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        out, inverse = _ops.modulate(x, shift, scale, eps)
        ctx.save_for_backward(x, scale, inverse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_ops.modulate_backward(grad, *ctx.saved_tensors), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return _ops.gate(residual, x, gate)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grad, *_ops.gate_backward(grad, *ctx.saved_tensors)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rope: Tensor | None) -> Tensor:
        out, inverse = _ops.norm(x, weight, eps, rope)
        ctx.save_for_backward(x, weight, inverse, rope)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_ops.norm_backward(grad, *ctx.saved_tensors), None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        out, statistics = _ops.attention(query, key, value, bias)
        ctx.save_for_backward(query, key, value, bias, out, statistics)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_ops.attention_backward(grad, *ctx.saved_tensors), None


class _RmsNorm(torch.autograd.Function):
    """RMS norm of torch's operations with few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        normed: Tensor = x * scale.unsqueeze(-1)
        if weight is not None:
            normed.mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        grad_weight = None
        if weight is None:
            dot, grad_x = torch.linalg.vecdot(grad, x), grad
        else:
            product = grad * x
            dot, grad_x = product @ weight, grad * weight
            if ctx.needs_input_grad[1]:
                grad_weight = scale.reshape(-1) @ product.flatten(0, -2)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        share = dot.mul_(scale).mul_(scale).div_(x.shape[-1]).unsqueeze(-1)
        return torch.addcmul(grad_x, x, share, value=-1).mul_(scale.unsqueeze(-1)), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight over the last dimension of ``x`` (..., dim)."""
    if trains_here(x):
        return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """AdaLN: RMS(x) * (1 + scale) + shift; ``shift`` and ``scale`` (..., 1 or L, D) for ``x`` (..., L, D)."""
    if native(x):
        return _Modulate.apply(x, shift, scale, eps)  # type: ignore[no-any-return]
    return torch.addcmul(shift, rms_norm(x, None, eps), 1 + scale)


def gate(residual: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Residual + x * factor; ``factor`` broadcasts like ``shift`` of :func:`modulate`."""
    if native(x):
        return _Gate.apply(residual, x, factor)  # type: ignore[no-any-return]
    return torch.addcmul(residual, x, factor)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention (rows, Lq, heads * size) of (rows, heads, length, size); ``bias`` (rows, 1, 1, Lk) or None."""
    if native(query):
        return _Attention.apply(query, key, value, bias)  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


class Linear(nn.Linear):
    """A linear layer. ``gelu``: of the GELU of its input, whose inner activations are then kept nowhere."""

    def __init__(self, inner: int, outs: int, bias: bool = True, gelu: bool = False) -> None:
        super().__init__(inner, outs, bias)
        self.gelu = gelu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out); plus ``residual`` (..., out)."""
        if native(input) and self.weight.dtype == torch.float32:
            return _Linear.apply(input, self.weight, self.bias, residual, self.gelu)  # type: ignore[no-any-return]
        out = super().forward(F.gelu(input, approximate="tanh") if self.gelu else input)
        return out if residual is None else residual + out


class RmsNorm(nn.Module):
    """RMS norm with a weight, over the last dimension, and a rotation."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(..., dim) to the same; ``rope`` (L, dim / 2) turns pairs of ``x`` (..., L, dim)."""
        if native(x):
            return _Norm.apply(x, self.weight, self.eps, rope)  # type: ignore[no-any-return]
        y = rms_norm(x, self.weight, self.eps)
        return y if rope is None else rotate(y, rope)
