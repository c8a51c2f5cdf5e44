"""A commit is complete or invisible."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from wav.errors import StorageError
from wav.io.files import MANIFEST
from wav.io.storage import ObjectStore, open_store
from wav.io.storage.base import DamagedError
from wav.io.storage.commit import (
    Retention,
    commits,
    discard,
    fetch,
    publish,
    read_manifest,
    retain,
    seal,
    verify,
)
from wav.training.resume import newest_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store((tmp_path / "store").as_uri())


def folder_of(path: Path, content: str = "one") -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text(content)
    (path / "sub" / "b.txt").write_text(content * 2)
    return path


def test_seal_and_verify(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "c")
    with pytest.raises(StorageError, match="incomplete"):
        verify(folder)
    manifest = seal(folder, {"step": 3})
    assert [f.path for f in manifest.files] == ["a.txt", "sub/b.txt"]
    assert verify(folder) == manifest
    (folder / "a.txt").write_text("ten")
    with pytest.raises(StorageError, match=r"a\.txt: content does not match"):
        verify(folder)
    (folder / "a.txt").write_text("truncat")
    with pytest.raises(StorageError, match=r"a\.txt: too long, 7 bytes where the manifest says 3"):
        verify(folder)
    (folder / "a.txt").unlink()
    with pytest.raises(StorageError, match=r"a\.txt: missing"):
        verify(folder)


def test_publish_fetch(tmp_path: Path, store: ObjectStore) -> None:
    folder = folder_of(tmp_path / "c")
    seal(folder, {"step": 3})
    publish(store, folder, "run/step-1")
    assert commits(store, "run") == ["run/step-1"]
    assert fetch(store, "run/step-1", tmp_path / "back").meta == {"step": 3}
    assert verify(tmp_path / "back") == read_manifest(tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "b.txt").read_text() == "oneone"


class Failing:
    """A store whose uploads fail from the n-th on."""

    def __init__(self, store: ObjectStore, allowed: int) -> None:
        self._store, self.left = store, allowed

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put_file(self, path: Path, key: str) -> object:
        if self.left == 0:
            raise StorageError("the connection was reset")
        self.left -= 1
        return self._store.put_file(path, key)


def test_interrupted_upload_is_invisible_and_can_go_on(tmp_path: Path, store: ObjectStore) -> None:
    folder = folder_of(tmp_path / "c")
    seal(folder, {})
    with pytest.raises(StorageError, match="reset"):
        publish(Failing(store, 1), folder, "run/step-1")
    assert store.list("run/") != []
    assert commits(store, "run") == []
    with pytest.raises(StorageError, match="no manifest"):
        fetch(store, "run/step-1", tmp_path / "back")
    publish(store, folder, "run/step-1")
    assert commits(store, "run") == ["run/step-1"]


def test_other_content_under_a_prefix_is_never_mixed(tmp_path: Path, store: ObjectStore) -> None:
    first, second = folder_of(tmp_path / "1"), folder_of(tmp_path / "2", "two")
    seal(first, {})
    seal(second, {})
    publish(store, first, "run/x")
    with pytest.raises(StorageError, match="reset"):
        publish(Failing(store, 1), second, "run/x")
    assert commits(store, "run") == []
    publish(store, second, "run/x")
    fetch(store, "run/x", tmp_path / "back")
    assert (tmp_path / "back" / "a.txt").read_text() == "two"


def test_a_folder_that_is_replaced_leaves_nothing_of_itself(tmp_path: Path, store: ObjectStore) -> None:
    """Not even where a kill let its files wait under the name of the next download."""
    folder = folder_of(tmp_path / "c")
    seal(folder, {"step": 3})
    publish(store, folder, "run/x")
    back = folder_of(tmp_path / "back", "former")
    for _ in range(2):
        (back / "surplus").write_text("former")
        fetch(store, "run/x", back)
        assert sorted(p.name for p in back.iterdir()) == ["a.txt", MANIFEST, "sub"]
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    waiting = tmp_path / f".again.{hashlib.sha256((back / MANIFEST).read_bytes()).hexdigest()[:12]}.part"
    folder_of(waiting, "former")
    (waiting / "surplus").write_text("former")
    fetch(store, "run/x", tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["a.txt", MANIFEST, "sub"]
    assert not waiting.exists()


def test_damaged_object_is_refused(tmp_path: Path, store: ObjectStore) -> None:
    folder = folder_of(tmp_path / "c")
    seal(folder, {})
    publish(store, folder, "run/x")
    store.put_bytes("run/x/sub/b.txt", b"twotwo")
    with pytest.raises(StorageError, match="SHA-256"):
        fetch(store, "run/x", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".back*"))


def test_damaged_manifest_is_refused(tmp_path: Path, store: ObjectStore) -> None:
    folder = folder_of(tmp_path / "c")
    seal(folder, {})
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**raw, "version": 99}))
    with pytest.raises(StorageError, match="version 99 of wav-commit"):
        verify(folder)
    listed = json.dumps({**raw, "meta": [1]}).encode()
    for damage in (b"{", b"", b"[" * 5000, b"{\xff}", b'{"a": ' + b"9" * 5000, listed):
        (folder / MANIFEST).write_bytes(damage)
        with pytest.raises(DamagedError, match="damaged manifest"):
            verify(folder)


@pytest.mark.parametrize("damage", [b"[" * 5000, b"\xff\xfe", b"{"])
def test_a_checkpoint_with_a_damaged_manifest_is_passed_over(damage: bytes, tmp_path: Path, store: ObjectStore) -> None:
    """Here and in the store; the older one is gone on from."""
    work = tmp_path / "checkpoints"
    for step in (4, 8):
        seal(folder_of(work / f"step-{step:08d}", str(step)), {"step": step})
    (work / "step-00000008" / MANIFEST).write_bytes(damage)
    store.put_bytes(f"p/step-00000012/{MANIFEST}", damage)
    assert newest_checkpoint(work, store, "p") == work / "step-00000004"


def test_a_damaged_manifest_holds_up_no_other_commit(tmp_path: Path, store: ObjectStore) -> None:
    """A run that goes on from an older checkpoint comes to that step again, and thins out what it has."""
    folder = folder_of(tmp_path / "a", "x")
    seal(folder, {"step": 1})
    for step in (1, 2, 3):
        publish(store, folder, f"p/step-{step}")
    store.put_bytes(f"p/step-1/{MANIFEST}", b"{")
    assert retain(store, "p", Retention(last=2, best=1)) == ["p/step-1"]
    store.put_bytes(f"p/step-3/{MANIFEST}", b"{")
    publish(store, folder, "p/step-3")
    assert fetch(store, "p/step-3", tmp_path / "b").meta == {"step": 1}


def test_retention(tmp_path: Path, store: ObjectStore) -> None:
    for step in range(4):
        folder = folder_of(tmp_path / str(step), str(step))
        seal(folder, {"step": step})
        publish(store, folder, f"run/step-{step}")
    assert retain(store, "run", Retention(2)) == ["run/step-0", "run/step-1"]
    assert commits(store, "run") == ["run/step-2", "run/step-3"]
    assert store.list("run/step-0") == []
    discard(store, "run/step-3")
    assert commits(store, "run") == ["run/step-2"]


def test_s3_commit_records_versions(s3_server, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3_server.bucket}/{tmp_path.name}", s3_server.endpoint)
    folder = folder_of(tmp_path / "c")
    seal(folder, {"step": 1})
    first = publish(store, folder, "run/x")
    assert all(entry.version for entry in first.files)
    (folder / "a.txt").write_text("changed")
    seal(folder, {"step": 2})
    publish(store, folder, "run/x")
    assert store.get_bytes("run/x/a.txt", first.files[0].version) == b"one"
    fetch(store, "run/x", tmp_path / "back")
    assert (tmp_path / "back" / "a.txt").read_text() == "changed"
    discard(store, "run/x")
    assert store.versions("run/x/a.txt") == []
