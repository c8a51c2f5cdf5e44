"""Pretrained weights: a local folder, or a Hugging Face hub id that was fetched beforehand, loaded whole or not at all.

Nothing here downloads: weights of many gigabytes arrive by a command the user runs, which the error names. And nothing
is filled in: the libraries' own ``from_pretrained`` warns of missing tensors and goes on with chance numbers.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wav.errors import DataError, ServiceError, WavError
from wav.io.files import canonical_digest, file_digest, inside, read_json, write_json

SILENCE_SECONDS = 60.0  #: A hub silent for this long is given up: some of huggingface_hub's calls would wait for ever.
REFERENCE_FILE = "reference.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
#: a weight file of either library; its group is the variant
_WEIGHTS = re.compile(r"(?:pytorch_|diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)\Z")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` reads as owner/name and is no folder on this machine."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def resolve(source: str, field: str, include: Iterable[str] = ()) -> Path:
    """Folder that holds the weights of ``source``.

    ``field`` is the parameter that the source came from, ``include`` are file patterns the fetch may be limited to.

    Raises:
        ServiceError: a hub id that is not in the local cache; the message holds the command that fetches it.
        DataError: neither a folder nor a hub id.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise DataError(f"{field} = {source!r}: is a file; name the folder that holds it and its config.json")
    if not is_hub_id(source):
        raise DataError(f"{field} = {source!r}: no such folder, and not a hub id (owner/name); correct the path")
    from huggingface_hub import snapshot_download  # slow import

    try:  # with the patterns of the fetch: without them the hub's library takes a part of a repository for none
        return Path(snapshot_download(source, local_files_only=True, allow_patterns=list(include) or None))
    except Exception as error:  # the hub's own error classes differ between versions
        raise ServiceError(
            f"{field} = {source!r}: not in the local hub cache; fetch it with `{fetch_command(source, include)}` "
            "on a machine with internet access, or name a folder"
        ) from error


@contextlib.contextmanager
def silence_ends() -> Iterator[None]:
    """Let no call of huggingface_hub wait longer than :data:`SILENCE_SECONDS` for an answer."""
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, SILENCE_SECONDS
    try:
        yield
    finally:
        session.timeout = before


def fetch_command(source: str, include: Iterable[str] = ()) -> str:
    """Command line that fetches ``source`` into the hub cache."""
    return " ".join(["hf download", source, *(f'--include "{pattern}"' for pattern in include)])


def weight_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index file beside the shards it names.

    Raises:
        DataError: it is no index, or names a file that is not beside it, which a library would read nevertheless.
    """
    raw = read_json(path, "fetch it again")
    if not isinstance(raw, dict) or not isinstance(raw.get("weight_map"), dict):
        raise DataError(f"{path}: has no weight_map; fetch it again")
    found = {str(name): str(file) for name, file in raw["weight_map"].items()}
    for file in set(found.values()):
        if "/" in file or inside(path.parent, file).suffix not in (".safetensors", ".bin"):
            raise DataError(f"{path}: names {file!r:.200}, which is no weight file beside it; fetch it again")
    return found


def load_whole(cls: Any, folder: Path, field: str, unused: Iterable[str] = (), **options: Any) -> Any:
    """``cls.from_pretrained(folder)`` of transformers or diffusers, every tensor from the folder and none left over.

    Where the folder holds weights of one variant alone (fp16), those are read. ``unused`` are prefixes of tensors that
    it may hold for parts of the model that are not wanted.

    Raises:
        DataError: it does not load, or names what is missing, unexpected or of another shape, or a file elsewhere.
    """
    for index in folder.glob("*.index.json"):
        weight_index(index)
    variants = {found[1] for file in folder.iterdir() if (found := _WEIGHTS.match(file.name))}
    options |= {"variant": variants.pop() if len(variants) == 1 else None, "local_files_only": True}
    try:
        model, found = cls.from_pretrained(
            str(folder), output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        raise DataError(f"{folder}: {cls.__name__} does not load ({error}); fetch {field} again") from error
    surplus = [name for name in found["unexpected_keys"] if not name.startswith(tuple(unused))]
    wrong = [f"{name} {tuple(there)} for {tuple(here)}" for name, there, here in found["mismatched_keys"]]
    every = (*model.named_parameters(), *model.named_buffers())
    missing = {*found["missing_keys"], *(name for name, tensor in every if tensor.is_meta)}  # diffusers may not tell
    refuse_partial(str(folder), missing, surplus, wrong, f"fetch {field} again, or name another")
    return model


def refuse_partial(
    where: str,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Collection[str],
    remedy: str,
    error: type[WavError] = DataError,
) -> None:
    """Raise ``error`` unless weights and model have the same tensors: no list may hold a name."""
    kinds: Mapping[str, Collection[str]] = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
    }
    problems = [listing(kind, sorted(names)) for kind, names in kinds.items() if names]
    if problems:
        raise error(f"{where}: parameters {'; '.join(problems)}; {remedy}")


def listing(kind: str, names: Collection[str]) -> str:
    """``5 missing (a, b, c, d and 1 more)``."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{len(names)} {kind} ({', '.join([*names][:4])}{more})"


def content_digest(files: Iterable[Path]) -> str:
    """Digest of files by name and content, the same however they were fetched."""
    return canonical_digest([[file.name, file_digest(file)] for file in sorted(files, key=lambda f: f.name)])


def write_reference(folder: Path, source: str, digest: str) -> None:
    """Record in ``folder`` that its weights are those of the hub id ``source`` with this digest."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REFERENCE_FILE, {"source": source, "digest": digest})


def read_reference(folder: Path) -> tuple[str, str] | None:
    """Hub id and digest recorded in ``folder``, or None where the folder holds the weights themselves.

    Raises:
        DataError: the file there names no source.
    """
    file = folder / REFERENCE_FILE
    if not file.is_file():
        return None
    content = read_json(file, "run the encode stage again")
    try:
        return str(content["source"]), str(content["digest"])
    except (KeyError, TypeError):
        raise DataError(f"{file}: {json.dumps(content)[:80]} names no source; run the encode stage again") from None
