"""``wav doctor``: is this machine ready? One line per check, each failure with its remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from wav.config import Runtime
from wav.errors import ServiceError, WavError
from wav.prefect_api import server_version

#: Versions the simulators need exactly (newer ones break robosuite or change the pictures).
REQUIRED = {"robosuite": "1.4.0", "mujoco": "3.3.2"}
MIN_DISK_GIB, MIN_MEMORY_GIB = 5.0, 6.0
_TIMEOUT = 3.0
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


def _answers(url: str) -> str:
    """Empty if anything answers HTTP at ``url``, else what went wrong."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT):
            return ""
    except urllib.error.HTTPError:
        return ""  # an S3 server refuses anonymous requests: it is up
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def check_services(runtime: Runtime) -> Iterator[Check]:
    """Prefect and the object store."""
    api = os.environ.get("PREFECT_API_URL", "")
    if api:
        try:
            text, good = f"{api}, version {server_version(api)}", True
        except (ServiceError, OSError) as error:
            told = str(error) if isinstance(error, ServiceError) else f"does not answer ({error})"
            text, good = f"{api} {told}; make up", False
        yield Check("prefect", good, text)
    else:
        yield Check("prefect", False, "PREFECT_API_URL is not set and no local server was started; make up")
    if runtime.store.startswith("file://"):
        folder = Path(runtime.store.removeprefix("file://"))
        good = os.access(folder if folder.exists() else folder.parent, os.W_OK)
        yield Check("store", good, runtime.store + ("" if good else " is not writable; choose another WAV_STORE"))
    elif runtime.s3_endpoint:
        complaint = _answers(runtime.s3_endpoint)
        text = f"{runtime.store} at {runtime.s3_endpoint}"
        yield Check("store", not complaint, text + (f" does not answer ({complaint}); make up" if complaint else ""))
    else:
        text = f"{runtime.store} on AWS is assumed, as WAV_S3_ENDPOINT is not set; make up starts a local server"
        yield Check("store", False, text, needed=False)


def check_room(folder: Path) -> Iterator[Check]:
    """Disk and memory."""
    free = shutil.disk_usage(folder).free / 2**30
    remedy = "" if free >= MIN_DISK_GIB else f"; at least {MIN_DISK_GIB:.0f} GiB are needed: free some, or `dvc gc -w`"
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


def as_json(checks: list[Check]) -> str:
    """Findings for a machine to read."""
    return json.dumps([{"name": c.name, "ok": c.ok, "needed": c.needed, "text": c.text} for c in checks], indent=1)
