"""The operations of fused blocks as the kernels of ``kernels.c``, and the planner's model on them.

For float32 inference on a CPU. The source is compiled by the machine's C compiler at first use (about a second, kept in
the user's cache folder by content) and checked against torch; where that does not work, or ``WAV_NATIVE=0``, the reason
is logged and the backend ``torch`` plans: the same up to rounding, slower. Each row's result depends on that row alone,
bit for bit, so rows may be dealt out to threads (:mod:`wav.inference.threads`); a kernel itself runs on its caller's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.code_cache import code_cache
from wav.inference.fused import FusedPlannerModel
from wav.inference.operations import Operations, Product
from wav.model.rope import Rope, token_rope
from wav.planning.types import NoiseShapes

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
VARIABLE = "WAV_NATIVE"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno")
LEAST_LANES = 8  #: below, the processor's vectors are too short for these kernels to be worth it

_Floats, _Count = ctypes.c_void_p, ctypes.c_int64


class _Product(ctypes.Structure):
    _fields_ = [("weight", _Floats), ("bias", _Floats), ("inner", _Count), ("outs", _Count)]


class _Linear(ctypes.Structure):
    _fields_ = [
        *(("x", _Floats), ("rows", _Count)),
        *((name, _Floats) for name in ("scale", "shift")),
        *((name, _Count) for name in ("groups", "cells")),
        *((name, _Product) for name in ("first", "second")),
        *((name, _Floats) for name in ("norms", "rope")),
        *((name, _Count) for name in ("parts", "width", "length")),
        *((name, _Floats) for name in ("residual", "gate")),
        *((name, ctypes.c_float) for name in ("eps", "norm_eps")),
        ("out", _Floats),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Floats) for name in ("query", "key", "value", "mask")),
        *((name, _Count) for name in ("rows", "heads", "queries", "keys", "size")),
        *((f"{name}_{kind}", _Count) for name in ("query", "key", "value") for kind in ("row", "step")),
        ("scale", ctypes.c_float),
        ("out", _Floats),
    ]


class CpuOperations(Operations):
    """:class:`wav.inference.operations.Operations` with what surrounds a product in the same pass over memory."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self.library = library or cast(ctypes.CDLL, _library())

    def product(self, *linears: nn.Linear) -> Product:
        """Weights in the kernels' panels, flat; the bias, or zeros, padded to whole vectors."""
        weight, bias, outs = (found := super().product(*linears)).weight, found.bias, found.outs
        lanes = self.library.wav_lanes()
        padded = F.pad(weight, (0, 0, 0, -outs % lanes))
        panels = [panel.t().reshape(-1) for panel in padded.split(lanes * self.library.wav_wide())]
        zeros = weight.new_zeros(outs) if bias is None else bias
        return Product(torch.cat(panels), F.pad(zeros, (0, -outs % lanes)), outs)

    def rope(self, table: Rope) -> Tensor:
        """Cosine and sine of every pair of channels, side by side (L, D / 2, 2)."""
        cosines, signed = table
        return torch.stack([cosines[:, 1::2], signed[:, 1::2]], -1)

    def linear(
        self,
        x: Tensor,
        product: Product,
        modulation: tuple[Tensor, Tensor, float] | None = None,
        norms: tuple[Tensor, float] | None = None,
        rope: Any = None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Operations.linear`."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], product.outs)
        job = self._job(x, product, out, modulation, residual, gate)
        if norms is not None:
            job.norms, job.norm_eps, (job.parts, job.width) = norms[0].data_ptr(), norms[1], norms[0].shape
        if rope is not None:
            job.rope, job.length = rope.data_ptr(), len(rope)
        self._run(self.library.wav_linear, job)
        return out

    def parts(
        self,
        x: Tensor,
        product: Product,
        norms: tuple[Tensor, float],
        modulation: tuple[Tensor, Tensor, float] | None = None,
        rope: Any = None,
    ) -> tuple[Tensor, ...]:
        """As :meth:`Operations.parts`: they lie side by side."""
        side_by_side = self.linear(x, product, modulation, norms, rope)
        return side_by_side.split(norms[0].shape[-1], -1)  # type: ignore[no-any-return, no-untyped-call]

    def feed_forward(
        self, x: Tensor, modulation: tuple[Tensor, Tensor, float], wide: Product, narrow: Product, gate: Tensor
    ) -> Tensor:
        """As :meth:`Operations.feed_forward`; the inner activations never leave the core's cache."""
        x = x.contiguous()
        out = torch.empty_like(x)
        job = self._job(x, wide, out, modulation, x, gate)
        job.second = self._product(narrow, wide.outs)
        self._run(self.library.wav_linear, job)
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, bounded: bool, mask: Tensor | None = None
    ) -> Tensor:
        """As :meth:`Operations.attend`, without looking for the largest logit, which ``bounded`` makes exact."""
        if not bounded:
            return super().attend(query, key, value, heads, bounded, mask)
        rows, queries, dim = query.shape
        out, keys, size = query.new_empty(rows, queries, dim), key.shape[1], dim // heads
        job = _Attention(rows=rows, heads=heads, queries=queries, keys=keys, size=size, out=out.data_ptr())
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            setattr(job, name, tensor.data_ptr())
            setattr(job, f"{name}_row", tensor.stride(0))
            setattr(job, f"{name}_step", tensor.stride(1))
        mask = None if mask is None else mask.contiguous()
        job.scale, job.mask = 1 / math.log(2) / math.sqrt(size), _address(mask)
        self._run(self.library.wav_attend, job)
        return out

    def _product(self, product: Product, inner: int) -> _Product:
        return _Product(product.weight.data_ptr(), cast(Tensor, product.bias).data_ptr(), inner, product.outs)

    def _job(
        self,
        x: Tensor,
        product: Product,
        out: Tensor,
        modulation: tuple[Tensor, Tensor, float] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> _Linear:
        """What a product and a feed-forward have in common. AdaLN rows are contiguous as fused blocks keep them."""
        inner = x.shape[-1]
        job = _Linear(x=x.data_ptr(), rows=x.numel() // inner, groups=1, cells=1, out=out.data_ptr())
        job.first, job.residual, job.gate = self._product(product, inner), _address(residual), _address(gate)
        if modulation is not None:
            job.shift, job.scale, job.eps = modulation[0].data_ptr(), modulation[1].data_ptr(), modulation[2]
        rows = gate if modulation is None else modulation[0]
        if rows is not None:  # so many AdaLN rows (..., 1 or L, D), of so many consecutive tokens each
            job.groups, job.cells = rows.numel() // rows.shape[-1], x.shape[-2] if rows.shape[-2] == 1 else 1
        return job

    @staticmethod
    def _run(call: ctypes._FuncPointer, job: ctypes.Structure) -> None:  # type: ignore[name-defined]
        if call(ctypes.byref(job)):
            raise MemoryError("CPU kernels: no memory for a row's intermediate results; plan fewer candidates")


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class CpuPlannerModel(FusedPlannerModel):
    """A float32 WAVTransformer behind :class:`wav.planning.types.PlannerModel`, on the CPU kernels."""

    independent_rows = True

    def __init__(self, model: WAVTransformer, shapes: NoiseShapes) -> None:
        super().__init__(model, shapes, CpuOperations())


def available() -> bool:
    """Whether the kernels can be used here; the first call compiles and checks them."""
    return _library() is not None


def description() -> str:
    """What computes float32 inference on this CPU, for records: ``native-16`` (floats in a vector), or ``torch``."""
    library = _library()
    return "torch" if library is None else f"native-{library.wav_lanes()}"


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, checked; None where there are none, and the log says why."""
    if os.environ.get(VARIABLE, "1") == "0":
        log.info("%s=0: planning on a CPU runs on torch's operations", VARIABLE)
        return None
    try:
        with contextlib.ExitStack() as stack:  # a library that is loaded stays so without its file
            place = code_cache() or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wav-kernels-")))
            library = ctypes.CDLL(str(_compiled(place)))
        if (found := library.wav_lanes()) < LEAST_LANES:
            raise RuntimeError(f"the processor's vectors hold {found} floats, fewer than {LEAST_LANES}")
        _check(CpuOperations(library))
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        log.warning("CPU kernels: not used (%s); planning runs on torch's operations, slower", reason)
        return None
    return library


def _compiled(folder: Path) -> Path:
    """The shared library of the source in ``folder``, compiled if it is not there; its name ends in its digest."""
    compiler = os.environ.get("CC", "cc")
    parts = (SOURCE.read_text(), compiler, *FLAGS, platform.machine(), _processor())
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    for found in folder.glob(f"{name}-*.so"):
        if _own(found) and found.name == f"{name}-{_digest(found)}.so":
            return found
        log.warning("%s: is damaged or not ours; compiled again", found)
        found.unlink()
    began = time.perf_counter()
    handle, built = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, str(SOURCE), "-o", built, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{compiler} ended with {done.returncode}: {done.stderr}")
        with open(built, "rb") as file:
            os.fsync(file.fileno())  # after a power cut the name must not stand for an emptied file
        kept = folder / f"{name}-{_digest(Path(built))}.so"
        os.replace(built, kept)  # several processes may compile at once: each leaves a whole file
    finally:
        Path(built).unlink(missing_ok=True)
    log.info("CPU kernels: compiled in %.1f s, kept at %s", time.perf_counter() - began, kept)
    return kept


def _own(library: Path) -> bool:
    """Whether it is a file, no link, of this user's that nobody else may write to.

    The folder says nothing of what was put there while others could: anybody can compute the name.
    """
    found = library.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do: a library compiled for another one must not be loaded from a shared home."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor()
    lines = information.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _check(kernels: CpuOperations) -> None:
    """Raise RuntimeError unless the kernels compute what torch does, on sizes that fill no vector evenly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide, narrow = nn.Linear(20, 60), nn.Linear(60, 20)
    with torch.inference_mode(False), torch.no_grad():
        for parameter in (*wide.parameters(), *narrow.parameters()):
            parameter.copy_(draw(*parameter.shape) / 7)
        x, (shift, scale, gate), norms = draw(2, 7, 20), draw(3, 7, 20), draw(2, 20)
        table = token_rope(20, 7, 5, x.device)
        query, key, value, mask = draw(2, 9, 12), draw(2, 17, 12), draw(2, 17, 12), (draw(2, 17) > 0).float()

        def results(ops: Operations) -> dict[str, Tensor]:
            first, second = ops.product(wide), ops.product(narrow)
            modulation = (shift, scale, 1e-6)
            return {
                "linear": ops.linear(x, first, modulation, (norms, 1e-5), ops.rope(table)),
                "residual": ops.linear(query.new_ones(2, 7, 60), second, residual=x, gate=gate),
                "feed_forward": ops.feed_forward(x, modulation, first, second, gate),
                "attend": ops.attend(query, key, value, 2, True),
                "masked attend": ops.attend(query, key, value, 2, True, mask),
            }

        for (name, ours), wanted in zip(results(kernels).items(), results(Operations()).values(), strict=True):
            if not torch.allclose(ours, wanted, atol=1e-4, rtol=1e-4):
                raise RuntimeError(f"{name}: {float((ours - wanted).abs().max()):.1e} off torch's result")
