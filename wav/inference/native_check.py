"""Whether compiled training kernels compute what torch and its gradients do, before anything relies on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from wav.model.native_training import Kernels

Pairs = list[tuple[Tensor, Tensor]]
"""What a kernel found, and torch's result."""


class _Draws:
    """Numbers and gradients for a check."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(shape, generator=self._generator).requires_grad_(gradient)

    def backward(self, out: Tensor, *leaves: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A gradient of ``out``, and torch's of the leaves."""
        grad = self(*out.shape, gradient=False)
        return grad, torch.autograd.grad(out, leaves, grad)


def check(kernels: Kernels) -> None:
    """Raise RuntimeError where a kernel is off, on sizes that fill no vector evenly."""
    parts = {"product": _product, "modulate": _modulate, "norm": _norm, "attention": _attention}
    with torch.inference_mode(False), torch.enable_grad():
        for name, part in parts.items():
            for found, wanted in part(kernels, _Draws()):
                if not torch.allclose(found, wanted, atol=1e-4, rtol=1e-4):
                    raise RuntimeError(f"{name}: {float((found - wanted).abs().max()):.1e} off torch's result")


def _product(kernels: Kernels, draw: _Draws) -> Pairs:
    x, weight, bias = draw(3, 95, 20), draw(83, 20), draw(83)
    wanted = F.linear(x, weight, bias)
    grad, gradients = draw.backward(wanted, x, weight, bias)
    found = kernels.product(x, weight, bias, turned=True)
    grads = (kernels.product(grad, weight), *kernels.product_gradient(grad, x, True))
    pairs = [(found, wanted), *zip(grads, gradients, strict=True)]
    residual = draw(3, 95, 83)
    wanted = residual + F.linear(F.gelu(x, approximate="tanh"), weight, bias)
    grad, gradients = draw.backward(wanted, x, weight, bias)
    found = kernels.product(x, weight, bias, residual, turned=True, gelu=True)
    grads = (kernels.product(grad, weight, slope=x), *kernels.product_gradient(grad, x, True, True))
    return [*pairs, (found, wanted), *zip(grads, gradients, strict=True)]


def _modulate(kernels: Kernels, draw: _Draws) -> Pairs:
    x, shift, scale, gate = draw(3, 5, 22), draw(3, 1, 22), draw(3, 1, 22), draw(3, 1, 22)
    normed = F.rms_norm(x, (22,), None, 1e-6) * (1 + scale) + shift
    grad, gradients = draw.backward(normed, x, shift, scale)
    found, inverse = kernels.modulate(x, shift, scale, 1e-6)
    pairs = [(found, normed), *zip(kernels.modulate_backward(grad, x, scale, inverse), gradients, strict=True)]
    residual = draw(3, 5, 22)
    gated = residual + x * gate
    grad, gradients = draw.backward(gated, x, gate)
    pairs += zip(kernels.gate_backward(grad, x, gate), gradients, strict=True)
    return [*pairs, (kernels.gate(residual, x, gate), gated)]


def _norm(kernels: Kernels, draw: _Draws) -> Pairs:
    x, weight, angle = draw(2, 67, 22), draw(22), draw(67, 11, gradient=False)
    rope = torch.polar(torch.ones_like(angle), angle)
    normed = F.rms_norm(x, (22,), weight, 1e-5)
    turned = torch.view_as_real(torch.view_as_complex(normed.unflatten(-1, (-1, 2))) * rope).flatten(-2)
    pairs: Pairs = []
    for wanted, table in ((normed, None), (turned, rope)):
        grad = draw(*wanted.shape, gradient=False)
        gradients = torch.autograd.grad(wanted, (x, weight), grad, retain_graph=True)
        found, inverse = kernels.norm(x, weight, 1e-5, table)
        pairs += [(found, wanted)]
        pairs += zip(kernels.norm_backward(grad, x, weight, inverse, table), gradients, strict=True)
    return pairs


def _attention(kernels: Kernels, draw: _Draws) -> Pairs:
    query, key, value = draw(2, 3, 43, 22), draw(2, 3, 19, 22), draw(2, 3, 19, 22)  # no block, tile or vector is full
    mask = torch.zeros(2, 1, 1, 19)
    mask[1, ..., 7:] = -10000.0
    pairs: Pairs = []
    for bias in (None, mask):
        wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        grad, gradients = draw.backward(wanted, query, key, value)
        found, statistics = kernels.attention(query, key, value, bias)
        pairs.append((found, wanted))
        grads = kernels.attention_backward(grad, query, key, value, bias, found, statistics)
        pairs += zip(grads, gradients, strict=True)
    return pairs
