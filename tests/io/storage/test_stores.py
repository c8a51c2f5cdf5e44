"""Both stores keep the same promises; S3 is tested against a real SeaweedFS."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path

import pytest

from wav.errors import ConfigError, StorageError
from wav.io.storage import ObjectStore, open_store


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.services)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return open_store((tmp_path / "store").as_uri())
    server = request.getfixturevalue("s3_server")
    return open_store(f"s3://{server.bucket}/{tmp_path.name}", server.endpoint)


def test_file_roundtrip_with_digest(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    source.write_bytes(bytes(range(256)) * 1000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    store.check()
    info = store.put_file(source, "x/y/a.bin")
    assert (info.key, info.size, info.sha256) == ("x/y/a.bin", 256000, digest)
    store.get_file("x/y/a.bin", tmp_path / "back" / "a.bin", digest)
    assert (tmp_path / "back" / "a.bin").read_bytes() == source.read_bytes()
    assert [o.key for o in store.list("x/")] == ["x/y/a.bin"]
    assert store.list("nothing/") == []
    assert store.head("x/y/none") is None


def test_wrong_digest_leaves_no_file(store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes("a", b"content")
    with pytest.raises(StorageError, match="SHA-256"):
        store.get_file("a", tmp_path / "a", "0" * 64)
    assert [p.name for p in tmp_path.iterdir() if p.name != "store"] == []


def test_conditional_writes(store: ObjectStore) -> None:
    first = store.put_if_absent("champion", b"1")
    assert first is not None
    assert store.put_if_absent("champion", b"2") is None
    assert store.get_bytes("champion") == b"1"
    assert store.put_if_match("champion", b"3", first.etag) is not None
    assert store.put_if_match("champion", b"4", first.etag) is None
    assert store.get_bytes("champion") == b"3"
    assert store.put_if_match("absent", b"4", first.etag) is None


def test_delete_and_purge(store: ObjectStore) -> None:
    store.put_bytes("a", b"1")
    store.put_bytes("a", b"2")
    store.put_bytes("ab", b"other")
    store.delete("a")
    assert store.head("a") is None
    store.delete("a")
    store.purge("a")
    assert store.versions("a") == []
    assert store.get_bytes("ab") == b"other"


def test_missing_object_is_named(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing/here.*no such object"):
        store.get_bytes("nothing/here")
    with pytest.raises(StorageError, match=r"nothing/here.*no such object"):
        store.get_file("nothing/here", tmp_path / "f")
    with pytest.raises(StorageError, match="relative"):
        store.put_bytes("../escape", b"")


def test_s3_versions(s3_server, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3_server.bucket}/{tmp_path.name}", s3_server.endpoint)
    first = store.put_bytes("v", b"1")
    store.put_bytes("v", b"2")
    versions = store.versions("v")
    assert len(versions) == 2
    assert first.version in {v.version for v in versions}
    assert store.get_bytes("v", first.version) == b"1"
    store.delete("v")
    assert store.get_bytes("v", first.version) == b"1"


def test_s3_multipart(s3_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wav.io.storage.s3.PART_BYTES", 5 << 20)
    store = open_store(f"s3://{s3_server.bucket}/{tmp_path.name}", s3_server.endpoint)
    source = tmp_path / "big"
    source.write_bytes(hashlib.sha256(b"x").digest() * (12 << 15))
    info = store.put_file(source, "big")
    assert info.etag.strip('"').endswith("-3")  # three parts
    store.get_file("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_s3_refuses_wrong_secret(s3_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{s3_server.bucket}", s3_server.endpoint).check()


def test_s3_missing_bucket(s3_server) -> None:
    with pytest.raises(StorageError, match="bucket does not exist"):
        open_store("s3://no-such-bucket", s3_server.endpoint).check()


def test_s3_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no S3 credentials"):
        open_store("s3://bucket", "http://127.0.0.1:9")


def test_s3_server_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    from wav.io.storage.s3 import S3Store

    with pytest.raises(StorageError, match="make up"):
        S3Store("bucket", endpoint="http://127.0.0.1:9", attempts=1).check()


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "f").write_bytes(b"data")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="disk is full"):
        store.put_file(tmp_path / "f", "k")
    assert store.list("") == []


@pytest.mark.parametrize("url", ["http://x", "s3://", "folder", "file://host/x"])
def test_unknown_url(url: str) -> None:
    with pytest.raises(ConfigError, match="WAV_STORE"):
        open_store(url)
