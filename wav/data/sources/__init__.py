"""Sources of demonstrations: one reader per format, behind one protocol.

To add a source, write a module whose class takes (DataSettings, IngestSettings) and keeps :class:`Source`, and name
it in :data:`SOURCES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.store import Rejection
from wav.errors import ConfigError

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings

#: ingest.source -> "module:class"
SOURCES = {
    "scripted": "wav.data.sources.scripted:ScriptedSource",
    "libero_hdf5": "wav.data.sources.libero_hdf5:LiberoHdf5Source",
    "lerobot": "wav.data.sources.lerobot:LeRobotSource",
}


class Source(Protocol):
    """Where demonstrations come from."""

    def conventions(self) -> Conventions:
        """What the arrays of every episode mean."""
        ...

    def expected(self) -> int:
        """Number of episodes wanted, for progress."""
        ...

    def outcomes(self, workers: int) -> Iterator[Episode | Rejection]:
        """Episodes and rejections, in an order that depends on the settings alone, never on ``workers``."""
        ...


def open_source(data: DataSettings, settings: IngestSettings) -> Source:
    """The source that ``settings.source`` names; ConfigError where this version has none of that name."""
    if settings.source not in SOURCES:
        raise ConfigError(
            f"ingest.source = {settings.source!r}: not available in this version; choose {', '.join(sorted(SOURCES))}"
        )
    module, _, name = SOURCES[settings.source].partition(":")
    return cast(Source, getattr(import_module(module), name)(data, settings))
