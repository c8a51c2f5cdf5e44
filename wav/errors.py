"""The errors a user may meet: one sentence with the field or file, its value, and the remedy.

Everything the library raises on bad input derives from :class:`WavError`; entry points (``wav.cli``, ``flows``,
``infra``) run through :func:`exit_status`, which prints its message on one line, without a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class WavError(Exception):
    """Base class of errors that are the input's or the environment's fault, not the code's."""


class ConfigError(WavError, ValueError):
    """A parameter is unknown, out of range or inconsistent with another."""


class DataError(WavError, ValueError):
    """Episodes, rewards or latents are missing, truncated, inconsistent or of an unknown format."""


class CheckpointError(WavError, ValueError):
    """A checkpoint does not match the model, the statistics or its own manifest."""


class StorageError(WavError, OSError):
    """An object store or the disk refused, lost or corrupted something."""


class ServiceError(WavError, RuntimeError):
    """A service this machine needs (Prefect, S3, a renderer) is missing or not up."""


class SimulationError(WavError, RuntimeError):
    """A simulator could not be created, died or stalled."""


class TrainingError(WavError, RuntimeError):
    """A training run diverged, or one of its processes ended before its time."""


def exit_status(run: Callable[[], int | None], prefix: str = "", interrupted: str = "interrupted") -> int:
    """Exit status of an entry point: what ``run`` returns (None: 0), 1 after a :class:`WavError`, 130 after Ctrl-C.

    Args:
        run: the entry point's work.
        prefix: goes before the line on stderr, such as ``"wav act: "``.
        interrupted: what to say after Ctrl-C.
    """
    try:
        return run() or 0
    except WavError as error:
        sys.stderr.write(f"{prefix}{' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{prefix}{interrupted}\n")
        return 130
