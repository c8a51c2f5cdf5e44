"""Backend ``compiled``: fused blocks that ``torch.compile`` makes and, on a GPU, CUDA graphs; for ``export.compile``.

Compiled is one block at a time, once for all layers of a kind: what stands between two products (norms, modulation,
rotation, gates, residuals) becomes few kernels. On a GPU every call of the planner, such as all Euler steps of all
values, is recorded once per set of shapes and then launched as one CUDA graph, whose kernels no longer wait for Python.
Results differ from the other backends' by rounding. An instance serves one thread: its graphs share their memory.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from wav.code_cache import prepare_compiler
from wav.cuda_graphs import capture, leaves, mapped
from wav.errors import ConfigError
from wav.inference.fused import Block, CrossAttention, FusedContext, FusedPlannerModel
from wav.planning.types import NoiseShapes

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

log = logging.getLogger(__name__)

BACKEND = "inductor"
SHAPES = 32  #: sets of shapes that are compiled for; a policy of one planner needs about ten

Call = Callable[..., Any]


@functools.cache
def _compiled(function: Call, backend: str) -> Call:
    """``function`` compiled for every set of static shapes that it meets."""
    prepare_compiler()
    make: Call = torch.compile
    return cast(Call, make(function, backend=backend, fullgraph=True, dynamic=False))


class CompiledCrossAttention(CrossAttention):
    """A cross-attention whose keys and values are made by compiled code, wherever they are kept."""

    def keys_values(self, context: Tensor) -> Tensor:
        """As :meth:`CrossAttention.keys_values`."""
        return cast(Tensor, _compiled(CrossAttention.keys_values, BACKEND)(self, context))


class CompiledBlock(Block):
    """A block whose call is compiled."""

    cross_attention = CompiledCrossAttention

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        """As :meth:`Block.__call__`."""
        return cast(Tensor, _compiled(Block.__call__, BACKEND)(self, *arguments, **named))


def recorded(method: Call) -> Any:
    """``method`` of tensors, then numbers: compiled, and recorded for each set of shapes and numbers it meets."""

    @functools.wraps(method)
    def call(self: CompiledPlannerModel, *given: Any) -> Any:
        first = next((place for place, x in enumerate(given) if _is_number(x)), len(given))
        return self.run(method, given[:first], given[first:])

    return call


class CompiledPlannerModel(FusedPlannerModel):
    """A WAVTransformer behind :class:`wav.planning.types.PlannerModel`, compiled.

    The first call of every set of shapes compiles, for seconds to minutes. After :data:`SHAPES` of them further ones
    run uncompiled, and the log says so. ConfigError, from the first call: torch cannot compile here.
    """

    compiled = True

    def __init__(self, model: WAVTransformer, shapes: NoiseShapes) -> None:
        super().__init__(model, shapes, block=CompiledBlock)
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._pool: torch.cuda.MemPool | None = None
        self._full = False

    @property
    def records(self) -> bool:
        """Whether calls are recorded as graphs."""
        return bool(self.device.type == "cuda")

    def begin(self, memory: Tensor, text: Tensor, text_mask: Tensor | None, history: Tensor | None) -> FusedContext:
        """As :meth:`TorchPlannerModel.begin`."""
        with _plain_tensors():
            return super().begin(memory, text, text_mask, history)

    text_keys = recorded(FusedPlannerModel.text_keys)
    video_features = recorded(FusedPlannerModel.video_features)
    denoise_video = recorded(FusedPlannerModel.denoise_video)
    denoise_value = recorded(FusedPlannerModel.denoise_value)
    denoise_action = recorded(FusedPlannerModel.denoise_action)

    def run(self, method: Call, arguments: tuple[Any, ...], numbers: tuple[Any, ...]) -> Any:
        """``method(self, *arguments, *numbers)``, compiled and recorded for the shapes of the arguments."""
        name: str = method.__name__
        key = (name, numbers, *(None if x is None else (x.shape, x.dtype) for x in leaves(arguments)))
        with _plain_tensors(), torch.no_grad():
            if key in self._calls:
                return self._calls[key](*arguments)
            if len(self._calls) >= SHAPES:
                if not self._full:
                    log.warning("%s: compiled for %d sets of shapes already; others run uncompiled", name, SHAPES)
                self._full = True
                with torch.compiler.set_stance("force_eager"):
                    return method(self, *arguments, *numbers)
            return self._first(key, lambda *given: method(self, *given, *numbers), arguments)

    def _first(self, key: tuple[Any, ...], call: Call, arguments: tuple[Any, ...]) -> Any:
        """The first call of a set of shapes: it compiles, and is recorded for the next."""
        start = time.perf_counter()
        try:
            found = Recorded(call, arguments, self.device, self._graphs()) if self.records else call
            result = found(*arguments)
        except RuntimeError as error:
            self._pool = None
            reason = " ".join(str(error).split())[:500]
            raise ConfigError(
                f"export.compile = on: {key[0]} cannot be compiled here ({reason}); set it to off"
            ) from error
        self._calls[key] = found
        log.info("%s: compiled for its shapes in %.1f s", key[0], time.perf_counter() - start)
        return result

    def _graphs(self) -> torch.cuda.MemPool:
        """The memory that all recorded graphs share: each one's results are copied before the next is launched."""
        if self._pool is None:
            self._pool = torch.cuda.MemPool()
        return self._pool


class Recorded:
    """A call recorded as a CUDA graph, in memory that graphs of one ``pool`` share.

    It takes tensors of the shapes of ``arguments``, and tuples, lists and dataclasses of them, and gives new ones;
    ``call`` must wait for no number.
    """

    def __init__(self, call: Call, arguments: tuple[Any, ...], device: torch.device, pool: Any) -> None:
        self.arguments = mapped(arguments, lambda x: x.to(device, copy=True))
        self.replay, self.result = capture(lambda: call(*self.arguments), device, pool)

    def __call__(self, *arguments: Any) -> Any:
        """The call's result for other numbers, copied: the next launch writes the graph's own memory again."""
        for kept, given in zip(leaves(self.arguments), leaves(arguments), strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        self.replay()
        return mapped(self.result, torch.clone)


def _plain_tensors() -> torch.inference_mode:
    """Make no inference tensors: compiled code would be compiled again for them, and graphs could not be fed."""
    return torch.inference_mode(False)


def _is_number(x: Any) -> bool:
    """Whether an argument is a number of steps, a noise level, or several levels."""
    return isinstance(x, int | float) or (isinstance(x, tuple) and all(isinstance(level, float) for level in x))
