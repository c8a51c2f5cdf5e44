"""Which system libraries are missing for off-screen rendering, and the apt line that installs them.

``python infra/local/system.py``; standard library only (it runs before anything is installed). Nothing is installed
here: the line is printed and the exit status is 1.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

#: backend (MUJOCO_GL) -> (library, Debian/Ubuntu package) that it loads
LIBRARIES = {
    "egl": (("libEGL.so.1", "libegl1"), ("libEGL_mesa.so.0", "libegl-mesa0"), ("libGL.so.1", "libgl1")),
    "osmesa": (("libOSMesa.so.8", "libosmesa6"), ("libGL.so.1", "libgl1")),
}


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def missing_packages(backend: str, loads: Callable[[str], bool] = _loads) -> list[str]:
    """Debian packages of the libraries that ``backend`` needs and that do not load.

    A machine with NVIDIA's driver has its own EGL, so Mesa's is asked for only where that is absent too.
    """
    missing = []
    for library, package in LIBRARIES[backend]:
        if loads(library) or (library == "libEGL_mesa.so.0" and loads("libEGL_nvidia.so.0")):
            continue
        missing.append(package)
    if "libegl-mesa0" in missing:
        missing.append("libgl1-mesa-dri")
    return missing


def main() -> str | None:
    """Check the backend that MUJOCO_GL names (EGL unless it says otherwise); what is wrong."""
    backend = os.environ.get("MUJOCO_GL", "egl").lower() or "egl"
    if backend not in LIBRARIES:
        return f"MUJOCO_GL = {backend!r}: must be one of {', '.join(LIBRARIES)}; unset it"
    if missing := " ".join(missing_packages(backend)):
        remedy = f"install them with:\n    sudo apt-get install -y {missing}"
        return f"rendering ({backend}): system libraries are missing; {remedy}"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
