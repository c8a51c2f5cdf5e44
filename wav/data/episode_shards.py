"""An episode store's work in shards: consecutive episodes, each shard's result a folder (:mod:`wav.shards`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from wav.data.store import EpisodeStore
from wav.errors import DataError
from wav.io.files import canonical_digest
from wav.shards import Mapper, grouped, in_order, made
from wav.source_code import module_digests


@lru_cache(maxsize=1)
def opened(path: str, digest: str) -> EpisodeStore:
    """The store at ``path``, where it is the one of this digest.

    Raises:
        DataError: another store lies there.
    """
    store = EpisodeStore.open(path)
    if store.digest != digest:
        raise DataError(
            f"{path}: digest {store.digest[:12]} where {digest[:12]} is meant; let all workers see one store"
        )
    return store


def on_shards(
    function: Callable[..., None], episodes: EpisodeStore, arguments: tuple[Any, ...], staging: Path, run: Mapper
) -> Iterator[tuple[range, Path]]:
    """Make every shard that is not there yet.

    Args:
        function: ``function(path, digest, which, *arguments, folder)`` leaves what it makes of the episodes ``which``
            of the store at ``path`` (:func:`opened`) in ``folder``.
        episodes: the store.
        arguments: settings, texts and numbers.
        staging: folder of the shards.
        run: runs the function over jobs.

    Yields:
        (episodes of the shard, its folder), in the store's order.
    """
    height, width = episodes.conventions.image_height, episodes.conventions.image_width
    frame_bytes = height * width * 3 * len(episodes.conventions.views)
    shards = list(grouped([info.length * frame_bytes for info in episodes.episodes]))
    plain = [value.model_dump(mode="json") if hasattr(value, "model_dump") else value for value in arguments]
    what = [module_digests((function.__module__,)), episodes.digest, *plain]
    path = str(episodes.path.absolute())
    jobs = {canonical_digest([s.start, s.stop, *what]): (path, episodes.digest, s, *arguments) for s in shards}
    for number, outcome in in_order(made(function, jobs, staging, run), len(jobs)):
        if isinstance(outcome, Exception):
            raise outcome
        yield shards[number], outcome
