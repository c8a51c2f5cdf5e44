"""Compiled code: what torch.compile is told before it, and a folder for it that nobody else can put code into."""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
RECOMPILATIONS = 128  #: of one function: a block is compiled once for each of its shapes and strides


def code_cache() -> Path | None:
    """``wav`` in the user's cache folder, made if it is missing; None, and the reason in the log, where it is not safe.

    Safe is a folder of this user's, no link, that no other user may write to.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wav"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError) as error:
        log.warning("compiled code is not kept: %s; set XDG_CACHE_HOME to a folder of your own", error)
        return None
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return folder
    log.warning(
        "%s: is a link, or another user may write there, so compiled code is not kept; remove it, what lies in it too",
        folder,
    )
    return None


def code_folder(kind: str) -> Path:
    """Folder for one kind of compiled code: below :func:`code_cache`, else a new one in the system's."""
    folder = code_cache()
    return folder / kind if folder else _temporary(kind)


@functools.cache
def _temporary(kind: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"wav-{kind}-"))


def prepare_compiler() -> None:
    """Let torch.compile compile a block for all shapes that it meets, and keep what it makes where nobody else writes.

    Its own limit is eight shapes, and its own place has a known name in /tmp and is unpickled from. A place that the
    environment names (TORCHINDUCTOR_CACHE_DIR) stays.
    """
    import torch

    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # until torch 2.6
    setattr(config, name, max(getattr(config, name), RECOMPILATIONS))
    if not os.environ.get(INDUCTOR):
        os.environ[INDUCTOR] = str(code_folder("inductor"))
