"""The object store: list, fetch, verify and thin out checkpoints; upload and stream stores of shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wav.commands import Json, answer, busy, command, family, say

if TYPE_CHECKING:
    from wav.io.storage import ObjectStore

GROUP = "Object store"
storage = family(GROUP, "storage", "Checkpoints and stores of shards in the object store (WAV_STORE).")
Where = Annotated[str, typer.Option("--store", help="s3://bucket/prefix or file:///folder; default: WAV_STORE")]
Commit = Annotated[str, typer.Argument(help="address of a commit below the store, as ls prints it")]


def _opened(place: str) -> ObjectStore:
    from wav.config import Runtime
    from wav.io.storage import open_store

    runtime = Runtime()
    store = open_store(place or runtime.store, runtime.s3_endpoint, runtime.s3_region)
    store.reach()
    return store


def _print(lines: Iterable[str]) -> int:
    """Status 1 where a line says BAD."""
    bad = False
    for line in lines:
        bad = bad or line.startswith("BAD ")
        say(line)
    return 1 if bad else 0


@command(GROUP, "wav storage ls", "wav storage ls training/pretrain_video --json", parent=storage)
def ls(prefix: Annotated[str, typer.Argument(help="below this")] = "", store: Where = "", as_json: Json = False) -> int:
    """List complete commits, and uploads that are not complete."""
    from wav.io.storage import commands

    opened = _opened(store)
    if as_json:
        return answer(True, list(commands.listed(opened, prefix)), ())
    return answer(False, (), commands.ls(opened, prefix))


@command(GROUP, "wav storage get training/train_joint/RUN/model weights", parent=storage)
def get(prefix: Commit, folder: Annotated[Path, typer.Argument(help="new folder")], store: Where = "") -> int:
    """Download a commit, verified; after a broken connection the same command goes on."""
    from wav.io.storage import commands

    with busy(f"{prefix}: downloading"):
        line = commands.get(_opened(store), prefix, folder)
    say(line)
    return 0


@command(GROUP, "wav storage put data/latents", parent=storage)
def put(folder: Annotated[Path, typer.Argument(help="episodes, rewards or latents")], store: Where = "") -> int:
    """Upload a store of shards under its folder's name; only what is not there yet."""
    from wav.io.storage.streaming import put

    with busy(f"{folder}: uploading"):
        line = put(_opened(store), folder, folder.resolve().name)
    say(line)
    return 0


@command(GROUP, "wav storage stream data/latents --store s3://bucket/data", parent=storage)
def stream(folder: Annotated[Path, typer.Argument(help="new folder of that name")], store: Where = "") -> int:
    """Make a folder of an uploaded store; its shards come when training first reads them."""
    from wav.config import Runtime
    from wav.io.storage.streaming import stream

    runtime = Runtime()
    say(stream(store or runtime.store, folder.resolve().name, folder, runtime.s3_endpoint, runtime.s3_region))
    return 0


@command(GROUP, "wav storage verify training/train_joint/RUN/model", parent=storage)
def verify(prefix: Commit, store: Where = "") -> int:
    """Read a commit back and compare every digest; status 1 where an object is bad."""
    from wav.io.storage import commands

    return _print(commands.verify(_opened(store), prefix))


@command(GROUP, "wav storage gc", "wav storage gc training --keep-last 1 --delete", parent=storage)
def gc(
    prefix: Annotated[str, typer.Argument(help="runs below this")] = "training",
    keep_last: Annotated[int, typer.Option(min=1, help="newest checkpoints of each run")] = 2,
    keep_best: Annotated[int, typer.Option(min=0, help="best ones by validation loss")] = 0,
    keep_every: Annotated[int, typer.Option(min=0, help="those at multiples of this step; 0: none")] = 0,
    older_hours: Annotated[float, typer.Option(help="age of unfinished uploads")] = 24.0,
    delete: Annotated[bool, typer.Option("--delete", help="remove them")] = False,
    store: Where = "",
) -> int:
    """Thin out checkpoints; says what it would remove unless --delete is given."""
    from wav.io.storage import commands
    from wav.io.storage.commit import Retention

    keep = Retention(keep_last, keep_best, keep_every)
    return _print(commands.gc(_opened(store), keep, prefix, older_hours * 3600, delete))
