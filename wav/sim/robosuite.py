"""robosuite imported once and quietly, after the renderer is chosen; import this module before any of robosuite."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from wav.sim.rendering import choose_backend


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back the warnings that robosuite and LIBERO give while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


choose_backend()  # before robosuite imports mujoco
logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
with quiet():
    import robosuite.macros as macros

macros.CONSOLE_LOGGING_LEVEL = None
macros.FILE_LOGGING_LEVEL = None
