"""Messages of openpi's protocol: msgpack, with arrays as maps of bytes keys. What is read comes from anybody.

An array is ``{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}``, a NumPy number
``{b"__npgeneric__": True, b"data": 1.0, b"dtype": "<f4"}``. Only booleans, integers, floats and strings are read:
objects would need a pickle. Sizes are checked before anything is allocated for them.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from wav.errors import DataError

MAX_CONTAINERS = 256  #: Maps and lists of one message, arrays and numbers included: each costs more than its bytes.
MAX_DIMENSIONS = 8
_LIMITS = {"max_array_len": 1024, "max_map_len": 64, "max_str_len": 1 << 16, "max_ext_len": 0}
_DTYPE = re.compile(r"[<>|=]?[biufUS][0-9]{1,4}")


def pack(message: dict[str, Any]) -> bytes:
    """The bytes of a message whose values are arrays, numbers, strings, lists and maps."""
    return bytes(msgpack.packb(message, default=_encode))


def unpack(data: bytes) -> dict[str, Any]:
    """The map that a message holds, with read-only arrays.

    Raises:
        DataError: it is not msgpack, not a map, too nested, or holds an array that is none.
    """
    containers = 0

    def count() -> None:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise DataError(f"message: more than {MAX_CONTAINERS} maps and lists; send one observation as a flat map")

    def lists(items: list[Any]) -> list[Any]:
        count()
        return items

    def maps(items: dict[Any, Any]) -> Any:
        count()
        return _decode(items)

    try:
        message = msgpack.unpackb(data, object_hook=maps, list_hook=lists, max_bin_len=len(data), **_LIMITS)
    except DataError:
        raise
    except Exception as error:  # whatever msgpack or NumPy makes of bytes that nobody meant to be a message
        raise DataError(
            f"message: {type(error).__name__} while reading msgpack; send a map packed by openpi-client"
        ) from None
    if not isinstance(message, dict):
        raise DataError(f"message: {type(message).__name__} where an observation is expected; send a map")
    return message


def _encode(value: Any) -> dict[bytes, Any]:
    """Openpi's form of an array or of a NumPy number."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__}: is not part of the protocol")


def _decode(items: dict[Any, Any]) -> Any:
    """The array or number that a map stands for, or the map itself."""
    if b"__ndarray__" in items:
        dtype, data, shape = _dtype(items), items.get(b"data"), items.get(b"shape")
        if not isinstance(data, bytes) or not isinstance(shape, (list, tuple)) or len(shape) > MAX_DIMENSIONS:
            raise DataError(f"array: needs data (bytes) and a shape of at most {MAX_DIMENSIONS} sizes")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise DataError("array: its shape holds something else than sizes of 0 and more")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise DataError(f"array: {len(data)} bytes are not the {dtype.str} of its shape; send all of its data")
        if dtype.kind == "U" and not _characters(np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder))):
            raise DataError("array: its strings hold what is no character")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in items:
        return _dtype(items).type(items.get(b"data"))
    return items


def _characters(codes: np.ndarray[Any, np.dtype[Any]]) -> bool:
    """Whether all are characters that UTF-8 can write, as those of msgpack's own strings are."""
    return bool((codes <= 0x10FFFF).all() and not ((codes >= 0xD800) & (codes <= 0xDFFF)).any())


def _dtype(items: dict[Any, Any]) -> np.dtype[Any]:
    """The dtype that a map names; DataError unless it is a plain one."""
    name = items.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise DataError("array: its dtype is not one of booleans, integers, floats and strings (such as '<f4')")
    dtype = np.dtype(name)
    if dtype.itemsize == 0:
        raise DataError(f"array: dtype {name} has elements of no size; send strings as msgpack strings")
    return dtype
