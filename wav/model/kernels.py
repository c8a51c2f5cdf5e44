"""RMS norm with a hand-written gradient, for float32 training on a CPU.

There, autograd takes RMS norm apart into a dozen passes over memory, a tenth of a training step. Elsewhere (GPU,
bfloat16, no gradient wanted) the library's fused kernel runs. Both agree to float32 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
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
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class RmsNorm(nn.Module):
    """RMS norm with a weight, over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same."""
        return rms_norm(x, self.weight, self.eps)
