"""Stores of many shards in an object store: uploaded by content, read by machines that hold only what they have read.

``put`` uploads the files that are not there yet under their digests, then the manifest under a name; ``stream`` makes a
folder of the manifest and the small files, whose shards come when something first asks for them::

    put(open_store("s3://bucket/data"), Path("data/latents"), "latents")
    stream("s3://bucket/data", "latents", Path("data/latents"))  # on another machine
    LatentStore.open("data/latents")
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from wav.errors import StorageError
from wav.io.files import (
    MANIFEST,
    ORIGIN,
    FileRecord,
    atomic_folder,
    link,
    manifest_files,
    read_json,
    write_bytes,
    write_json,
)
from wav.io.readers import parse_json, understood
from wav.io.storage import open_store
from wav.io.storage.base import ObjectStore, patiently

_PLACE, _SHARD = "stores", "shard-"
_REMEDY = "upload it again with `wav storage put`"
_log = logging.getLogger(__name__)


def _content(record: FileRecord) -> str:
    return f"{_PLACE}/sha256/{record.sha256}"


def _records(text: bytes, where: str) -> tuple[FileRecord, ...]:
    with understood(where, _REMEDY):
        return manifest_files(parse_json(text, where, _REMEDY))


def put(store: ObjectStore, folder: Path, name: str) -> str:
    """Upload a folder with a manifest as the store ``name``; what it shares with earlier versions is there already.

    Readers of an earlier version go on reading that. Returns a line for people.
    """
    text = (folder / MANIFEST).read_bytes()
    records = _records(text, str(folder / MANIFEST))
    there = {info.key for info in store.list(f"{_PLACE}/sha256/")}
    new = [record for record in records if _content(record) not in there]
    for record in new:
        store.put_file(folder / record.path, _content(record))
    store.put_bytes(f"{_PLACE}/{name}.json", text)
    size = sum(record.bytes for record in new) / 2**20
    return f"{store.uri(f'{_PLACE}/{name}.json')}: {len(records)} files, {len(new)} of them new ({size:.1f} MiB)"


def stream(url: str, name: str, folder: Path, endpoint: str = "", region: str = "us-east-1") -> str:
    """Make ``folder`` the store ``name``, whose shards stay at ``url`` until they are read. Returns a line for people.

    A folder that this made before becomes the store as it is now, with the shards that it has in common with it.

    Raises:
        StorageError: there is no such store, or ``folder`` is a whole one.
    """
    if folder.exists() and not (folder / ORIGIN).is_file():
        raise StorageError(f"{folder}: is there already, and whole; name another folder or remove it")
    store, where = open_store(url, endpoint, region), f"{_PLACE}/{name}.json"
    text = store.get_bytes(where)
    records = _records(text, store.uri(where))
    before = _records((folder / MANIFEST).read_bytes(), str(folder / MANIFEST)) if folder.exists() else ()
    have = {record.sha256: folder / record.path for record in before if (folder / record.path).is_file()}
    later = 0
    with atomic_folder(folder) as new:
        for record in records:
            if record.sha256 in have:
                link(have[record.sha256], new / record.path)
            elif record.path.startswith(_SHARD):
                later += record.bytes
            else:
                store.get_file(_content(record), new / record.path, record.sha256)
        write_bytes(new / MANIFEST, text)
        write_json(new / ORIGIN, {"url": url, "endpoint": endpoint, "region": region})
    return f"{folder}: {len(records)} files, of which {later / 2**20:.1f} MiB come as they are read"


def reader(folder: Path, records: Iterable[FileRecord]) -> Callable[[str], Path]:
    """What gives the path of a file of a store by its name, and brings it first where it is still elsewhere.

    One process of a machine brings a file, the others wait for it; a network in trouble is asked again for a while.

    Raises:
        DataError: the folder says in no readable way where its files are.
        StorageError: of what the reader does, where the object store has no such file or cannot be reached.
    """
    if not (folder / ORIGIN).is_file():
        return folder.joinpath
    with understood(folder / ORIGIN, "make the folder again with `wav storage stream`"):
        raw = read_json(folder / ORIGIN, "make the folder again with `wav storage stream`")
        place = (str(raw["url"]), str(raw["endpoint"]), str(raw["region"]))
    known = {record.path: record for record in records}

    @cache
    def elsewhere() -> ObjectStore:
        return open_store(*place)

    def bring(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            with (path.parent / f".{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    record = known[name]
                    patiently(lambda: elsewhere().get_file(_content(record), path, record.sha256), _log.warning)
        return path

    return bring
