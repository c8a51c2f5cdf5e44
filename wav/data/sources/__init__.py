"""Sources of demonstrations: one reader per format, behind one protocol.

To add a source, write a module whose class takes (DataSettings, IngestSettings) and keeps :class:`Source`, and name
it in :data:`SOURCES`; docs/extending/dataset-reader.md does so. No reader is imported before it is asked for. Outside
the repository ``ingest.source: module:Class`` names a reader without an entry here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from wav.errors import ConfigError

if TYPE_CHECKING:  # the parameter file's check reads the names alone
    from wav.config import DataSettings, IngestSettings
    from wav.data.conventions import Conventions
    from wav.data.episode import Episode
    from wav.data.sources.staging import DatasetSource
    from wav.data.store import Rejection
    from wav.shards import Mapper

#: ingest.source -> "module:class"
SOURCES = {
    "scripted": "wav.data.sources.scripted:ScriptedSource",
    "libero_hdf5": "wav.data.sources.libero_hdf5:LiberoHdf5Source",
    "lerobot": "wav.data.sources.lerobot:LeRobotSource",
    "robomimic_hdf5": "wav.data.sources.robomimic_hdf5:RobomimicHdf5Source",
    "aloha_hdf5": "wav.data.sources.aloha_hdf5:AlohaHdf5Source",
}


class Source(Protocol):
    """Where demonstrations come from: a simulator; datasets on disk are a :class:`~.staging.DatasetSource`."""

    def conventions(self) -> Conventions:
        """What the arrays of every episode mean."""
        ...

    def expected(self) -> int:
        """Number of episodes wanted, for progress."""
        ...

    def outcomes(self, workers: int, run: Mapper | None = None) -> Iterator[Episode | Rejection]:
        """Episodes and rejections, in an order that depends on the settings alone, never on ``workers`` or ``run``."""
        ...


def open_source(data: DataSettings, settings: IngestSettings) -> Source | DatasetSource:
    """The source that ``settings.source`` names; ConfigError where there is none, or ``path`` holds another kind."""
    if settings.source != "scripted" and settings.path:
        from wav.data.sources.recognise import check_source

        check_source(Path(settings.path).expanduser(), settings.source)
    module, _, name = SOURCES.get(settings.source, settings.source).partition(":")
    try:
        made = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        if settings.source in SOURCES:
            raise
        raise ConfigError(
            f"ingest.source = {settings.source!r}: {error}; give module:Class of a file in the project's folder"
        ) from None
    return cast("Source | DatasetSource", made(data, settings))
