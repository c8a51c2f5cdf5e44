"""The kernels in C against torch's operations, their independence of place, and the way they step aside."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wav import code_cache
from wav.inference.cpu import kernels
from wav.inference.cpu.kernels import CpuOperations
from wav.inference.operations import Operations
from wav.model.rope import token_rope

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler, or WAV_NATIVE=0")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=2e-5)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def both() -> tuple[Operations, Operations]:
    return CpuOperations(), Operations()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 6, 49, 100])
@pytest.mark.parametrize(("inner", "outs"), [(1, 1), (7, 15), (64, 192), (40, 65), (256, 48), (33, 130)])
def test_products_of_any_size(both: tuple[Operations, ...], rows: int, inner: int, outs: int) -> None:
    linear, gate = nn.Linear(inner, outs), draw(rows, outs, seed=2)
    x, residual = draw(2, rows, inner), draw(2, rows, outs, seed=1)
    for part, weight in ((None, None), (residual, None), (residual, gate), (residual, gate[:1])):
        ours, wanted = (ops.linear(x, ops.product(linear), residual=part, gate=weight) for ops in both)
        close(ours, wanted)


@needs_kernels
@pytest.mark.parametrize("dim", [12, 40, 64])
def test_adaln_rows_per_frame_and_view(both: tuple[Operations, ...], dim: int) -> None:
    """Rows (V, F, 1, D) hold for all cells of their frame and view, in every candidate."""
    wide, narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
    h, (shift, scale, gate) = draw(3, 2, 4, 5, dim), draw(3, 2, 4, 1, dim, seed=1)
    ours, wanted = (
        ops.feed_forward(h, (shift, scale, 1e-6), ops.product(wide), ops.product(narrow), gate) for ops in both
    )
    close(ours, wanted)


@needs_kernels
@pytest.mark.parametrize("dim", [12, 36, 64, 256])
def test_norms_and_rotation_of_queries_and_keys(both: tuple[Operations, ...], dim: int) -> None:
    """The first two parts of three, of the same positions in every row."""
    linears, length = [nn.Linear(dim, dim) for _ in range(3)], 9
    h, shift, scale = draw(4, length, dim), draw(1, dim), draw(1, dim, seed=3)
    table = token_rope(dim, length, 57, h.device)
    norms = 1 + draw(2, dim) / 9
    ours, wanted = (
        ops.linear(h, ops.product(*linears), (shift, scale, 1e-6), (norms, 1e-5), ops.rope(table)) for ops in both
    )
    close(ours, wanted)


@needs_kernels
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 6, 16, 24, 64])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 16), (37, 36), (11, 193)])
def test_attention_of_any_size(both: tuple[Operations, ...], masked: bool, size: int, queries: int, keys: int) -> None:
    query, key, value = draw(3, queries, 2 * size), draw(3, keys, 2, 2 * size, seed=1)[:, :, 0], draw(3, keys, 2 * size)
    mask = (draw(3, keys, seed=5) > 0).float() if masked else None
    if mask is not None:
        mask[:, 0] = 1  # an instruction has at least one token
    ours, wanted = (ops.attend(query, key, value, 2, True, mask) for ops in both)
    close(ours, wanted)


@needs_kernels
def test_place_and_company_change_no_bit() -> None:
    """A row's numbers are the same alone and anywhere in a batch."""
    ops, x = CpuOperations(), draw(700, 40, 64)
    product, mask = ops.product(nn.Linear(64, 256)), (draw(700, 40, seed=1) > -1).float()
    there, read = ops.linear(x, product), ops.attend(x, x, x, 4, True, mask)
    for first in (0, 1, 350, 699):
        row = slice(first, first + 1)
        assert torch.equal(ops.linear(x[row], product), there[row])
        assert torch.equal(ops.attend(x[row], x[row], x[row], 4, True, mask[row]), read[row])


@pytest.fixture
def again() -> Iterator[None]:
    """The library is looked for anew, and afterwards as before."""
    kernels._library.cache_clear()
    yield
    kernels._library.cache_clear()


def test_no_compiler_is_announced_and_nothing_breaks(
    again: None, no_compiler: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not kernels.available()
    assert "no-such-compiler" in caplog.text
    assert kernels.description() == "torch"
    assert list((tmp_path / "wav").iterdir()) == []


def test_wrong_results_are_refused(
    again: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler that gets it wrong is found by the check, not by a robot."""
    if not kernels.available():
        pytest.skip("no C compiler, or WAV_NATIVE=0")
    broken = tmp_path / "kernels.c"
    broken.write_text(kernels.SOURCE.read_text().replace("1.0f / total(sums[q])", "1.1f / total(sums[q])"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "SOURCE", broken)
    kernels._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.available()
    assert "attend: " in caplog.text


@pytest.mark.integration
def test_a_library_that_is_torn_or_of_another_origin_is_compiled_again(
    again: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut leaves it short; loaded, it would end the process at every start without a word."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not kernels.available():
        pytest.skip("no C compiler, or WAV_NATIVE=0")
    (kept,) = (tmp_path / "wav").iterdir()
    whole = kept.read_bytes()
    for damage in (whole[:1000], b"", "link", "mode", *(["owner"] if os.geteuid() == 0 else [])):
        kept.unlink()  # the one that is loaded must stay whole
        kept.write_bytes(damage if isinstance(damage, bytes) else whole)
        if damage == "link":
            kept.rename(tmp_path / "elsewhere")
            kept.symlink_to(tmp_path / "elsewhere")
        elif damage == "mode":  # left by another user before the folder was made safe: anybody can compute the name
            kept.chmod(0o666)
        elif damage == "owner":
            os.chown(kept, 65534, -1)
        kernels._library.cache_clear()
        caplog.clear()
        assert kernels.available()
        assert "compiled again" in caplog.text
        (kept,) = (tmp_path / "wav").iterdir()
        assert not kept.is_symlink()
        assert kept.stat().st_size == len(whole)


@pytest.mark.parametrize("kind", ["mode", "link", "file"])
def test_a_place_where_others_may_write_keeps_no_code(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(code_cache.INDUCTOR, "")
    place = tmp_path / "wav"
    if kind == "mode":
        place.mkdir()
        place.chmod(0o777)
    elif kind == "link":
        (tmp_path / "other").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "other")
    else:
        place.write_text("")
    assert code_cache.code_cache() is None
    assert str(place) in caplog.text
    code_cache.prepare_compiler()
    inductor = Path(os.environ[code_cache.INDUCTOR])
    assert not inductor.is_relative_to(tmp_path)
    assert inductor.stat().st_mode & 0o077 == 0
    inductor.rmdir()
    code_cache._temporary.cache_clear()
    place.rmdir() if kind == "mode" else place.unlink()
    monkeypatch.setenv(code_cache.INDUCTOR, "")
    code_cache.prepare_compiler()
    assert os.environ[code_cache.INDUCTOR] == str(place / "inductor")
    assert code_cache.code_cache() == place
    assert place.stat().st_mode & 0o777 == 0o700


def test_can_be_turned_off(again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert not kernels.available()
