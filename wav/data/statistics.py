"""Normalisation: actions and states by quantiles to [-1, 1], values by z-score and symlog.

There is no default: a key without statistics is an error, never the identity. The digest of the statistics travels
with checkpoints, which refuse to run with others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from wav.errors import CheckpointError, DataError, cut, shown
from wav.io.arrays import ShardedArray
from wav.io.files import canonical_digest, read_json, write_json
from wav.io.readers import understood

Mode = Literal["quantile", "zscore_symlog"]
Array = TypeVar("Array", NDArray[Any], torch.Tensor)

#: Spans (q99 - q01, or std) below this count as constant: their scale is 1, so that a value stays near 0 and the
#: inverse stays exact, instead of dividing by (nearly) zero. Units are the dimension's own (m, rad, action).
CONSTANT_SPAN = 1e-4
_BLOCK = 2**20  # rows
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyStatistics:
    """Statistics of one key over ``count`` rows; every tuple has one entry per dimension."""

    mode: Mode
    count: int
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]

    @property
    def dimension(self) -> int:
        """Number of dimensions D."""
        return len(self.mean)

    def check(self) -> None:
        """ValueError or TypeError where this is not what :func:`compute_statistics` gives: NaN would reach a robot."""
        if self.mode not in ("quantile", "zscore_symlog"):
            raise ValueError(f"mode = {shown(self.mode)}: unknown")
        for name in ("q01", "q99", "mean", "std", "min", "max"):
            row = getattr(self, name)
            if len(row) != self.dimension or not row or not all(type(x) in (int, float) and isfinite(x) for x in row):
                raise ValueError(f"{name} = {shown(row)}: must be {self.dimension} finite numbers")
        for low, high in (("q01", "q99"), ("min", "max")):
            if any(a > b for a, b in zip(getattr(self, low), getattr(self, high), strict=True)):
                raise ValueError(f"{low} is above {high}")
        if min(self.std) < 0 or type(self.count) is not int or self.count < 1:
            raise ValueError(f"std = {shown(self.std)}, count = {shown(self.count)}: must not be negative")

    @cached_property
    def _affine(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(centre, scale), each (D,): the linear part is (x - centre) / scale."""
        if self.mode == "quantile":
            low, high = np.array(self.q01), np.array(self.q99)
            centre, scale, span = (low + high) / 2, (high - low) / 2, high - low
        else:
            centre, scale = np.array(self.mean), np.array(self.std)
            span = scale
        return centre, np.where(span < CONSTANT_SPAN, 1.0, scale)

    def normalize(self, x: Array) -> Array:
        """Normalise x (..., D): "quantile" maps [q01, q99] to [-1, 1], "zscore_symlog" is symlog((x - mean) / std)."""
        centre, scale = self._constants(x)
        z: Array = (x - centre) / scale
        return z if self.mode == "quantile" else symlog(z)

    def denormalize(self, y: Array) -> Array:
        """Exact inverse of :meth:`normalize`."""
        centre, scale = self._constants(y)
        z: Array = y if self.mode == "quantile" else symexp(y)
        x: Array = z * scale + centre
        return x

    def _constants(self, x: Any) -> tuple[Any, Any]:
        """Centre and scale as the type, device and precision of ``x``."""
        if x.shape[-1] != self.dimension:
            raise DataError(
                f"statistics: {x.shape[-1]} dimensions where they hold {self.dimension}; "
                "use the statistics made with this data"
            )
        if isinstance(x, torch.Tensor):
            kind = x.dtype if x.dtype.is_floating_point else torch.float32
            first, second = (torch.as_tensor(c, dtype=kind, device=x.device) for c in self._affine)
            return first, second
        dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float32)
        return self._affine[0].astype(dtype), self._affine[1].astype(dtype)


def symlog(x: Array) -> Array:
    """sign(x) log(1 + |x|)."""
    if isinstance(x, torch.Tensor):
        return torch.sign(x) * torch.log1p(torch.abs(x))
    return np.asarray(np.sign(x) * np.log1p(np.abs(x)))


def symexp(x: Array) -> Array:
    """Inverse of :func:`symlog`."""
    if isinstance(x, torch.Tensor):
        return torch.sign(x) * torch.expm1(torch.abs(x))
    return np.asarray(np.sign(x) * np.expm1(np.abs(x)))


def compute_statistics(rows: NDArray[Any] | ShardedArray, mode: Mode, name: str = "statistics") -> KeyStatistics:
    """Statistics of rows (N, D) in double precision, block by block; DataError where a value is not finite."""
    if len(rows.shape) != 2 or not len(rows):
        raise DataError(f"{name}: no rows to take statistics of (shape {rows.shape}); ingest at least one episode")
    count = len(rows)
    blocks = [slice(start, start + _BLOCK) for start in range(0, count, _BLOCK)]
    odd = sum(int((~np.isfinite(rows[block])).sum()) for block in blocks)
    if odd:
        raise DataError(f"{name}: {odd} values are NaN or infinite; repair the source")
    total = _sum(rows[block].astype(np.float64) for block in blocks)
    mean = total / count
    spread = _sum((rows[block].astype(np.float64) - mean) ** 2 for block in blocks)
    columns: dict[str, list[float]] = {"mean": mean.tolist(), "std": np.sqrt(spread / count).tolist()}
    for dimension in range(rows.shape[1]):
        column = np.empty(count)
        for block in blocks:
            column[block] = rows[block][:, dimension]
        found = (column.min(), column.max(), *np.quantile(column, (0.01, 0.99), overwrite_input=True))
        for key, value in zip(("min", "max", "q01", "q99"), found, strict=True):
            columns.setdefault(key, []).append(float(value))
    result = KeyStatistics(mode=mode, count=count, **{key: tuple(c) for key, c in columns.items()})
    extreme = np.abs(result.normalize(np.stack([result.min, result.max]))).max(0)
    if mode == "quantile" and (extreme > 10).any():
        worst = int(extreme.argmax())
        _LOG.warning(
            "%s: dimension %d reaches %.0f times its 1-99 %% range; rare large values dominate its loss",
            name,
            worst,
            extreme[worst],
        )
    return result


def _sum(blocks: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """(D,) sum over the rows (n, D) of all blocks, added one after the other as NumPy does it for a single block."""
    total: NDArray[np.float64] | None = None
    for block in blocks:
        total = np.add.reduce(block if total is None else np.concatenate([total[None], block]), axis=0)
    assert total is not None
    return total


@dataclass(frozen=True)
class Statistics:
    """Statistics by key: "action", "state", "value"."""

    keys: Mapping[str, KeyStatistics]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return canonical_digest(self.to_json())

    def key(self, name: str) -> KeyStatistics:
        """Statistics of one key; DataError where there are none."""
        if name not in self.keys:
            raise DataError(
                f"statistics: no key {name!r} among {', '.join(sorted(self.keys)) or 'none'}; "
                "action and state come from ingest, value from label_rewards"
            )
        return self.keys[name]

    def normalize_actions(self, x: Array) -> Array:
        """Actions (..., A) to [-1, 1] by q01/q99."""
        return self.key("action").normalize(x)

    def denormalize_actions(self, y: Array) -> Array:
        """Inverse of :meth:`normalize_actions`."""
        return self.key("action").denormalize(y)

    def normalize_state(self, x: Array) -> Array:
        """States (..., S) to [-1, 1] by q01/q99."""
        return self.key("state").normalize(x)

    def normalize_values(self, x: Array) -> Array:
        """Values (..., Cv): symlog of the z-score."""
        return self.key("value").normalize(x)

    def denormalize_values(self, y: Array) -> Array:
        """Inverse of :meth:`normalize_values`."""
        return self.key("value").denormalize(y)

    def merged(self, *others: Statistics) -> Statistics:
        """The keys of all; DataError where two hold different statistics of one key."""
        keys = dict(self.keys)
        for other in others:
            for name, value in other.keys.items():
                if keys.setdefault(name, value) != value:
                    raise DataError(f"statistics: two different sets for key {name!r}; use those of one dataset")
        return Statistics(keys)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}
            for name, value in self.keys.items()
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str = "statistics") -> Statistics:
        """Inverse of :meth:`to_json`; DataError names the key of ``source`` that is malformed."""
        keys = {}
        for name, value in raw.items():
            with understood(f"{source}: {cut(name)}", "make the statistics again"):
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
                keys[name] = KeyStatistics(**fields)
                keys[name].check()
        return cls(keys)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path, remedy: str = "run `dvc repro`") -> Statistics:
        """Read what :meth:`save` wrote; DataError where it is missing or malformed."""
        raw = read_json(path, remedy)
        if not isinstance(raw, dict):
            raise DataError(f"{path}: holds {type(raw).__name__} where statistics by key are expected; {remedy}")
        return cls.from_json(raw, str(path))


def check_statistics(expected: str, found: str, where: str) -> None:
    """CheckpointError for normalisation statistics other than the ones a checkpoint was trained with."""
    if expected != found:
        raise CheckpointError(
            f"{where}: statistics digest {found[:12]} does not match the checkpoint's {expected[:12]}; "
            "use the statistics the model was trained with, or train again on the new data"
        )
