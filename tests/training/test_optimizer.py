"""Muon beside AdamW, and its work shared by the ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore

from wav.config import TrainSettings
from wav.training.optimizer import SharedMuon, build_optimizer

#: three of one shape, so that two ranks do not share them evenly; a tall and a wide one
SHAPES = (8, 8), (16, 8), (8, 8), (8, 12), (8, 8)


def trained(kind: type[torch.optim.Muon], steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices of :data:`SHAPES` and their momenta after some steps on the same gradients."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]
    muon = kind(matrices, lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        for matrix in matrices:
            matrix.grad = torch.randn(*matrix.shape, generator=generator)
        muon.step()
    return [m.detach() for m in matrices], [muon.state[m]["momentum_buffer"] for m in matrices]


def _rank(rank: int, meeting: Path, sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(str(meeting), 2), rank=rank, world_size=2)
    sender.send([tensor.numpy() for several in trained(SharedMuon) for tensor in several])
    dist.destroy_process_group()


def test_shared_muon_is_torchs() -> None:
    """Up to the rounding of bfloat16, in which both compute; momenta and hence what is saved are equal."""
    for one, other in zip(*map(trained, (SharedMuon, torch.optim.Muon)), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.005)
    with pytest.raises(ValueError, match="closure"):
        SharedMuon([nn.Parameter(torch.ones(2, 2))]).step(lambda: 0.0)


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    arguments = [(rank, tmp_path / "meeting", sender) for rank, (_, sender) in enumerate(pipes)]
    children: list[Any] = [context.Process(target=_rank, args=found) for found in arguments]
    for child, (_, sender) in zip(children, pipes, strict=True):
        child.start()
        sender.close()
    ranks = [receiver.recv() for receiver, _ in pipes]  # EOFError where a child failed; it said why
    for child in children:
        child.join(60)
    alone = [tensor for several in trained(SharedMuon) for tensor in several]
    for first, second, expected in zip(*ranks, alone, strict=True):
        assert (first == second).all()
        torch.testing.assert_close(torch.from_numpy(first), expected, rtol=0, atol=0.005)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    """Each part's learning rate follows the one schedule, and what was saved goes on as it was."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 6)]), "proj_in": nn.Linear(4, 4)})
    settings = TrainSettings(optimizer="muon", learning_rate=0.1, muon_learning_rate=0.3)
    optimizer, other = build_optimizer(module, settings), build_optimizer(module, settings)
    muon, adamw = optimizer.param_groups
    assert [tuple(p.shape) for p in muon["params"]] == [(6, 4)]
    assert len(adamw["params"]) == 3
    assert (muon["scale"], adamw["scale"]) == (pytest.approx(3), 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.0, 0.0]
    for group in other.param_groups:
        group["lr"] = 0.1 * group["scale"]
    other.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    with pytest.raises(ValueError, match="use adamw, or zero_stage 0"):
        TrainSettings(optimizer="muon", zero_stage=2)
