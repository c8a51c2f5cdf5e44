"""The kernels of ``training*.c`` as torch operations: what a block's forward and backward passes are made of.

For float32 training on a CPU (inference takes its masked attention from here too); :mod:`wav.model.kernels` puts them
under autograd. Compiled at first use like those of :mod:`wav.inference.native`, and checked against torch's own
gradients;
where that does not work, or ``WAV_NATIVE=0``, the reason is logged and training runs on torch's operations: the same up
to rounding, slower.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from wav.inference import native
from wav.inference.native import LOG2E, threads_for

SOURCES = tuple(Path(__file__).with_name(name) for name in ("training.c", "training_rows.c", "training_attention.c"))
LARGEST_VECTOR = 16  #: floats that the packed columns of a product are padded to at most
BLOCK = 64  #: rows whose shares of a norm weight's gradient are summed apart (BLOCK of training_rows.c)


def _structure(name: str, **kinds: str) -> type[ctypes.Structure]:
    """A C structure of pointers, counts and reals, in order; ``kinds`` maps the kind, numbered, to names."""
    types = {"floats": ctypes.c_void_p, "counts": ctypes.c_int64, "real": ctypes.c_float}
    fields = [(field, types[kind.rstrip("0123456789")]) for kind, names in kinds.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Product = _structure(
    "_Product", floats="a b bias residual slope", counts="rows inner outs turned gelu", floats2="panels out"
)
_Gradient = _structure("_Gradient", floats="grad x", counts="rows outs inner gelu tiles", floats2="weight bias")
_Modulation = _structure(
    "_Modulation",
    floats="x shift scale",
    counts="groups cells width step",
    real="eps",
    floats2="inverse out grad grad_x grad_shift grad_scale",
)
_Gating = _structure(
    "_Gating", floats="residual x gate", counts="groups cells width step", floats2="out grad grad_x grad_gate"
)
_Norm = _structure(
    "_Norm",
    floats="x weight rope",
    counts="rows width length",
    real="eps",
    floats2="inverse out grad grad_x grad_weight partial",
)
_Attention = _structure(
    "_Attention",
    floats="query",
    counts="query_row query_head query_step",
    floats2="key",
    counts2="key_row key_head key_step",
    floats3="value",
    counts3="value_row value_head value_step",
    floats4="bias",
    counts4="rows heads queries keys size",
    real="scale",
    floats5="statistics out grad grad_query grad_key grad_value",
)


class Kernels:
    """The compiled functions, on tensors: float32 on a CPU. Results are new and contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def _run(self, name: str, job: ctypes.Structure, operations: float, **values: Tensor | float | None) -> None:
        for field, value in values.items():
            setattr(job, field, value.data_ptr() if isinstance(value, Tensor) else value)
        if getattr(self.library, f"wav_{name}")(ctypes.byref(job), threads_for(operations)):
            raise MemoryError("CPU kernels: no memory for intermediate results; free some or train on smaller batches")

    def product(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        slope: Tensor | None = None,
        turned: bool = False,
        gelu: bool = False,
    ) -> Tensor:
        """``a`` (..., inner), or its GELU, times ``b`` (inner, outs), or (outs, inner) where ``turned``.

        Then times GELU'(``slope``), plus ``bias`` (outs) and ``residual``; both are (..., outs) like the result.
        """
        a, b = a.contiguous(), b.contiguous()
        residual, slope = (None if x is None else x.contiguous() for x in (residual, slope))
        inner, outs = (b.shape[1], b.shape[0]) if turned else b.shape
        out = a.new_empty(*a.shape[:-1], outs)
        panels = a.new_empty(inner * -(-outs // LARGEST_VECTOR) * LARGEST_VECTOR)
        rows = a.numel() // inner
        job = _Product(rows=rows, inner=inner, outs=outs, turned=turned, gelu=gelu)
        self._run("product", job, 2 * rows * inner * outs, a=a, b=b, bias=bias, residual=residual, slope=slope,
                  panels=panels, out=out)  # fmt: skip
        return out

    def product_gradient(self, grad: Tensor, x: Tensor, bias: bool, gelu: bool = False) -> tuple[Tensor, Tensor]:
        """Gradients of a linear's weight (outs, inner) and bias (outs; empty unless wanted) on ``x`` or its GELU."""
        grad, x = grad.contiguous(), x.contiguous()
        outs, inner = grad.shape[-1], x.shape[-1]
        rows = x.numel() // inner
        weight, sums = grad.new_empty(outs, inner), grad.new_empty(outs if bias else 0)
        self._run("gradient", _Gradient(rows=rows, outs=outs, inner=inner, gelu=gelu), 2 * rows * inner * outs,
                  grad=grad, x=x, weight=weight, bias=sums if bias else None)  # fmt: skip
        return weight, sums

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMS(x) * (1 + scale) + shift, and the inverses (rows) of the root mean squares.

        ``shift`` and ``scale`` (..., 1 or L, D) have the leading dimensions of ``x`` (..., L, D).
        """
        x = x.contiguous()
        shift, scale = _vectors(shift, scale)
        out, inverse = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
        self._run("modulate", _rows(_Modulation, x, scale, eps=eps), 8 * x.numel(),
                  x=x, shift=shift, scale=scale, inverse=inverse, out=out)  # fmt: skip
        return out, inverse

    def modulate_backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, shift and scale."""
        grad, x = grad.contiguous(), x.contiguous()
        (vectors,) = _vectors(scale)
        grad_x, grad_shift, grad_scale = torch.empty_like(x), x.new_empty(scale.shape), x.new_empty(scale.shape)
        self._run("modulate", _rows(_Modulation, x, vectors), 16 * x.numel(), x=x, scale=vectors, inverse=inverse,
                  grad=grad, grad_x=grad_x, grad_shift=grad_shift, grad_scale=grad_scale)  # fmt: skip
        return grad_x, grad_shift, grad_scale

    def gate(self, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Residual + x * gate; ``gate`` as ``shift`` of :meth:`modulate`."""
        residual, x = residual.contiguous(), x.contiguous()
        (vectors,) = _vectors(gate)
        out = torch.empty_like(x)
        self._run("gate", _rows(_Gating, x, vectors), 4 * x.numel(), residual=residual, x=x, gate=vectors, out=out)
        return out

    def gate_backward(self, grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and the gate."""
        grad, x = grad.contiguous(), x.contiguous()
        (vectors,) = _vectors(gate)
        grad_x, grad_gate = torch.empty_like(x), x.new_empty(gate.shape)
        self._run("gate", _rows(_Gating, x, vectors), 8 * x.numel(),
                  x=x, gate=vectors, grad=grad, grad_x=grad_x, grad_gate=grad_gate)  # fmt: skip
        return grad_x, grad_gate

    def norm(self, x: Tensor, weight: Tensor, eps: float, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """RMS norm of ``x`` (..., D), then rotation by ``rope`` (L, D / 2) complex; and the rows' inverses."""
        x = x.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
        self._run("norm", _positions(x, rope, eps), 8 * x.numel(),
                  x=x, weight=weight, rope=rope, inverse=inverse, out=out)  # fmt: skip
        return out, inverse

    def norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, rope: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and the weight."""
        grad, x = grad.contiguous(), x.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        partial = x.new_empty(-(-inverse.numel() // BLOCK) * x.shape[-1])
        self._run("norm", _positions(x, rope), 16 * x.numel(), x=x, weight=weight, rope=rope, inverse=inverse,
                  grad=grad, grad_x=grad_x, grad_weight=grad_weight, partial=partial)  # fmt: skip
        return grad_x, grad_weight

    def attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention (rows, Lq, heads * size) of (rows, heads, Lq or Lk, size), and what its gradient needs.

        ``bias`` (rows, 1, 1, Lk) is added to the logits.
        """
        rows, heads, queries, size = query.shape
        out, statistics = query.new_empty(rows, queries, heads * size), query.new_empty(rows, heads, 2, queries)
        job, kept = _operands(query, key, value, bias)
        self._run("attention", job, 4 * query.numel() * key.shape[2], statistics=statistics, out=out)
        del kept
        return out, statistics

    def attention_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        out: Tensor,
        statistics: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, with heads side by side in memory."""
        grad, out = grad.contiguous(), out.contiguous()
        rows, heads, _, size = query.shape
        sides = [query.new_empty(rows, x.shape[2], heads, size) for x in (query, key, value)]
        job, kept = _operands(query, key, value, bias)
        self._run("attention", job, 10 * query.numel() * key.shape[2], statistics=statistics, out=out, grad=grad,
                  grad_query=sides[0], grad_key=sides[1], grad_value=sides[2])  # fmt: skip
        del kept
        first, second, third = (side.transpose(1, 2) for side in sides)
        return first, second, third


def _vectors(*rows: Tensor) -> list[Tensor]:
    """AdaLN rows (..., D) as (groups, D), each row adjacent and all equally far apart (views where they are)."""
    flat = [r.reshape(-1, r.shape[-1]) for r in rows]
    apart = {r.stride(0) for r in flat}
    return flat if len(apart) == 1 and all(r.stride(1) == 1 for r in flat) else [r.contiguous() for r in flat]


def _rows(kind: type[ctypes.Structure], x: Tensor, vectors: Tensor, **values: float) -> ctypes.Structure:
    """A job of rows ``x`` (..., D) that share the ``vectors`` (groups, D)."""
    groups, width = vectors.shape
    return kind(groups=groups, cells=x.numel() // (groups * width), width=width, step=vectors.stride(0), **values)


def _positions(x: Tensor, rope: Tensor | None, eps: float = 0.0) -> ctypes.Structure:
    """A norm's job on rows ``x`` (..., D)."""
    width = x.shape[-1]
    return _Norm(rows=x.numel() // width, width=width, length=1 if rope is None else len(rope), eps=eps)


def _operands(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[ctypes.Structure, tuple[Tensor | None, ...]]:
    """Attention's job, and the tensors that must live as long."""
    rows, heads, queries, size = query.shape
    job = _Attention(rows=rows, heads=heads, queries=queries, keys=key.shape[2], size=size)
    job.scale = LOG2E / math.sqrt(size)
    kept = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    for name, x in zip(("query", "key", "value"), kept, strict=True):
        setattr(job, name, x.data_ptr())
        for kind, stride in zip(("row", "head", "step"), x.stride(), strict=False):
            setattr(job, f"{name}_{kind}", stride)
    flat = None if bias is None else bias.expand(rows, 1, 1, -1).contiguous()
    job.bias = None if flat is None else flat.data_ptr()
    return job, (*kept, flat)


def available() -> bool:
    """Whether the kernels can be used here; the first call compiles and checks them."""
    return kernels() is not None


def description() -> str:
    """What computes float32 training on this CPU, for records: ``native-16`` (floats in a vector), or ``torch``."""
    found = kernels()
    return "torch" if found is None else f"native-{found.library.wav_training_lanes()}"


def both() -> str:
    """What computes float32 on this CPU, inference's kernels and these: one word where they are alike, for records."""
    inference, training = native.description(), description()
    return inference if inference == training else f"{inference} and {training}"


@functools.cache
def kernels() -> Kernels | None:
    """The compiled kernels, checked; None where there are none."""
    from wav.inference.native_check import check

    library = native.load("training", SOURCES, "wav_training_lanes", lambda found: check(Kernels(found)))
    return None if library is None else Kernels(library)


#: Signatures of the methods of :class:`Kernels` as torch operations, so that profilers and counters see them.
_SCHEMAS = (
    "product(Tensor a, Tensor b, Tensor? bias=None, Tensor? residual=None, Tensor? slope=None, bool turned=False, "
    "bool gelu=False) -> Tensor",
    "product_gradient(Tensor grad, Tensor x, bool bias, bool gelu=False) -> (Tensor, Tensor)",
    "modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    "modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor inverse) -> (Tensor, Tensor, Tensor)",
    "gate(Tensor residual, Tensor x, Tensor gate) -> Tensor",
    "gate_backward(Tensor grad, Tensor x, Tensor gate) -> (Tensor, Tensor)",
    "norm(Tensor x, Tensor weight, float eps, Tensor? rope) -> (Tensor, Tensor)",
    "norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, Tensor? rope) -> (Tensor, Tensor)",
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias) -> (Tensor, Tensor)",
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, "
    "Tensor statistics) -> (Tensor, Tensor, Tensor)",
)
_registry = torch.library.Library("wav", "FRAGMENT")


def _register(schema: str) -> None:
    name = schema.split("(")[0]

    def kernel(*arguments: Any) -> Any:
        return getattr(kernels(), name)(*arguments)

    _registry.define(schema)
    _registry.impl(name, kernel, "CPU")


for _schema in _SCHEMAS:
    _register(_schema)


@register_flop_formula(torch.ops.wav.product)
def _product_flops(a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Operations of ``product``, for torch's counter; shapes for tensors."""
    return 2 * math.prod(a) // a[-1] * math.prod(b)


@register_flop_formula(torch.ops.wav.product_gradient)
def _gradient_flops(grad: Sequence[int], x: Sequence[int], *_: object, **__: object) -> int:
    """Operations of ``product_gradient``."""
    return 2 * math.prod(grad) * x[-1]


@register_flop_formula(torch.ops.wav.attention)
def _attention_flops(query: Sequence[int], key: Sequence[int], *_: object, **__: object) -> int:
    """Operations of ``attention``."""
    return 4 * math.prod(query) * key[2]


@register_flop_formula(torch.ops.wav.attention_backward)
def _attention_backward_flops(grad: object, query: Sequence[int], key: Sequence[int], *_: object, **__: object) -> int:
    """Operations of ``attention_backward``: four products; that logits are computed again does not count."""
    return 8 * math.prod(query) * key[2]
