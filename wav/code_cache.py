"""Where compiled code is kept between runs: a folder into which nobody else can put code that this user would run."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


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
        "%s: is a link, or another user may write there, so compiled code is not kept; remove it or chmod 700", folder
    )
    return None


def keep_inductor_private() -> None:
    """Give torch.compile a place of the same kind: its own has a known name in /tmp, and it unpickles what lies there.

    A place that the environment names (TORCHINDUCTOR_CACHE_DIR) stays.
    """
    if not os.environ.get(INDUCTOR):
        folder = code_cache()
        os.environ[INDUCTOR] = str(folder / "inductor") if folder else tempfile.mkdtemp(prefix="wav-inductor-")
