"""``wav doctor``: is this machine ready? One line per check, each failure with its remedy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from wav.config import Runtime
from wav.errors import MESSAGE_CHARACTERS, WavError, cut
from wav.io.storage import open_store
from wav.prefect_api import server_version, without_user
from wav.probes import answers

#: Versions the simulators need exactly (newer ones break robosuite or change the pictures).
REQUIRED = {"robosuite": "1.4.0", "mujoco": "3.3.2"}
MIN_DISK_GIB, MIN_MEMORY_GIB = 5.0, 6.0
_PROBE_SECONDS = 20.0  # two backends may be tried: all checks together take less than a minute


@dataclass(frozen=True)
class Check:
    """One finding; ``needed`` tells a failure from a note."""

    name: str
    ok: bool
    text: str
    needed: bool = True

    @property
    def line(self) -> str:
        """``ok`` / ``FAIL`` / ``note`` and the finding."""
        return f"{'ok' if self.ok else 'FAIL' if self.needed else 'note':5}{self.name}: {self.text}"


def check_versions() -> Iterator[Check]:
    """Packages that decide physics, pixels and numbers."""
    for name, wanted in REQUIRED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, f"not installed; pip install {name}=={wanted}")
            continue
        remedy = "" if found == wanted else f"; needs {wanted}: pip install {name}=={wanted}"
        yield Check(name, found == wanted, f"{found}{remedy}")
    yield Check("torch", True, torch.__version__)


def check_renderer() -> Iterator[Check]:
    """Whether a frame can be rendered offscreen, tried in a child process with a time limit."""
    from wav.sim.rendering import APT_LINE, choose_backend, probe

    if given := os.environ.get("MUJOCO_GL", "").lower():  # what the user chose is used untried, so try it here
        complaint = probe(given, _PROBE_SECONDS)
        remedy = f" = {given} does not render ({complaint}); unset it, or on Debian/Ubuntu: {APT_LINE}"
        yield Check("renderer", not complaint, f"MUJOCO_GL{remedy}" if complaint else given)
        return
    try:
        yield Check("renderer", True, choose_backend(_PROBE_SECONDS))
    except WavError as error:
        yield Check("renderer", False, str(error))


def check_libero() -> Iterator[Check]:
    """Whether the LIBERO suites can run; notes, as the default needs none of it. Nothing is downloaded."""
    from wav.sim.libero import assets as libero_assets

    try:
        found = libero_assets.check_versions()
        assets = libero_assets.assets_here()
        remedy = f"no assets; set {libero_assets.ASSETS_VARIABLE}, else {libero_assets.ASSETS_REPO} is downloaded"
        text = f"hf-libero {found['hf-libero']}, {f'assets in {assets}' if assets else remedy}"
        yield Check("libero", assets is not None, text, needed=False)
    except WavError as error:
        yield Check("libero", False, str(error), needed=False)


def check_gpu() -> Iterator[Check]:
    """GPUs torch sees; none is fine for the default."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    yield Check("gpu", count > 0, names or "none; the embedded default runs on the CPU", needed=False)


def check_services(runtime: Runtime) -> Iterator[Check]:
    """Prefect and the object store, asked as a stage asks them."""
    api = os.environ.get("PREFECT_API_URL", "")
    if api:
        problem = answers(lambda seconds: server_version(api, timeout_s=seconds))
        problem = f"{problem}; correct PREFECT_API_URL or run make up" if problem else ""
    else:
        problem = "PREFECT_API_URL is not set and no local server was started; run make up"
    yield Check("prefect", not problem, ": ".join(filter(None, (without_user(api), problem))))
    try:
        open_store(runtime.store, runtime.s3_endpoint, runtime.s3_region).check()
        yield Check("store", True, " at ".join(filter(None, (runtime.store, runtime.s3_endpoint))))
    except WavError as error:
        yield Check("store", False, cut(error, MESSAGE_CHARACTERS))


def check_room(folder: Path) -> Iterator[Check]:
    """Disk and memory."""
    free = shutil.disk_usage(folder).free / 2**30
    remedy = "" if free >= MIN_DISK_GIB else f"; at least {MIN_DISK_GIB:.0f} GiB are needed: free some"
    yield Check("disk", free >= MIN_DISK_GIB, f"{free:.1f} GiB free in {folder}{remedy}")
    memory = psutil.virtual_memory().available / 2**30
    remedy = "" if memory >= MIN_MEMORY_GIB else f"; about {MIN_MEMORY_GIB:.0f} GiB are needed: stop other programs"
    yield Check("memory", memory >= MIN_MEMORY_GIB, f"{memory:.1f} GiB available{remedy}", needed=False)
    yield Check("cores", True, f"{len(os.sched_getaffinity(0))}")


def run_checks(runtime: Runtime, report: Callable[[Check], None]) -> bool:
    """Run every check, reporting each as it is known; False if one that is needed failed."""
    good = True
    for found in (
        check_versions(),
        check_gpu(),
        check_room(runtime.workspace.absolute()),
        check_services(runtime),
        check_libero(),
        check_renderer(),
    ):
        for check in found:
            report(check)
            good = good and (check.ok or not check.needed)
    return good
