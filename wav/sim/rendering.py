"""Offscreen rendering: which OpenGL backend and device work here, and cheap rendering for CPUs.

``MUJOCO_GL`` must be set before mujoco is imported; :func:`choose_backend` tries EGL in a child process with a time
limit and falls back to OSMesa, saying so. :func:`simulator_devices` says which EGL devices the simulators share; each
process is told its own (:func:`simulator_environment`). :func:`simplify_model` decimates visual meshes of a compiled
model in place and turns reflections, shadows and multisampling off; collision geometry, masses and inertias are not
touched.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from wav.code_cache import code_folder
from wav.errors import ServiceError

log = logging.getLogger(__name__)

DEVICE_VARIABLE, CUDA_VARIABLE = "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES"
APT_LINE = "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6"
FAST_MAX_FACES = 400  #: Triangles a visual mesh keeps under render: fast.

_PROBE = """
import mujoco, numpy as np
m = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size="1"/></worldbody></mujoco>')
d = mujoco.MjData(m); mujoco.mj_forward(m, d)
r = mujoco.Renderer(m, 32, 32); r.update_scene(d); assert r.render().max() > 0
"""


def probe(backend: str, timeout: float) -> str:
    """Empty string if a frame can be rendered with ``backend`` in a child process, else what went wrong."""
    env = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=env, timeout=timeout, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no frame within {timeout:g} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")


@functools.cache
def choose_backend(timeout: float = 60.0) -> str:
    """Set ``MUJOCO_GL`` (and PYOPENGL_PLATFORM) to a backend that renders here and return its name.

    A value already set by the user is kept and not probed. Raises ServiceError naming the apt line if none works.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower() or "egl"
    if not os.environ.get("MUJOCO_GL") and (complaint := probe("egl", timeout)):
        log.warning("EGL does not render here (%s); trying OSMesa, which is slower", complaint)
        chosen = "osmesa"
        if second := probe("osmesa", timeout):
            raise ServiceError(
                f"no offscreen renderer: EGL: {complaint}; OSMesa: {second}; on Debian/Ubuntu: {APT_LINE}"
            )
    os.environ["MUJOCO_GL"] = chosen
    if chosen in ("egl", "osmesa"):
        os.environ["PYOPENGL_PLATFORM"] = chosen
    return chosen


@functools.cache
def egl_devices(timeout: float = 60.0) -> tuple[dict[str, Any], ...]:
    """EGL's devices in its own order (:func:`wav.sim.egl.devices`); empty where EGL cannot be asked in time."""
    env = {name: value for name, value in os.environ.items() if name != CUDA_VARIABLE}  # physical numbers
    command = [sys.executable, "-m", "wav.sim.egl"]
    try:
        done = subprocess.run(command, env=env, timeout=timeout, capture_output=True, text=True, check=True)
        return tuple(json.loads(done.stdout))
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        log.warning("EGL devices cannot be listed (%s); simulators take the first one", error)
        return ()


def simulator_devices() -> tuple[int, ...]:
    """EGL numbers of the devices that simulators share; empty: EGL's own choice.

    All graphics cards that ``CUDA_VISIBLE_DEVICES`` leaves visible (identifiers other than numbers hide none), else
    Mesa's software renderer. ``MUJOCO_EGL_DEVICE_ID`` is the user's choice and kept.
    """
    if os.environ.get(DEVICE_VARIABLE, ""):
        return (int(os.environ[DEVICE_VARIABLE]),) if os.environ[DEVICE_VARIABLE].isdigit() else ()
    usable = {number: device for number, device in enumerate(egl_devices()) if device["usable"]}
    visible = [word.strip() for word in os.environ.get(CUDA_VARIABLE, "all").split(",") if word.strip()]
    hides = all(word.lstrip("-").isdigit() for word in visible)
    cards = [
        number
        for number, device in usable.items()
        if not (device["software"] or (hides and device["cuda"] is not None and str(device["cuda"]) not in visible))
    ]
    return tuple(cards or [n for n, device in usable.items() if device["software"]] or list(usable))


def simulator_environment(number: int) -> dict[str, str]:
    """Environment of simulator process ``number``: one thread, one EGL device named explicitly.

    Non-obvious: without a device of its own, robosuite 1.4 reads ``CUDA_VISIBLE_DEVICES`` as EGL's number and fails on
    an empty value, an identifier, or a number EGL does not have; simulators use no CUDA, so it is taken from them.
    """
    env = {name: value for name, value in os.environ.items() if name != CUDA_VARIABLE}
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
    env.setdefault("PYTHONWARNINGS", "ignore")
    if not os.access(Path(np.__file__).parents[1], os.W_OK):  # numba caches beside robosuite's files, or in a home
        env.setdefault("NUMBA_CACHE_DIR", str(code_folder("numba")))
    devices = simulator_devices() if env.get("MUJOCO_GL", "egl").lower() == "egl" else ()
    if devices:
        env[DEVICE_VARIABLE] = str(devices[number % len(devices)])
    return env


def describe_renderer() -> dict[str, str]:
    """Backend, EGL device and OpenGL implementation that this process draws with; call it in a simulator process."""
    import mujoco
    from OpenGL import GL

    context = mujoco.GLContext(16, 16)
    context.make_current()
    name = GL.glGetString(GL.GL_RENDERER).decode()
    context.free()
    return {
        "backend": os.environ.get("MUJOCO_GL", ""),
        "device": os.environ.get(DEVICE_VARIABLE, ""),
        "renderer": name,
    }


def simplify_model(model: Any, max_faces: int = FAST_MAX_FACES) -> None:
    """Make ``model`` (mujoco.MjModel) cheap to draw, in place; call before a render context is created.

    Untextured meshes used by visual geoms alone (contype = conaffinity = 0) keep at most ``max_faces`` triangles.
    """
    model.mat_reflectance[:] = 0.0
    model.light_castshadow[:] = 0
    model.vis.quality.offsamples = 0
    mesh_type = 7  # mjGEOM_MESH
    for mesh in range(model.nmesh):
        users = [g for g in range(model.ngeom) if model.geom_type[g] == mesh_type and model.geom_dataid[g] == mesh]
        visual = all(model.geom_contype[g] == 0 and model.geom_conaffinity[g] == 0 for g in users)
        textured = any(model.geom_matid[g] >= 0 and (model.mat_texid[model.geom_matid[g]] >= 0).any() for g in users)
        if users and visual and not textured and model.mesh_facenum[mesh] > max_faces:
            _decimate_mesh(model, mesh, max_faces)


def _decimate_mesh(model: Any, mesh: int, max_faces: int) -> None:
    """Replace one mesh's triangles by a decimated set, inside the arrays it already owns."""
    import fast_simplification

    vertex, face = int(model.mesh_vertadr[mesh]), int(model.mesh_faceadr[mesh])
    n_vertex, n_face = int(model.mesh_vertnum[mesh]), int(model.mesh_facenum[mesh])
    points = np.ascontiguousarray(model.mesh_vert[vertex : vertex + n_vertex], dtype=np.float32)
    triangles = np.ascontiguousarray(model.mesh_face[face : face + n_face], dtype=np.int32)
    points, triangles = _weld(points, triangles)
    new_points, new_triangles = fast_simplification.simplify(points, triangles, 1.0 - max_faces / len(triangles))
    k_vertex, k_face = len(new_points), len(new_triangles)
    normal = int(model.mesh_normaladr[mesh])
    if k_face == 0 or k_vertex > n_vertex or k_face > n_face or k_vertex > int(model.mesh_normalnum[mesh]):
        return
    model.mesh_vert[vertex : vertex + k_vertex] = new_points
    model.mesh_face[face : face + k_face] = new_triangles
    model.mesh_normal[normal : normal + k_vertex] = _vertex_normals(new_points, new_triangles)
    model.mesh_facenormal[face : face + k_face] = new_triangles
    model.mesh_facenum[mesh] = k_face
    model.mesh_texcoordadr[mesh] = -1


def _weld(points: Any, triangles: Any) -> tuple[Any, Any]:
    """Merge equal vertices so that decimation sees a connected surface."""
    unique, inverse = np.unique(points.round(6), axis=0, return_inverse=True)
    welded = inverse.reshape(-1)[triangles].astype(np.int32)
    distinct = (welded[:, 0] != welded[:, 1]) & (welded[:, 1] != welded[:, 2]) & (welded[:, 0] != welded[:, 2])
    return np.ascontiguousarray(unique, dtype=np.float32), np.ascontiguousarray(welded[distinct])


def _vertex_normals(points: Any, triangles: Any) -> Any:
    """Area-weighted unit normals per vertex."""
    corners = points[triangles]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(points)
    for corner in range(3):
        np.add.at(normals, triangles[:, corner], face_normals)
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
