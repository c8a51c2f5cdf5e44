"""RoPE: what rotation must keep, and that tables can be used in training after an inference-mode call."""

from __future__ import annotations

import torch

from wav.model.rope import rotate, token_rope, video_rope

CPU = torch.device("cpu")
SCALE = (8 / 30, 32.0, 32.0)


def test_rotation_is_pairwise_minus_x1_x0() -> None:
    c, s = torch.tensor(0.3).cos(), torch.tensor(0.3).sin()
    rotated = rotate(torch.tensor([[1.0, 2.0]]), (torch.stack([c, c])[None], torch.stack([-s, s])[None]))
    torch.testing.assert_close(rotated, torch.stack([1 * c - 2 * s, 2 * c + 1 * s])[None])


def test_front_padding_is_not_rotated() -> None:
    cos, sin = video_rope(16, 2, 2, 2, SCALE, CPU)
    assert cos.shape == sin.shape == (8, 16)
    assert torch.equal(cos[:, :4], torch.ones(8, 4))
    assert torch.equal(sin[:, :4], torch.zeros(8, 4))
    assert not torch.equal(cos[:, 4:], torch.ones(8, 12))


def test_axes_move_their_own_angles() -> None:
    cos, _ = video_rope(12, 2, 3, 4, SCALE, CPU)
    grid = cos[:, ::2].view(2, 3, 4, 2, 3)  # frequency major, then (f, h, w)
    for axis in range(3):
        other = [i for i in range(3) if i != axis]
        moved = grid.select(axis, 0) != grid.select(axis, 1)
        assert moved[..., -1, axis].all()
        assert not moved[..., other].any()


def test_rotation_is_a_product_of_complex_numbers() -> None:
    cos, sin = token_rope(8, 11, 57, CPU)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    turns = torch.complex(cos[:, 1::2].double(), sin[:, 1::2].double())
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)
    torch.testing.assert_close(rotate(x, (cos, sin)), wanted)


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
