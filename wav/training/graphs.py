"""A training pass as one CUDA graph: forwards and backwards in a single launch.

Launched kernel by kernel, the value and the joint stage leave a large GPU idle for half of a step, because the host
takes longer to launch a small kernel than the GPU to run it (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wav.cuda_graphs import capture, leaves, mapped
from wav.errors import TrainingError, cut
from wav.training.draws import StepInputs

if TYPE_CHECKING:
    from wav.config import TrainSettings
    from wav.data.windows import WindowBatch
    from wav.training.draws import Draws

#: How blocks are recomputed: they draw nothing, so no generator's state is put back, which a graph could not do.
RECOMPUTE = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
Found = tuple[Tensor, dict[str, Tensor], list[Tensor | None]]  #: loss, its parts, a gradient or none of each parameter


def can_capture(settings: TrainSettings, device: torch.device, ranks: int, accumulation: int) -> bool:
    """Whether a run's passes are captured: compiled blocks on CUDA, one pass a step, gradients that stay whole.

    ``compile: auto`` does so on one rank, where it was measured; ``on`` also on several, whose exchange of gradients
    then begins after the pass. ZeRO-3 gathers parameters in hooks, which a replay would not run.
    """
    several = ranks > 1 and settings.compile != "on"
    return device.type == "cuda" and settings.zero_stage < 3 and accumulation == 1 and not several


@dataclass(frozen=True)
class Recording:
    """A captured pass: where it reads its inputs, what computes it anew, and where its results then lie."""

    inputs: tuple[WindowBatch, Draws]
    replay: Callable[[], None]
    loss: Tensor
    parts: dict[str, Tensor]
    reached: list[nn.Parameter]  #: parameters that have a gradient in this pass
    gradients: list[Tensor]  #: theirs


class PassGraphs:
    """The passes of a module, captured when inputs of their shapes and roles are met first.

    Numbers are those of the same pass launched kernel by kernel. A pass's gradients lie where the pass before left
    its own: they must have been used by then, and may not be accumulated. ``setting`` is what asked for graphs.
    TrainingError, from a pass: it cannot be recorded here, for want of memory or by a fault of the compiler; what such
    a failure leaves of the device's state is not known, so that the run does not go on without a graph.
    """

    def __init__(
        self,
        compute: Callable[[StepInputs], tuple[Tensor, dict[str, Tensor]]],
        module: nn.Module,
        setting: str = "compile = auto",
    ) -> None:
        self._compute, self._module, self._setting = compute, module, setting
        self._parameters = list(module.parameters())  # walking the modules takes as long as launching a small pass
        self._recordings: dict[Any, Recording] = {}
        #: one place for a parameter's gradient, whatever the recording
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._roles: set[str] = set()  #: those that a pass has had, so that its tables of positions are made
        self._pool: torch.cuda.MemPool | None = None  #: each recording's results are used before another is launched

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar whose backward hands out the pass's gradients) and its detached parts."""
        given = (inputs.batch, inputs.draws)
        # a graph reads the memory that it was captured on, so weights that moved need another one
        shapes = tuple(None if x is None else x.shape for x in leaves(given))
        key = (inputs.roles, shapes, tuple(p.data_ptr() for p in self._parameters))
        found = self._recordings.get(key)
        if found is None:
            try:
                found = self._recordings[key] = self._record(inputs)
            except RuntimeError as error:
                raise TrainingError(
                    f"{self._setting}: a pass cannot be recorded as a CUDA graph here ({cut(error, 300)}); set compile "
                    "to off, or gradient_checkpointing to auto where memory is short"
                ) from error
        for place, value in zip(leaves(found.inputs), leaves(given), strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        found.replay()
        return _HandOut.apply(found, *found.reached), found.parts  # type: ignore[no-untyped-call]

    def _record(self, inputs: StepInputs) -> Recording:
        parameters = [parameter for parameter in self._parameters if parameter.requires_grad]
        batch, draws = mapped((inputs.batch, inputs.draws), torch.clone)

        def run(own: list[nn.Parameter]) -> Found:
            loss, parts = self._compute(StepInputs(batch, draws, inputs.roles))
            gradients: list[Tensor | None] = list(torch.autograd.grad(loss, own, allow_unused=True))
            return loss.detach(), parts, self._in_place(parameters, gradients)

        self._pool = self._pool or torch.cuda.MemPool()
        roles = {name for name, samples in vars(inputs.roles).items() if samples}
        # backwards too on this thread: memory is taken from the pool on one alone
        with torch.autograd.set_multithreading_enabled(False):
            if not roles <= self._roles:
                # tables of positions need memory of their own: in the pool an earlier graph would write over them
                with self._stand_ins() as others:
                    run([others[parameter] for parameter in parameters])
                self._roles |= roles
            with self._stand_ins() as others:
                own = [others[parameter] for parameter in parameters]
                device = parameters[0].device
                replay, (loss, parts, gradients) = capture(lambda: run(own), device, self._pool, tight=True)
        reached = {p: gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        self._gradients = reached | self._gradients
        return Recording((batch, draws), replay, loss, parts, list(reached), list(reached.values()))

    def _in_place(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients, where those of a recording before this one lie already."""
        kept, new = [], []
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            place = self._gradients.get(parameter)
            if place is not None and gradient is not None:
                kept.append(place)
                new.append(gradient)
                gradients[index] = place
        if kept:
            torch._foreach_copy_(kept, new)  # one launch for many
        return gradients

    @contextmanager
    def _stand_ins(self) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
        """Inside the block the module holds other parameters, in the memory of its own, which they are found by.

        Autograd waits for the stream on which it first met a parameter, and a capture may not.
        """
        places = [(m, name, p) for m in self._module.modules() for name, p in m.named_parameters(recurse=False)]
        others = {p: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for _, _, p in places}
        try:
            for module, name, parameter in places:
                setattr(module, name, others[parameter])
            yield others
        finally:
            for module, name, parameter in places:
                setattr(module, name, parameter)


class _HandOut(torch.autograd.Function):
    """The loss of a recording; backwards, the gradients that its replay computed."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = recording.gradients
        return recording.loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # detached: a tensor that nobody else holds becomes a parameter's gradient without a copy
        return None, *(gradient.detach() for gradient in ctx.gradients)
