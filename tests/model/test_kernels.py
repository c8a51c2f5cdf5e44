"""The operations of training against autograd's own, on sizes that fill no vector evenly, and how they step aside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.inference import native
from wav.model import kernels, native_training
from wav.model.kernels import Linear, RmsNorm, attend, gate, modulate, rms_norm
from wav.model.rope import token_rope

needs_kernels = pytest.mark.skipif(not native_training.available(), reason="no C compiler, or WAV_NATIVE=0")


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compare(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[], Tensor], leaves: list[Tensor], tolerance: float = 2e-5
) -> None:
    """Values and gradients of the compiled kernels against those of torch's operations, relative to their scale."""
    found = function()
    assert found.grad_fn is not None
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad(found, leaves, grad)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "native", lambda _: False)
        wanted = function()
        expected = torch.autograd.grad(wanted, leaves, grad)
    assert type(wanted.grad_fn) is not type(found.grad_fn)
    for ours, theirs in zip((found, *gradients), (wanted, *expected), strict=True):
        assert ours.shape == theirs.shape
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours / scale, theirs / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 4, 6)])
def test_rms_norm_without_kernels_is_the_definition(shape: tuple[int, ...], weighted: bool) -> None:
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


@needs_kernels
@pytest.mark.parametrize("rows", [1, 6, 49, 300, 700])
@pytest.mark.parametrize(("inner", "outs"), [(1, 1), (7, 15), (64, 192), (40, 65), (130, 33), (300, 530)])
def test_linear_of_any_size(monkeypatch: pytest.MonkeyPatch, rows: int, inner: int, outs: int) -> None:
    layer, x = Linear(inner, outs), leaf(rows, inner)
    compare(monkeypatch, lambda: layer(x), [x, layer.weight, layer.bias])


@needs_kernels
def test_linear_without_bias_or_with_frozen_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(20, 30, bias=False), leaf(2, 5, 20)
    compare(monkeypatch, lambda: layer(x), [x, layer.weight])
    layer = Linear(20, 30)
    compare(monkeypatch, lambda: layer(x.detach()), [layer.weight, layer.bias])  # a stage's first layer
    layer.weight.requires_grad_(False)
    compare(monkeypatch, lambda: layer(x), [x, layer.bias])


@needs_kernels
@pytest.mark.parametrize("rows", [1, 13, 48, 301])
@pytest.mark.parametrize(("inner", "outs"), [(1, 1), (7, 15), (64, 64), (40, 65), (300, 130)])
def test_linear_of_gelu_and_onto_a_residual(monkeypatch: pytest.MonkeyPatch, rows: int, inner: int, outs: int) -> None:
    layer, x, residual = Linear(inner, outs, gelu=True), leaf(rows, inner), leaf(rows, outs, seed=1)
    compare(monkeypatch, lambda: layer(x), [x, layer.weight, layer.bias])
    compare(monkeypatch, lambda: layer(x, residual), [x, residual, layer.weight, layer.bias])
    compare(monkeypatch, lambda: layer(x, x[:, :1].expand(-1, outs)), [x, layer.weight])  # not contiguous
    layer.weight.requires_grad_(False)
    compare(monkeypatch, lambda: layer(x, residual), [x, residual, layer.bias])
    plain = Linear(inner, outs)
    compare(monkeypatch, lambda: plain(x, residual), [x, residual, plain.weight, plain.bias])


@needs_kernels
def test_linear_of_gelu_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(40, 65, gelu=True)
    with torch.no_grad():
        x = leaf(301, 40) * 5
        x[0, 0], x[1, 1] = -200.0, 200.0  # far outside what a power of two can hold
    x.requires_grad_()
    compare(monkeypatch, lambda: layer(x), [x, layer.weight, layer.bias])


@needs_kernels
@pytest.mark.parametrize("dim", [2, 12, 40, 67])
@pytest.mark.parametrize("cells", [1, 4])
def test_adaln_and_its_gate(monkeypatch: pytest.MonkeyPatch, dim: int, cells: int) -> None:
    """Rows as the blocks give them: six side by side, one for all cells of a frame."""
    table, x, y = leaf(3, 2, 1, 6, dim), leaf(3, 2, cells, dim, seed=1), leaf(3, 2, cells, dim, seed=2)

    def part(index: int) -> Tensor:
        return table.unbind(-2)[index]

    compare(monkeypatch, lambda: modulate(x, part(0), part(1), 1e-6), [x, table])
    compare(monkeypatch, lambda: gate(x, y, part(4)), [x, y, table])


@needs_kernels
@pytest.mark.parametrize("dim", [2, 12, 36, 64, 130])
@pytest.mark.parametrize("turned", [True, False])
def test_norm_and_rotation(monkeypatch: pytest.MonkeyPatch, dim: int, turned: bool) -> None:
    norm, x = RmsNorm(dim, 1e-5), leaf(9, 23, dim)
    with torch.no_grad():
        norm.weight.add_(leaf(dim, seed=1))
    rope = token_rope(dim, 23, 57, torch.device("cpu")) if turned else None
    compare(monkeypatch, lambda: norm(x, rope), [x, norm.weight], 1e-4)


@needs_kernels
@pytest.mark.parametrize("size", [1, 6, 16, 20, 24, 32, 64, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 16), (37, 36), (11, 133), (64, 64), (49, 1), (128, 16)])
def test_attention_of_any_size(monkeypatch: pytest.MonkeyPatch, size: int, queries: int, keys: int) -> None:
    flat = leaf(3, queries, 2 * size), leaf(3, keys, 2 * size, seed=1), leaf(3, keys, 2 * size, seed=2)
    bias = torch.zeros(3, 1, 1, keys)
    bias[1, ..., keys // 2 :] = -10000.0

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], 2, -1).transpose(1, 2)

    for mask in (None, bias):
        compare(monkeypatch, lambda m=mask: attend(*map(split, flat), m), list(flat))
    large = [flat[0].detach().mul(30).requires_grad_(), *flat[1:]]  # logits that no bound holds
    compare(monkeypatch, lambda: attend(*map(split, large)), large, 2e-4)
    picked = torch.tensor([2, 0, 2])  # keys of one row read by several, out of order
    compare(monkeypatch, lambda: attend(split(flat[0]), split(flat[1])[picked], split(flat[2])[picked]), list(flat))


@needs_kernels
def test_no_run_and_no_number_of_threads_changes_a_bit() -> None:
    """Resuming is held to the bit, so gradients must not depend on how the work was cut."""
    wide, narrow, norm = Linear(96, 530), Linear(530, 96, gelu=True), RmsNorm(96, 1e-5)
    x, rows = leaf(40, 100, 96), leaf(40, 1, 96, seed=1)

    def gradients() -> list[Tensor]:
        y = gate(x, narrow(wide(modulate(x, rows, rows, 1e-6)), x), rows)
        q = norm(y).view(40, 100, 4, 24).transpose(1, 2)
        leaves = [x, rows, *wide.parameters(), *narrow.parameters(), *norm.parameters()]
        return list(torch.autograd.grad(attend(q, q, q).square().sum(), leaves))

    first, threads = gradients(), torch.get_num_threads()
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            assert native.threads_for(2 * 4000 * 96 * 530) == number
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True)), number
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def again() -> Iterator[None]:
    """The library is looked for anew, and afterwards as before."""
    native_training.kernels.cache_clear()
    yield
    native_training.kernels.cache_clear()


def uses_torch() -> bool:
    layer, x = Linear(5, 3), leaf(2, 5)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    return type(layer(x).grad_fn).__name__ != "_LinearBackward"


def test_no_compiler_is_announced_once_and_training_goes_on(
    again: None, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert uses_torch()
        assert uses_torch()
    assert caplog.text.count("no-such-compiler") == 1
    assert native_training.description() == "torch"


@pytest.mark.parametrize(
    ("file", "right", "wrong", "part"),
    [
        ("training.c", "sum[q][v] + load_some(to, left)", "sum[q][v] + all(1.0f)", "product"),
        ("training.c", "all(0.21406533f)", "all(0.2f)", "product"),
        ("training_rows.c", "scales[i] += grad[i] * (x[i] * inverse)", "scales[i] = grad[i]", "modulate"),
        ("training_rows.c", "sums[i] += turned[i]", "sums[i] = turned[i]", "norm"),
        ("training_attention.c", "(shares[i][v] - load(h->mean + q + v * LANES))", "shares[i][v]", "attention"),
    ],
)
def test_wrong_gradients_are_refused(
    again: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    file: str, right: str, wrong: str, part: str,
) -> None:  # fmt: skip
    """A compiler that gets a gradient wrong is found by the check, not by a loss that does not fall."""
    if not native_training.available():
        pytest.skip("no C compiler, or WAV_NATIVE=0")
    sources = []
    for source in native_training.SOURCES:
        text = source.read_text()
        if source.name == file:
            assert right in text
            text = text.replace(right, wrong)
        (tmp_path / source.name).write_text(text)
        sources.append(tmp_path / source.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_training, "SOURCES", tuple(sources))
    native_training.kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert uses_torch()
    assert f"{part}: " in caplog.text


def test_can_be_turned_off(again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "0")
    assert uses_torch()


def test_other_types_and_passes_without_gradients_are_torchs() -> None:
    assert not kernels.native(torch.zeros(2, dtype=torch.bfloat16))
    assert not kernels.native(torch.zeros(2, device="meta"))
    with torch.no_grad():
        assert not kernels.native(torch.zeros(2))
    layer = nn.Module.to(Linear(4, 4), torch.bfloat16)
    assert layer(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
