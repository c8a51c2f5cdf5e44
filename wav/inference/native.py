"""The kernels of ``native.c`` as torch operations ``wav::linear``, ``wav::feed`` and ``wav::attend``.

For float32 inference on a CPU. The source is compiled by the machine's C compiler at first use (about a second, kept in
the user's cache folder by content) and checked against torch; where that does not work, or ``WAV_NATIVE=0``, the
reason is logged and :mod:`wav.inference.products` computes with torch's own operations: the same up to rounding,
slower.
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
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
HEADER = Path(__file__).with_name("native.h")
VARIABLE = "WAV_NATIVE"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
LEAST_LANES = 8  #: below, the processor's vectors are too short for these kernels to be worth it
SPREAD = 1 << 24  #: operations that are worth a thread of their own
LOG2E = math.log2(math.e)

_Floats, _Count = ctypes.c_void_p, ctypes.c_int64
_wanted: ContextVar[int] = ContextVar("wav_kernel_threads", default=0)  # 0: as torch has them


class _Product(ctypes.Structure):
    _fields_ = [("weight", _Floats), ("bias", _Floats), ("inner", _Count), ("outs", _Count)]


class _Linear(ctypes.Structure):
    _fields_ = [
        ("x", _Floats),
        ("rows", _Count),
        ("step", _Count),
        ("scale", _Floats),
        ("shift", _Floats),
        ("groups", _Count),
        ("cells", _Count),
        ("first", _Product),
        ("second", _Product),
        ("norms", _Floats),
        ("rope", _Floats),
        ("parts", _Count),
        ("width", _Count),
        ("length", _Count),
        ("residual", _Floats),
        ("gate", _Floats),
        ("eps", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("out", _Floats),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Floats) for name in ("query", "key", "value")),
        *((name, _Count) for name in ("rows", "heads", "queries", "keys", "size")),
        *((f"{name}_{kind}", _Count) for name in ("query", "key", "value") for kind in ("row", "step")),
        ("scale", ctypes.c_float),
        ("out", _Floats),
    ]


def available() -> bool:
    """Whether the kernels can be used here; the first call compiles and checks them."""
    return _library() is not None


def description() -> str:
    """What computes float32 inference on this CPU, for records: ``native-16`` (floats in a vector), or ``torch``."""
    library = _library()
    return "torch" if library is None else f"native-{library.wav_lanes()}"


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels of inference, checked; None where there are none."""
    return load("inference", (SOURCE,), "wav_lanes", _check)


def load(purpose: str, sources: Sequence[Path], lanes: str, check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """The kernels of ``purpose``, compiled and checked; None where there are none, and the log says why.

    Args:
        purpose: inference or training, for the log.
        sources: their C sources.
        lanes: name of the function that says how many floats a vector holds.
        check: raises RuntimeError where they compute something else than torch.
    """
    if os.environ.get(VARIABLE, "1") == "0":
        log.info("%s=0: CPU %s runs on torch's operations", VARIABLE, purpose)
        return None
    try:
        library = ctypes.CDLL(str(compiled(*sources)))
        if (found := library[lanes]()) < LEAST_LANES:
            raise RuntimeError(f"the processor's vectors hold {found} floats, fewer than {LEAST_LANES}")
        check(library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        log.warning("CPU kernels of %s: not used (%s); it runs on torch's operations, slower", purpose, reason)
        return None
    return library


def compiled(*sources: Path) -> Path:
    """The shared library of C sources, compiled if it is not there."""
    compiler = os.environ.get("CC", "cc")
    parts = (*(path.read_text() for path in (HEADER, *sources)), compiler, *FLAGS, platform.machine(), _processor())
    name = f"{sources[0].stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wav"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="wav-native-"))
    if (folder / name).is_file():
        return folder / name
    began = time.perf_counter()
    handle, built = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, f"-I{HEADER.parent}", *map(str, sources), "-o", built, "-lm"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(f"{compiler} ended with {done.returncode}: {done.stderr}")
        os.replace(built, folder / name)  # several processes may compile at once: each leaves a whole file
    finally:
        Path(built).unlink(missing_ok=True)
    log.info("CPU kernels: compiled in %.1f s, kept at %s", time.perf_counter() - began, folder / name)
    return folder / name


def _processor() -> str:
    """What the processor can do: a library compiled for another one must not be loaded from a shared home."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor()
    lines = information.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Run this thread's kernels on up to ``count`` threads, and torch's own operations on this thread alone.

    Torch's OpenMP threads spin after each operation, on the cores that the kernels' threads need.
    """
    before, token = torch.get_num_threads(), _wanted.set(count)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _wanted.reset(token)


def threads() -> int:
    """Threads that a kernel may use: those of :func:`on_threads`, or torch's."""
    return _wanted.get() or torch.get_num_threads()


def threads_for(operations: float) -> int:
    """Threads that a kernel of so many operations is worth."""
    return max(1, min(threads(), int(operations / SPREAD)))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _run(call: Any, job: ctypes.Structure, operations: float) -> None:
    if call(ctypes.byref(job), threads_for(operations)):
        raise MemoryError("CPU kernels: no memory for a row's intermediate results; free some or plan fewer candidates")


def pack(weight: Tensor, bias: Tensor | None, library: ctypes.CDLL | None = None) -> tuple[Tensor, Tensor]:
    """Weight (outs, in) in the kernels' panels, flat, and its bias (or zeros), padded to whole vectors."""
    library = library or cast(ctypes.CDLL, _library())
    lanes = library.wav_lanes()
    padded = F.pad(weight.detach(), (0, 0, 0, -len(weight) % lanes))
    panels = [panel.t().reshape(-1) for panel in padded.split(lanes * library.wav_wide())]
    zeros = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    return torch.cat(panels), F.pad(zeros, (0, -len(weight) % lanes))


def _groups(rows: Tensor, x: Tensor) -> tuple[int, int]:
    """Number of AdaLN rows (..., 1 or L, D), and how many consecutive tokens of ``x`` (..., L, D) share each."""
    return rows.numel() // rows.shape[-1], x.shape[-2] if rows.shape[-2] == 1 else 1


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    outs: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 0.0,
    norms: Tensor | None = None,
    norm_eps: float = 0.0,
    rope: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    library: ctypes.CDLL | None = None,
) -> Tensor:
    """See ``linear`` in :data:`_SCHEMAS`."""
    x = x.contiguous()
    rows, inner = x.numel() // x.shape[-1], x.shape[-1]
    out = x.new_empty(*x.shape[:-1], outs)
    job = _Linear(x=x.data_ptr(), rows=rows, step=inner, groups=1, cells=1, eps=eps, out=out.data_ptr())
    job.first = _Product(weight.data_ptr(), bias.data_ptr(), inner, outs)
    kept = [t if t is None else t.contiguous() for t in (shift, scale, norms, residual, gate)]
    job.shift, job.scale, job.norms, job.residual, job.gate = map(_address, kept)
    modulation = scale if gate is None else gate
    if modulation is not None:
        job.groups, job.cells = _groups(modulation, x)
    if norms is not None:
        job.parts, job.width, job.norm_eps = len(norms), norms.shape[-1], norm_eps
    if rope is not None:
        job.rope, job.length = rope.data_ptr(), len(rope)
    _run((library or cast(ctypes.CDLL, _library())).wav_linear, job, 2 * rows * inner * outs)
    return out


def _feed(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    wide: Tensor,
    wide_bias: Tensor,
    inner: int,
    narrow: Tensor,
    narrow_bias: Tensor,
    gate: Tensor,
    library: ctypes.CDLL | None = None,
) -> Tensor:
    """See ``feed`` in :data:`_SCHEMAS`."""
    x = x.contiguous()
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    out = torch.empty_like(x)
    job = _Linear(x=x.data_ptr(), rows=rows, step=dim, residual=x.data_ptr(), eps=eps, out=out.data_ptr())
    job.first = _Product(wide.data_ptr(), wide_bias.data_ptr(), dim, inner)
    job.second = _Product(narrow.data_ptr(), narrow_bias.data_ptr(), inner, dim)
    kept = [t.contiguous() for t in (shift, scale, gate)]
    job.shift, job.scale, job.gate = map(_address, kept)
    job.groups, job.cells = _groups(scale, x)
    _run((library or cast(ctypes.CDLL, _library())).wav_linear, job, 4 * rows * dim * inner)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, library: ctypes.CDLL | None = None) -> Tensor:
    """See ``attend`` in :data:`_SCHEMAS`."""
    rows, queries, dim = query.shape
    out = query.new_empty(rows, queries, dim)
    size, keys = dim // heads, key.shape[1]
    job = _Attention(rows=rows, heads=heads, queries=queries, keys=keys, size=size, out=out.data_ptr())
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        setattr(job, name, tensor.data_ptr())
        setattr(job, f"{name}_row", tensor.stride(0))
        setattr(job, f"{name}_step", tensor.stride(1))
    job.scale = LOG2E / math.sqrt(size)
    _run((library or cast(ctypes.CDLL, _library())).wav_attend, job, 4 * rows * queries * keys * dim)
    return out


#: x, residual and results are (..., L, D); weights and biases as :func:`pack` gives them.
#: linear: residual + gate * ((RMS(x) * scale + shift) W + b), each where given; shift, scale and gate are AdaLN rows
#: (..., 1 or L, D) that repeat over x's leading dimensions. norms (parts, width): weights of the RMS norms of the
#: result's first parts, which rope (L, width / 2) complex then rotates.
#: feed: x + gate * (GELU((RMS(x) * scale + shift) wide + b) narrow + b).
#: attend: attention of query (rows, Lq, D) on key and value (rows, Lk, D), heads side by side, last dimension adjacent,
#: without looking for the largest logit: every logit, as a power of two, must be below 126.
_SCHEMAS = (
    "linear(Tensor x, Tensor weight, Tensor bias, int outs, Tensor? shift=None, Tensor? scale=None, float eps=0.0, "
    "Tensor? norms=None, float norm_eps=0.0, Tensor? rope=None, Tensor? residual=None, Tensor? gate=None) -> Tensor",
    "feed(Tensor x, Tensor shift, Tensor scale, float eps, Tensor wide, Tensor wide_bias, int inner, Tensor narrow, "
    "Tensor narrow_bias, Tensor gate) -> Tensor",
    "attend(Tensor query, Tensor key, Tensor value, int heads) -> Tensor",
)
_registry = torch.library.Library("wav", "DEF")
for _schema, _kernel in zip(_SCHEMAS, (_linear, _feed, _attend), strict=True):
    _registry.define(_schema)
    _registry.impl(_schema.split("(")[0], _kernel, "CPU")
linear: Callable[..., Tensor] = torch.ops.wav.linear.default
feed: Callable[..., Tensor] = torch.ops.wav.feed.default
attend: Callable[..., Tensor] = torch.ops.wav.attend.default


@register_flop_formula(torch.ops.wav.linear)
def _linear_flops(x: Sequence[int], weight: object, bias: object, outs: int, *_: object, **__: object) -> int:
    """Operations of ``linear``, for torch's counter; shapes for tensors."""
    return 2 * math.prod(x) * outs


@register_flop_formula(torch.ops.wav.feed)
def _feed_flops(x: Sequence[int], *rest: Any, **_: object) -> int:
    """Operations of ``feed``; the inner width is its seventh argument."""
    return int(4 * math.prod(x) * rest[5])


@register_flop_formula(torch.ops.wav.attend)
def _attend_flops(query: Sequence[int], key: Sequence[int], *_: object, **__: object) -> int:
    """Operations of ``attend``."""
    return 4 * math.prod(query) * key[1]


def _check(library: ctypes.CDLL) -> None:
    """Raise RuntimeError unless the kernels compute what torch does, on sizes that fill no vector evenly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, wide, narrow, rows, bias = draw(2, 7, 20), draw(50, 20) / 4, draw(20, 50) / 7, draw(3, 7, 20), draw(50)
    modulated = rows[0] + F.rms_norm(x, (20,), None, 1e-6) * rows[1]
    hidden = F.linear(modulated, wide, bias)
    fed = x + rows[2] * F.linear(F.gelu(hidden, approximate="tanh"), narrow)
    parts = (*pack(wide, bias, library), 50, *pack(narrow, None, library))
    query, key, value = draw(2, 9, 12), draw(2, 17, 12), draw(2, 17, 12)
    q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in (query, key, value))
    read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found = {
        "linear": (_linear(x, *parts[:3], rows[0], rows[1], 1e-6, library=library), hidden),
        "feed": (_feed(x, rows[0], rows[1], 1e-6, *parts, rows[2], library=library), fed),
        "attend": (_attend(query, key, value, 2, library), read),
    }
    for name, (ours, wanted) in found.items():
        if not torch.allclose(ours, wanted, atol=1e-4, rtol=1e-4):
            raise RuntimeError(f"{name}: {float((ours - wanted).abs().max()):.1e} off torch's result")
