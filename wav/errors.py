"""The errors a user may meet: one sentence with the field or file, its value, and the remedy.

Everything the library raises on bad input derives from :class:`WavError`; entry points (``wav.cli``, ``flows``,
``infra``) run through :func:`exit_status`, which prints its message on one line, without a traceback.
"""

from __future__ import annotations

import io
import os
import re
import reprlib
import sys
from collections.abc import Callable

_USER = re.compile(r"(\w://)[^/\s]*@")


class WavError(Exception):
    """Base class of errors that are the input's or the environment's fault, not the code's.

    Messages end in logs, artefacts and databases: what stands before the host of an address in them, which may be a
    password or token, is left out.
    """

    def __init__(self, *told: object) -> None:
        super().__init__(*(_USER.sub(r"\1***@", part) if isinstance(part, str) else part for part in told))


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


#: characters of a value in a message, and of a whole message
VALUE_CHARACTERS, MESSAGE_CHARACTERS = 160, 2000


def cut(value: object, limit: int = VALUE_CHARACTERS) -> str:
    """A value's text on one line, of at most ``limit`` characters: files may hold values of any length."""
    text = " ".join((value if isinstance(value, str) else str(value))[: 8 * limit].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shown(value: object) -> str:
    """A value as Python writes it, the inside of long or deep ones left out."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = VALUE_CHARACTERS
    return cut(brief.repr(value))


def print_any_name() -> None:
    """Let output hold names of files, which need not be text in the terminal's encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def foreseeable(error: BaseException) -> bool:
    """Whether an error is no fault of the code: a :class:`WavError`, or what the system says of a file.

    Such as of a folder that may not be written, or a name that is too long.
    """
    return isinstance(error, WavError) or (isinstance(error, OSError) and error.filename is not None)


def exit_status(run: Callable[[], int | None], prefix: str = "", interrupted: str = "interrupted") -> int:
    """Exit status of an entry point: what ``run`` returns (None: 0), 1 after a foreseeable error, 130 after Ctrl-C.

    What is :func:`foreseeable` is one line on stderr. Anything else is a fault of the code and keeps its traceback.

    ``prefix`` goes before the line on stderr, such as ``"wav act: "``.
    """
    print_any_name()
    try:
        return run() or 0
    except WavError as error:
        message = cut(error, MESSAGE_CHARACTERS)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prefix}{interrupted}\n")
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`wav storage ls | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if not foreseeable(error):
            raise
        message = f"{cut(error.filename)}: {error.strerror or error}; check the path, its permissions and the disk"
    sys.stderr.write(f"{prefix}{message}\n")
    return 1
