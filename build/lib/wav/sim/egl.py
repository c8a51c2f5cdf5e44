"""EGL devices of this machine: ``python -m wav.sim.egl`` prints them as JSON.

EGL numbers graphics cards and Mesa's software renderer in one list of its own order, which is not CUDA's; a simulator
process is told its number (:func:`wav.sim.rendering.simulator_devices`). Talks to libEGL itself (ctypes): MuJoCo's
bindings lack the queries that tell a card from the software renderer. Run in a process of its own, a driver that hangs
or crashes does no harm.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import sys
from typing import Any

_PLATFORM_DEVICE, _EXTENSIONS, _CUDA_DEVICE = 0x313F, 0x3055, 0x323A
_SOFTWARE = "EGL_MESA_device_software"
_MAX_DEVICES = 64


def devices() -> list[dict[str, Any]]:
    """Every device in EGL's order: ``software``, ``cuda`` (CUDA's number, or None), ``usable`` (it initialises)."""
    name = ctypes.util.find_library("EGL")
    if name is None:
        return []
    library = ctypes.CDLL(name)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.eglGetProcAddress.restype = pointer

    def function(symbol: str, result: Any, *arguments: Any) -> Any:
        address = library.eglGetProcAddress(symbol.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    query = function("eglQueryDevicesEXT", ctypes.c_uint, integer, pointer, pointer)
    text = function("eglQueryDeviceStringEXT", ctypes.c_char_p, pointer, integer)
    attribute = function("eglQueryDeviceAttribEXT", ctypes.c_uint, pointer, integer, pointer)
    display_of = function("eglGetPlatformDisplayEXT", pointer, ctypes.c_uint, pointer, pointer)
    found, count = (pointer * _MAX_DEVICES)(), integer()
    if query is None or display_of is None or not query(_MAX_DEVICES, found, ctypes.byref(count)):
        return []
    rows = []
    for device in found[: count.value]:
        extensions = ((text(device, _EXTENSIONS) if text else b"") or b"").decode().split()
        cuda = pointer()
        known = bool(attribute and attribute(device, _CUDA_DEVICE, ctypes.byref(cuda)))
        display = display_of(_PLATFORM_DEVICE, device, None)
        usable = bool(display and library.eglInitialize(pointer(display), None, None))
        number = int(cuda.value or 0) if known else None
        rows.append({"software": _SOFTWARE in extensions, "cuda": number, "usable": usable})
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(devices()) + "\n")
