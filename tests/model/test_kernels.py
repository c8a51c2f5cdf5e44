"""The hand-written RMS norm against the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch

from wav.model.kernels import rms_norm


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 4, 6)])
def test_equal_to_the_definition(shape: tuple[int, ...], weighted: bool) -> None:
    x = (torch.randn(shape) * 0.01).requires_grad_()  # small, so that eps counts
    weight = torch.randn(shape[-1], requires_grad=True) if weighted else None
    leaves = [x] if weight is None else [x, weight]
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 if weight is None else weight)
    got = rms_norm(x, weight, 1e-5)
    assert got.grad_fn is not None
    assert "_RmsNorm" in type(got.grad_fn).__name__
    torch.testing.assert_close(got, plain)
    grad = torch.randn(shape)
    expected = torch.autograd.grad(plain, leaves, grad)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_library_computes_the_same() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    with torch.no_grad():
        library = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), library)
