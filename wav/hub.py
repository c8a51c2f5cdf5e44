"""Pretrained weights: a local folder, or a Hugging Face hub id that was fetched beforehand.

Nothing here downloads: weights of many gigabytes arrive by a command the user runs, which the error names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from wav.errors import DataError, ServiceError
from wav.io.files import canonical_digest, file_digest, read_json, write_json

REFERENCE_FILE = "reference.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` reads as owner/name and is no folder on this machine."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def resolve(source: str, field: str, include: Iterable[str] = ()) -> Path:
    """Folder that holds the weights of ``source``.

    Args:
        source: folder, or hub id (owner/name) in the local hub cache.
        field: parameter the source came from, for the message.
        include: file patterns the fetch may be limited to.

    Raises:
        ServiceError: a hub id that is not in the local cache; the message holds the command that fetches it.
        DataError: neither a folder nor a hub id.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if not is_hub_id(source):
        raise DataError(f"{field} = {source!r}: no such folder, and not a hub id (owner/name); correct the path")
    from huggingface_hub import snapshot_download  # slow import

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception as error:  # the hub's own error classes differ between versions
        raise ServiceError(
            f"{field} = {source!r}: not in the local hub cache; fetch it with `{fetch_command(source, include)}` "
            "on a machine with internet access, or name a folder"
        ) from error


def fetch_command(source: str, include: Iterable[str] = ()) -> str:
    """Command line that fetches ``source`` into the hub cache."""
    return " ".join(["hf download", source, *(f'--include "{pattern}"' for pattern in include)])


def content_digest(files: Iterable[Path]) -> str:
    """Digest of files by name and content. Blobs of the hub cache are named by their SHA-256 already."""
    records = []
    for file in sorted(files, key=lambda f: f.name):
        blob = file.resolve().name
        records.append([file.name, blob if re.fullmatch(r"[0-9a-f]{64}", blob) else file_digest(file)])
    return canonical_digest(records)


def write_reference(folder: Path, source: str, digest: str) -> None:
    """Record in ``folder`` that its weights are those of the hub id ``source`` with this digest."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REFERENCE_FILE, {"source": source, "digest": digest})


def read_reference(folder: Path) -> tuple[str, str] | None:
    """Hub id and digest recorded in ``folder``, or None where the folder holds the weights themselves."""
    file = folder / REFERENCE_FILE
    if not file.is_file():
        return None
    content = read_json(file, "run the encode stage again")
    try:
        return str(content["source"]), str(content["digest"])
    except (KeyError, TypeError):
        raise DataError(f"{file}: {json.dumps(content)[:80]} names no source; run the encode stage again") from None
