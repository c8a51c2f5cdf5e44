"""Which checkpoint a run goes on from: the newest whole one, of this machine and of the store together.

Only a damaged checkpoint is passed over, with a line. Trouble of the network or the server is waited for and then
ends the run: taken for "there is none", it would throw away everything that was trained.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from wav.io.files import MANIFEST
from wav.io.storage.base import DamagedError, ObjectStore, disk_errors, patiently
from wav.io.storage.commit import commits, fetch, remote_manifest, verify

LOG = logging.getLogger("wav.training")
#: object that names the newest checkpoint of a run: a listing may be older than what was written, an object is not
NEWEST = "newest"
NAME = re.compile(r"step-\d{8,}")


def local_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def announce(store: ObjectStore, prefix: str, name: str) -> None:
    """Write down that ``name`` is the newest checkpoint below ``prefix``."""
    store.put_bytes(f"{prefix}/{NEWEST}", name.encode())


def newest_checkpoint(folder: Path, store: ObjectStore, prefix: str) -> Path | None:
    """The newest whole checkpoint as a folder of this machine, downloaded where the store's is newer; None: none.

    Trouble is waited for where that may help, and then raised (StorageError).
    """
    sweep(folder)
    found = _newest(folder, store, prefix)
    for path in folder.glob(".step-*"):  # of saves, downloads and conversions that were killed: none goes on any more
        shutil.rmtree(path, ignore_errors=True)
    return found


def _newest(folder: Path, store: ObjectStore, prefix: str) -> Path | None:
    local = {path.name: path for path in local_checkpoints(folder)}
    stored = patiently(lambda: stored_checkpoints(store, prefix), LOG.warning)
    for name in sorted({*local, *stored}, reverse=True):
        if name in local:
            try:
                verify(local[name])
                return local[name]
            except DamagedError as error:
                LOG.warning("checkpoint ignored: %s", error)
                remove(local[name])
        if name in stored:
            try:
                return _download(store, f"{prefix}/{name}", folder / name)
            except DamagedError as error:
                LOG.warning("checkpoint ignored: %s", error)
    LOG.info("no checkpoint of this run in %s or %s: it starts at step 0", folder, store.uri(prefix))
    return None


def stored_checkpoints(store: ObjectStore, prefix: str) -> set[str]:
    """Names of the complete checkpoints below ``prefix``, the announced one too where the listing lacks it."""
    names = {commit.rpartition("/")[2] for commit in commits(store, prefix)}
    if store.head(f"{prefix}/{NEWEST}") is None:
        return names
    name = store.get_bytes(f"{prefix}/{NEWEST}").decode(errors="replace")
    if name not in names and NAME.fullmatch(name):
        if remote_manifest(store, f"{prefix}/{name}") is None:
            LOG.warning("%s names %s, which is not there any more", store.uri(f"{prefix}/{NEWEST}"), name)
        else:
            LOG.warning("%s: the store's list lacks %s, which is there", store.uri(prefix), name)
            names.add(name)
    return names


def _download(store: ObjectStore, prefix: str, folder: Path) -> Path:
    LOG.info("downloading checkpoint %s", store.uri(prefix))
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    patiently(lambda: fetch(store, prefix, folder), LOG.warning)
    return folder


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves nothing that looks like one."""
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Remove what killed processes left: checkpoints half removed, and folders without a manifest."""
    for path in folder.glob(".*.gone"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*"):
        if not (path / MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)
