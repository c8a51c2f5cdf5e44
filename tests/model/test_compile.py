"""A block is plain PyTorch: it compiles whole, exports, and has second derivatives (a planner may follow gradients)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wav.model.experts import ExpertBlock
from wav.model.rope import token_rope, video_rope
from wav.model.video import VideoBlock

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
D, DIM = 12, 8  # widths of the video and of an expert


def video_block(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Any, ...]]:
    """A block that joins two views, and its arguments: four frames of 1 x 2 cells for each of two candidates."""
    torch.manual_seed(0)
    block = VideoBlock(D, 2, True, True, True, eps=1e-6).to(dtype)
    h, temb = torch.randn(2, 2, 4, 2, D, dtype=dtype), torch.randn(2, 2, 4, 6, D, dtype=dtype)
    return block, (h, temb, video_rope(D, 4, 1, 2, (1.0, 32.0, 32.0), CPU), torch.randn(1, 3, D, dtype=dtype), None)


def expert_block(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Any, ...]]:
    """An action block, and its arguments: two draws of three tokens that share video and value features."""
    torch.manual_seed(1)
    block = ExpertBlock(DIM, 2, D, 6, 1e-6).to(dtype)
    h, temb = torch.randn(2, 3, DIM, dtype=dtype), torch.randn(2, 1, 6, DIM, dtype=dtype)
    features = torch.randn(1, 5, D, dtype=dtype), torch.randn(1, 3, 6, dtype=dtype)
    return block, (h, temb, token_rope(DIM, 3, 54, CPU), *features)


BLOCKS = pytest.mark.parametrize("make", [video_block, expert_block])


@BLOCKS
def test_a_block_compiles_whole_forwards_and_backwards(make: Any) -> None:
    block, (h, *others) = make()
    wanted, got = h.clone().requires_grad_(), h.clone().requires_grad_()
    expected = block(wanted, *others)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(got, *others)
    torch.testing.assert_close(compiled, expected)
    compiled.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(got.grad, wanted.grad, atol=1e-5, rtol=1e-5)


@BLOCKS
def test_a_block_is_one_graph(make: Any) -> None:
    block, arguments = make()
    found = torch._dynamo.explain(block)(*arguments)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@BLOCKS
def test_a_block_exports(make: Any) -> None:
    block, arguments = make()
    program = torch.export.export(block, arguments)
    torch.testing.assert_close(program.module()(*arguments), block(*arguments))


@BLOCKS
def test_second_derivatives(make: Any) -> None:
    """Autograd's and finite differences' second derivatives agree, by the input, by AdaLN rows and by what is read."""
    block, (h, temb, rope, *read) = make(torch.float64)
    given = [x.requires_grad_() for x in (h, temb, *(x for x in read if x is not None))]
    count = sum(x is not None for x in read)

    def run(h: Tensor, temb: Tensor, *read: Tensor) -> Tensor:
        out: Tensor = block(h, temb, (rope[0].double(), rope[1].double()), *read, *[None] * (2 - count))
        return out

    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has first derivatives alone
        assert torch.autograd.gradgradcheck(run, given, atol=1e-4, fast_mode=True)
