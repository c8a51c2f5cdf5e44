"""Uploads and downloads through a network and a server that fail in every way we know of."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ResponseStreamingError

from tests.helpers.fault_proxy import FaultProxy
from wav.errors import StorageError
from wav.io.storage.base import TransferError
from wav.io.storage.commit import commits, fetch, publish, seal, verify
from wav.io.storage.s3 import S3Store
from wav.io.storage.s3_errors import told_whole

RECOVERS = ("reset", "reset_after", "error500", "slow_down", "corrupt_upload")
REFUSES = {
    "clock_skew": "clock",
    "no_bucket": "bucket does not exist",
    "bad_key": "AWS_ACCESS_KEY_ID",
    "disk_full": "no space left on device",
}


@pytest.fixture
def proxy(s3_server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(s3_server, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    return S3Store(s3_server.bucket, tmp_path.name, endpoint=proxy.endpoint, attempts=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "commit"
    folder.mkdir()
    (folder / "a.bin").write_bytes(os.urandom(100_000))
    (folder / "b.bin").write_bytes(os.urandom(1000))
    seal(folder, {"step": 1})
    return folder


@pytest.mark.parametrize("kind", [kind for kind in RECOVERS if kind != "corrupt_upload"])
def test_upload_recovers(kind: str, store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path) -> None:
    """Two failures of the same upload in a row; the commit is whole."""
    fault = proxy.arm(kind, method="PUT", path=r"a\.bin", times=2)
    publish(store, folder, "run/x")
    assert fault.hits == 2
    proxy.clear()
    fetch(store, "run/x", tmp_path / "back")
    assert verify(tmp_path / "back")
    assert (tmp_path / "back" / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()


def test_corrupted_upload_is_refused_by_the_server(store: S3Store, proxy: FaultProxy, folder: Path) -> None:
    proxy.arm("corrupt_upload", method="PUT", path=r"a\.bin", times=-1)
    with pytest.raises(StorageError, match=r"a\.bin"):
        publish(store, folder, "run/x")
    assert commits(store, "run") == []
    proxy.clear()
    publish(store, folder, "run/x")
    assert commits(store, "run") == ["run/x"]


@pytest.mark.parametrize("kind", [*REFUSES, "reset", "error500", "slow_down"])
@pytest.mark.parametrize("where", [r"b\.bin", "manifest"])
def test_upload_that_cannot_succeed_shows_nothing(
    kind: str, where: str, store: S3Store, proxy: FaultProxy, folder: Path
) -> None:
    """An error that says why; no commit is visible; the same call succeeds once the cause is gone."""
    fault = proxy.arm(kind, method="PUT", path=where, times=-1)
    with pytest.raises(StorageError, match=REFUSES.get(kind, "try again|check the network")):
        publish(store, folder, "run/x")
    assert fault.hits
    proxy.clear()
    assert commits(store, "run") == []
    publish(store, folder, "run/x")
    assert commits(store, "run") == ["run/x"]


@pytest.mark.parametrize("kind", ["reset", "reset_after", "error500", "slow_down", "truncate", "corrupt"])
def test_download_recovers(kind: str, store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path) -> None:
    publish(store, folder, "run/x")
    fault = proxy.arm(kind, method="GET", path=r"a\.bin", times=1)
    fetch(store, "run/x", tmp_path / "back")
    assert fault.hits == 1
    assert verify(tmp_path / "back")
    assert not list(tmp_path.glob(".*"))


def test_broken_download_goes_on_where_it_stopped(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    """Even in another process: files that have arrived stay beside the target, and only the others are asked for."""
    publish(store, folder, "run/x")
    proxy.arm("truncate", method="GET", path=r"a\.bin", times=1)
    rest = proxy.arm("reset", method="GET", path=r"a\.bin", times=-1)
    with pytest.raises(TransferError, match=r"a\.bin"):
        fetch(store, "run/x", tmp_path / "back")
    assert rest.hits
    assert not (tmp_path / "back").exists()
    proxy.clear()
    proxy.requests.clear()
    fetch(store, "run/x", tmp_path / "back")
    assert verify(tmp_path / "back")
    assert not any("b.bin" in path for _, path, _ in proxy.requests)
    assert not list(tmp_path.glob(".*"))


def test_stored_damage_is_refused(store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path) -> None:
    publish(store, folder, "run/x")
    fault = proxy.arm("corrupt", method="GET", path=r"a\.bin", times=-1)
    with pytest.raises(StorageError, match=r"a\.bin.*SHA-256"):
        fetch(store, "run/x", tmp_path / "back")
    assert fault.hits == 2  # once more than needed, in case the network did it
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "back").exists()


def test_full_disk_of_a_download_is_named(
    store: S3Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, folder, "run/x")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._client, "download_file", full)
    with pytest.raises(StorageError, match="disk is full"):
        fetch(store, "run/x", tmp_path / "back")
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "back").exists()


def test_wrong_clock_is_named(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real server's answer to a client whose clock is two hours late."""
    import botocore.auth

    late: Any = botocore.auth.get_current_datetime

    def early(*args: Any, **kwargs: Any) -> datetime.datetime:
        moment: datetime.datetime = late(*args, **kwargs)
        return moment - datetime.timedelta(hours=2)

    monkeypatch.setattr("botocore.auth.get_current_datetime", early)
    with pytest.raises(StorageError, match="clock"):
        store.put_bytes("x", b"1")


def test_multipart_upload_recovers(
    store: S3Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store._transfer, "multipart_threshold", 5 << 20)
    monkeypatch.setattr(store._transfer, "multipart_chunksize", 5 << 20)
    source = tmp_path / "big"
    source.write_bytes(os.urandom(11 << 20))
    faults = [proxy.arm(kind, method="PUT", path="partNumber=2") for kind in ("reset", "slow_down")]
    store.put_file(source, "big")
    assert all(fault.hits for fault in faults)
    proxy.arm("truncate", method="GET", path="/big")
    store.get_file("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    proxy.arm("error500", method="PUT", path="partNumber=3", times=-1)
    with pytest.raises(StorageError, match="InternalError"):
        store.put_file(source, "other")
    assert store.head("other") is None


TAG = {"ETag": '"0"'}


@pytest.mark.parametrize(
    ("status", "answer", "refused"),
    [
        (200, TAG | {"ContentLength": 0}, None),
        (206, TAG | {"ContentRange": "bytes 0-9/1000", "ContentLength": 10}, None),
        (206, TAG | {"ContentRange": "bytes 0-9/*", "ContentLength": 10}, ResponseStreamingError),
        (200, TAG, ResponseStreamingError),
        (200, {"LastModified": "today", "ContentLength": 1}, None),
        (200, {"ContentLength": 1}, LookupError),  # a page
        (503, {}, None),  # botocore's to say
    ],
)
def test_an_object_is_taken_only_where_the_answer_tells_of_one(
    status: int, answer: dict[str, Any], refused: type[Exception] | None
) -> None:
    with pytest.raises(refused) if refused else contextlib.nullcontext():
        told_whole(http_response=SimpleNamespace(status_code=status), parsed=answer)
