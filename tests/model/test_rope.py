"""RoPE: what rotation must keep, and that tables can be used in training after an inference-mode call."""

from __future__ import annotations

import torch

from wav.model.rope import rotate, token_rope, video_rope

CPU = torch.device("cpu")
SCALE = (8 / 30, 32.0, 32.0)


def test_rotation_is_pairwise_minus_x1_x0() -> None:
    table = torch.polar(torch.ones(1, 1), torch.tensor([[0.3]]))
    turned = rotate(torch.tensor([[1.0, 2.0]]), table)
    c, s = torch.tensor(0.3).cos(), torch.tensor(0.3).sin()
    torch.testing.assert_close(turned, torch.stack([1 * c - 2 * s, 2 * c + 1 * s])[None])


def test_front_padding_is_not_rotated() -> None:
    table = video_rope(16, 2, 2, 2, SCALE, CPU)
    assert table.shape == (8, 8)
    assert torch.equal(table[:, :2], torch.ones(8, 2, dtype=torch.complex64))
    assert not torch.equal(table[:, 2:], torch.ones(8, 6, dtype=torch.complex64))


def test_axes_move_their_own_angles() -> None:
    grid = video_rope(12, 2, 3, 4, SCALE, CPU).view(2, 3, 4, 2, 3)  # frequency major, then (f, h, w)
    for axis in range(3):
        other = [i for i in range(3) if i != axis]
        moved = grid.select(axis, 0) != grid.select(axis, 1)
        assert moved[..., -1, axis].all()
        assert not moved[..., other].any()


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        table = token_rope(8, 11, 57, CPU)
    x = torch.randn(2, 11, 8, requires_grad=True)
    rotate(x, table).sum().backward()
    assert x.grad is not None


def test_bfloat16_is_rotated_in_float32() -> None:
    x, table = torch.randn(1, 5, 8), token_rope(8, 5, 54, CPU)
    half = x.bfloat16()
    assert rotate(half, table).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(half, table), rotate(half.float(), table).bfloat16())


def test_real_tables_turn_as_complex_ones_do() -> None:
    """Compiled code has no complex arithmetic."""
    table = token_rope(8, 11, 57, CPU)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        x = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        real = rotate(x, torch.view_as_real(table))
        assert real.dtype == dtype
        torch.testing.assert_close(real, rotate(x, table), atol=tolerance, rtol=0)
