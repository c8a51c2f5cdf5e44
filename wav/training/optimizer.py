"""The optimiser of a run: AdamW, or Muon on the matrices of the transformer blocks with AdamW on everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from wav.config import TrainSettings


def build_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser that ``settings.optimizer`` names, over the parameters of ``module`` that require a gradient.

    Those of an odd size come last: ZeRO lays parameters one after another, and compiled code that has met a block whose
    weights begin at multiples of 16 bytes reads those of all blocks of the kind so.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    trained.sort(key=lambda named: named[1].numel() % 8 != 0)
    if settings.optimizer == "adamw":
        return _adamw([p for _, p in trained], settings)
    # a block's modulation table is added, not applied to anything
    matrices = {n for n, p in trained if p.ndim == 2 and "blocks." in n and not n.endswith("scale_shift_table")}
    return MuonWithAdamW(
        torch.optim.Muon(
            [p for name, p in trained if name in matrices], lr=settings.muon_learning_rate, weight_decay=0.0
        ),
        _adamw([p for name, p in trained if name not in matrices], settings),
    )


def _adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers behind one interface, which is all that an engine and a checkpoint know of.

    Every group holds ``scale``, its learning rate as a multiple of AdamW's, whose schedule both follow: an
    orthogonalised update has a length of its own (K. Jordan et al., "Muon", 2024).
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()
        for group in self.param_groups:
            group["scale"] = group["lr"] / adamw.defaults["lr"]

    def _share_groups(self) -> None:
        """The groups of this object are those of its parts, so that a learning rate set here reaches them."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of each part; a closure is not supported."""
        if closure is not None:
            raise ValueError("closure: not supported; compute the gradients first")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
