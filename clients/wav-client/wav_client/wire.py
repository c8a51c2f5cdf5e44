"""openpi's messages: msgpack, with an array as a map of bytes keys. No objects, hence no pickle."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np


def pack(message: dict[str, Any]) -> bytes:
    """The bytes of a message; ValueError for arrays of objects, complex numbers or records."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """The message of these bytes; its arrays are read-only."""
    return msgpack.unpackb(data, object_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biufUS":
            raise ValueError(f"dtype {value.dtype}: send booleans, integers, floats or strings")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"{type(value).__name__}: cannot be sent")


def _decode(items: dict[Any, Any]) -> Any:
    if b"__ndarray__" in items:
        return np.frombuffer(items[b"data"], np.dtype(items[b"dtype"])).reshape(items[b"shape"])
    if b"__npgeneric__" in items:
        return np.dtype(items[b"dtype"]).type(items[b"data"])
    return items
