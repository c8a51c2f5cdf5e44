"""Exports on the Hugging Face hub: ``wav push EXPORT USER/NAME``, ``wav pull USER/NAME``, ``Policy.load("USER/NAME")``.

What is pushed is what the manifest lists, the manifest and the card, in one commit. What is pulled is verified like any
other export; files that others have put beside it are not fetched. Who may do what is huggingface_hub's matter: its
login, or ``HF_TOKEN``. Nothing of that is read or written here.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wav.errors import CheckpointError, DataError, ServiceError, WavError, cut
from wav.hub import is_hub_id, silence_ends
from wav.io.files import MANIFEST, atomic_folder, check_format, manifest_files, read_json
from wav.io.readers import understood
from wav.policy.export import CARD, FORMAT, VERSION, verify_export

PLACEHOLDER = "USER/NAME"
"""Stands for the repository in a card."""
_FOLDERS = ("model/", "codec/", "text_encoder/")


def push(export: Path, repository: str, *, private: bool = True) -> tuple[str, str]:
    """Upload an export in one commit; the repository is made where there is none.

    Args:
        export: folder, verified first.
        repository: owner/name on the hub.
        private: whether a repository that is made is private; one that exists stays as it is.

    Returns:
        Its address and the commit.

    Raises:
        CheckpointError: the export is damaged. ServiceError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _check_name(repository)
    paths = {record.path for record in manifest_files(verify_export(export))} | {MANIFEST}
    card = (export / CARD).read_text() if (export / CARD).is_file() else ""
    if not card:
        raise CheckpointError(f"{export / CARD}: missing; a policy is not pushed without its card, export it again")
    api = HfApi()
    with _answered(repository):
        address = api.create_repo(repository, private=private, exist_ok=True)
        there = api.list_repo_files(repository)
        stale = [path for path in there if path.startswith(_FOLDERS) and path not in paths]  # of an earlier push
        adds = [CommitOperationAdd(path, str(export / path)) for path in sorted(paths)]
        adds.append(CommitOperationAdd(CARD, card.replace(PLACEHOLDER, repository).encode()))
        operations: list[Any] = [*adds, *(CommitOperationDelete(path) for path in stale)]
        commit = api.create_commit(repository, operations, commit_message="Upload policy")
    return str(address), str(commit.oid)


def pull(repository: str, folder: Path | None = None, revision: str | None = None) -> Path:
    """Download an export into the hub cache, verify it, and copy it to ``folder`` where one is given.

    A hub that cannot be reached does not matter where the cache holds the export.

    Args:
        repository: owner/name on the hub.
        folder: new folder; None: the export stays in the cache.
        revision: branch, tag or commit; None: main.

    Returns:
        ``folder``, or the folder in the cache.

    Raises:
        DataError: ``folder`` exists. CheckpointError: it is no export, or damaged. ServiceError: the hub cannot be
            reached, or refuses.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    _check_name(repository)
    if folder is not None and folder.exists():
        raise DataError(f"{folder}: exists; name a new folder")
    with _answered(repository):
        manifest = Path(hf_hub_download(repository, MANIFEST, revision=revision))
        listed = [*(record.path for record in _records(manifest)), MANIFEST, CARD]
        patterns = [glob.escape(path) for path in listed]
        cached = Path(snapshot_download(repository, revision=manifest.parent.name, allow_patterns=patterns))
    try:
        verify_export(cached)
    except CheckpointError as error:
        raise CheckpointError(f"{repository} on the hub: {error}") from None
    if folder is None:
        return cached
    with atomic_folder(folder) as new:
        for path in listed:
            if (cached / path).is_file():  # the card may have been removed
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cached / path, new / path)
    return folder


def local_export(export: str | Path) -> Path:
    """The folder of an export: ``export`` itself, or where the hub's repository of that name lies once pulled.

    Raises:
        As :func:`pull` does.
    """
    return pull(str(export)) if is_hub_id(str(export)) else Path(export)


def _records(path: Path) -> Any:
    """The files that a manifest lists."""
    remedy = "push the policy again"
    manifest = check_format(read_json(path, remedy, CheckpointError), FORMAT, VERSION, str(path), remedy)
    with understood(path, remedy, CheckpointError):
        return manifest_files(manifest)


def _check_name(repository: str) -> None:
    """Refuse what is no owner/name."""
    if not is_hub_id(repository):
        raise DataError(f"{cut(repository)}: is a folder here, or no name on the hub; write USER/NAME")


@contextlib.contextmanager
def _answered(repository: str) -> Iterator[None]:
    """Turn what goes wrong between here and the hub into one sentence, and wait for nobody for ever.

    Raises:
        ServiceError: with the remedy. CheckpointError: the repository holds no export.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        with silence_ends():
            yield
    except WavError:
        raise
    except Exception as error:  # which of the hub's errors are those of its HTTP library differs between versions
        if isinstance(error, RemoteEntryNotFoundError):
            raise CheckpointError(
                f"{repository}: holds no {MANIFEST}, so is no policy of wav; check the name"
            ) from error
        raise ServiceError(f"{repository}: {_sentence(error)}") from error


def _sentence(error: BaseException) -> str:
    """What happened and what to do about it."""
    from huggingface_hub import constants

    status: int | None = None
    cause: BaseException | None = error
    while status is None and cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__ or cause.__context__
    where = constants.ENDPOINT
    login = "run `hf auth login`, or set HF_TOKEN"
    if status == 401:
        return f"{where} does not know you, or there is no such repository (status 401); check the name, {login}"
    if status == 403:
        return f"{where} does not let you do that (status 403); {login} to a token with write access to this repository"
    if status == 404:
        return f"no such folder, and no such repository or revision on {where} that you may see; check names, {login}"
    text = cut(str(error).partition("\n")[0])
    if status is not None:
        return f"{where} answered with status {status} ({text}); try again later"
    if isinstance(error, ValueError):  # the library's own checks
        return cut(error)
    return f"{where} cannot be reached ({type(error).__name__}: {text}); check the network, HF_ENDPOINT and proxies"
