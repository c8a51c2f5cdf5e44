"""The compiled CPU kernels against torch, their independence of place and threads, and the way they step aside."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.inference import native
from wav.inference.products import FeedProduct, Product, SelfProduct, attend, turns
from wav.model.layers import Attention, FeedForward
from wav.model.rope import rotate, token_rope

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler, or WAV_NATIVE=0")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=2e-5)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 6, 49, 100])
@pytest.mark.parametrize(("inner", "outs"), [(1, 1), (7, 15), (64, 192), (40, 65), (256, 48), (33, 130)])
def test_products_of_any_size(rows: int, inner: int, outs: int) -> None:
    linear = nn.Linear(inner, outs)
    x, residual, gate = draw(2, rows, inner), draw(2, rows, outs, seed=1), draw(rows, outs, seed=2)
    product = Product(linear)
    close(product(x), linear(x))
    close(product.add(x, residual), residual + linear(x))
    close(product.add(x, residual, gate), residual + gate * linear(x))
    close(product.add(x, residual, gate[:1]), residual + gate[:1] * linear(x))


@needs_kernels
@pytest.mark.parametrize("dim", [12, 40, 64])
def test_adaln_rows_per_frame_and_view(dim: int) -> None:
    """Rows (V, F, 1, D) hold for all cells of their frame and view, in every candidate."""
    feed = FeedForward(dim)
    h, (shift, scale, gate) = draw(3, 2, 4, 5, dim), draw(3, 2, 4, 1, dim, seed=1)
    wanted = h + gate * feed(F.rms_norm(h, (dim,), None, 1e-6) * scale + shift)
    close(FeedProduct(feed, 1e-6).add(h, shift, scale, gate), wanted)


@needs_kernels
@pytest.mark.parametrize("dim", [12, 36, 64, 256])
def test_norms_and_rotation_of_queries_and_keys(dim: int) -> None:
    attention, length = Attention(dim, 2), 9
    attention.norm_q.weight.copy_(1 + draw(dim) / 9)
    attention.norm_k.weight.copy_(1 + draw(dim, seed=1) / 9)
    h, shift, scale, rope = (
        draw(4, length, dim),
        draw(1, dim),
        draw(1, dim, seed=3),
        token_rope(dim, length, 57, torch.device("cpu")),
    )
    pair, value = SelfProduct(attention).project(h, shift, scale, 1e-6, turns(rope))
    x = F.rms_norm(h, (dim,), None, 1e-6) * scale + shift
    close(pair[:, :, 0], rotate(attention.norm_q(attention.to_q(x)), rope))
    close(pair[:, :, 1], rotate(attention.norm_k(attention.to_k(x)), rope))
    close(value, attention.to_v(x))


@needs_kernels
@pytest.mark.parametrize("size", [1, 6, 16, 24, 64])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 16), (37, 36), (11, 193)])
def test_attention_of_any_size(size: int, queries: int, keys: int) -> None:
    query, key, value = draw(3, queries, 2 * size), draw(3, keys, 2, 2 * size, seed=1)[:, :, 0], draw(3, keys, 2 * size)
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (query, key, value))
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    close(attend(query, key, value, 2, True), wanted)


@needs_kernels
def test_place_company_and_threads_change_no_bit() -> None:
    """A row's numbers are the same alone, anywhere in a batch, and on any number of threads."""
    product, x = Product(nn.Linear(64, 256)), draw(700, 40, 64)
    there, threads = product(x), torch.get_num_threads()
    read = native.attend(x, x, x, 4)
    for first in (0, 1, 350, 699):
        assert torch.equal(product(x[first : first + 1]), there[first : first + 1])
        assert torch.equal(native.attend(*[x[first : first + 1]] * 3, 4), read[first : first + 1])
    try:
        torch.set_num_threads(3)
        assert native.threads_for(2 * x.numel() * 256) == 3
        assert torch.equal(product(x), there)
        assert torch.equal(native.attend(x, x, x, 4), read)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def again() -> Iterator[None]:
    """The library is looked for anew, and afterwards as before."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def test_no_compiler_is_announced_and_nothing_breaks(
    again: None, no_compiler: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not native.available()
    assert "no-such-compiler" in caplog.text
    assert native.description() == "torch"
    assert not Product(nn.Linear(3, 3)).native
    assert list((tmp_path / "wav").iterdir()) == []


def test_wrong_results_are_refused(
    again: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler that gets it wrong is found by the check, not by a robot."""
    if not native.available():
        pytest.skip("no C compiler, or WAV_NATIVE=0")
    broken = tmp_path / "native.c"
    broken.write_text(native.SOURCE.read_text().replace("1.0f / total(sums[q])", "1.1f / total(sums[q])"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCE", broken)
    native._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not native.available()
    assert "attend: " in caplog.text


def test_can_be_turned_off(again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "0")
    assert not native.available()
