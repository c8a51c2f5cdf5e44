"""LIBERO's suites as data: tasks, step limits, initial states. No simulator and no torch is imported here.

The initial states of evaluation come from the ``.pruned_init`` files of hf-libero, which LIBERO reads with torch's
unsafe loader. They are zip archives with one pickled float64 array; :func:`read_init_file` reads them through an
unpickler that knows numpy's array types and nothing else. (field: torch >= 2.6 refuses them, LIBERO PR#110)
"""

from __future__ import annotations

import ast
import functools
import hashlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.data.names import own_task, suites_of, task_in
from wav.errors import DataError
from wav.sim.env import TaskSpec
from wav.sim.libero.assets import INSTALL, package_folder

LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Environment steps an evaluation episode may take, by suite (the settling steps not counted)."""
INIT_STATES = 50  #: Initial states per task that evaluation uses.
INIT_DIGESTS = {
    "libero_spatial": "fffa5778f0404384",
    "libero_object": "235091c8aaeacdd9",
    "libero_goal": "e9cac8c4120f2b6e",
    "libero_10": "79db0dace0bd1bb7",
    "libero_90": "96b70acea7607ed7",
}
"""SHA-256 over the names and contents of a suite's ``.pruned_init`` files in hf-libero 0.1.4."""
_MAX_BYTES = 64 * 2**20


def task_specs(suite: str) -> dict[str, TaskSpec]:
    """Tasks of ``suite`` (or several) by name, in LIBERO's order; every task is a scene of its own.

    Raises:
        ServiceError: hf-libero is not installed.
        DataError: its list of tasks cannot be read.
    """
    found = {}
    for own in suites_of(suite):
        for task in _task_names(package_folder())[own]:
            name = task_in(suite, own, task)
            found[name] = TaskSpec(name, instruction(task), name, LIMITS[own])
    return found


@functools.cache
def _task_names(package: Path) -> dict[str, list[str]]:
    """LIBERO's task map, read as data: importing its module would import torch."""
    path = package / "benchmark" / "libero_suite_task_map.py"
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "libero_task_map":
                names: dict[str, list[str]] = ast.literal_eval(node.value)
                return names
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); install LIBERO again with `{INSTALL}`") from None
    raise DataError(f"{path}: holds no libero_task_map; install LIBERO again with `{INSTALL}`")


def instruction(task: str) -> str:
    """The language command in a task's name, as LIBERO takes it (upper-case names begin with their scene)."""
    words = re.sub(r"^[A-Z_]+SCENE\d+_", "", task) if task[0].isupper() else task
    return words.replace("_", " ")


def bddl_file(suite: str, task: str) -> Path:
    """The task's problem definition."""
    own, name = own_task(suite, task)
    return package_folder() / "bddl_files" / own / f"{name}.bddl"


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """The one use of ``_codecs.encode`` in pickles of numpy arrays."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays of numbers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what :data:`_ALLOWED` lists."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return _ALLOWED[module, name]


def read_init_file(path: Path) -> NDArray[np.float64]:
    """Initial states (n, 1 + nq + nv) of a ``.pruned_init`` or ``.init`` file: time, positions, velocities.

    Raises:
        DataError: missing, damaged, or holding anything but a two-dimensional float64 array of finite numbers.
    """
    remedy = f"install LIBERO again with `{INSTALL}`"
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((m for m in archive.infolist() if m.filename.split("/")[-1] == "data.pkl"), None)
            if member is None or member.file_size > _MAX_BYTES:
                raise DataError(f"{path}: holds no data.pkl of at most {_MAX_BYTES >> 20} MiB; {remedy}")
            with archive.open(member) as file:
                states = _ArrayUnpickler(file).load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of initial states; {remedy}") from None
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise DataError(f"{path}: not a file of initial states ({error}); {remedy}") from error
    if not isinstance(states, np.ndarray) or states.dtype != np.float64 or states.ndim != 2:
        kind = f"{states.dtype} {states.shape}" if isinstance(states, np.ndarray) else type(states).__name__
        raise DataError(f"{path}: holds {kind}, not float64 states (n, width); {remedy}")
    if not np.isfinite(states).all():
        raise DataError(f"{path}: holds NaN or infinity; {remedy}")
    return states


@functools.cache
def init_digest(suite: str) -> str:
    """Digest of the suite's initial states; DataError if they are not hf-libero 0.1.4's."""
    digest = hashlib.sha256()
    for task in sorted(_task_names(package_folder())[suite]):
        path = _init_file(suite, task)
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    found = digest.hexdigest()[:16]
    if found != INIT_DIGESTS[suite]:
        raise DataError(
            f"{_init_file(suite, '*').parent}: initial states of {suite} have digest {found}, not "
            f"{INIT_DIGESTS[suite]} of hf-libero 0.1.4; install it again with `{INSTALL}`"
        )
    return found


def _init_file(suite: str, task: str) -> Path:
    own, name = own_task(suite, task)
    return package_folder() / "init_files" / own / f"{name}.pruned_init"


def initial_states(suite: str, task: str) -> NDArray[np.float64]:
    """The task's 50 initial states (50, width) of evaluation; DataError if damaged or of another number."""
    init_digest(own_task(suite, task)[0])
    states = read_init_file(_init_file(suite, task))
    if len(states) != INIT_STATES:
        raise DataError(f"{_init_file(suite, task)}: holds {len(states)} states, not {INIT_STATES}; reinstall LIBERO")
    return states
