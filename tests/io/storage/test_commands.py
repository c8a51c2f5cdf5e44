"""``wav storage``: what it shows, fetches, checks and removes; keys of accounts never reach a file or a line."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.io.storage.test_commit import folder_of
from wav.cli import main
from wav.errors import ConfigError, StorageError
from wav.io.files import MANIFEST
from wav.io.storage import ObjectStore, open_store
from wav.io.storage.commands import gc, get, ls, verify
from wav.io.storage.commit import Retention, commits, publish, seal

RUN = "training/pretrain_video/key"
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.services)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Four checkpoints of a run, its weights, and an upload that was cut off."""
    if request.param == "file":
        store = open_store((tmp_path / "store").as_uri())
    else:
        server = request.getfixturevalue("s3_server")
        store = open_store(f"s3://{server.bucket}/{tmp_path.name}", server.endpoint)
    for step, loss in enumerate((0.4, 0.1, 0.3, 0.2), 1):
        folder = folder_of(tmp_path / str(step), str(step))
        seal(folder, {"step": step * 100, "validation_loss": loss})
        publish(store, folder, f"{RUN}/checkpoints/step-{step * 100:08d}")
    folder = folder_of(tmp_path / "model")
    seal(folder, {"stage": "pretrain_video"})
    publish(store, folder, f"{RUN}/model")
    store.put_bytes(f"{RUN}/checkpoints/step-00000500/engine/part.pt", b"half")
    return store


def test_ls(store: ObjectStore) -> None:
    lines = list(ls(store))
    assert len(lines) == 6
    assert f"{RUN}/checkpoints/step-00000100  2 files" in lines[0]
    assert "step=100  validation_loss=0.4" in lines[0]
    assert "INCOMPLETE  1 objects" in lines[-1]
    assert "step-00000500" in lines[-1]
    assert [line.split("  ")[0] for line in ls(store, f"{RUN}/model")] == [store.uri(f"{RUN}/model")]
    store.put_bytes(f"{RUN}/model/{MANIFEST}", b"{")
    assert any("DAMAGED" in line for line in ls(store))


def test_get_and_verify(store: ObjectStore, tmp_path: Path) -> None:
    commit = f"{RUN}/checkpoints/step-00000200"
    assert "2 files" in get(store, commit, tmp_path / "back")
    assert (tmp_path / "back" / "a.txt").read_text() == "2"
    with pytest.raises(StorageError, match="exists already"):
        get(store, commit, tmp_path / "back")
    assert list(verify(store, commit)) == ["good a.txt", "good sub/b.txt"]
    with pytest.raises(StorageError, match="no manifest"):
        list(verify(store, f"{RUN}/checkpoints/step-00000500"))
    store.purge(f"{commit}/sub/b.txt")
    assert [line.split()[0] for line in verify(store, commit)] == ["good", "BAD"]


def test_gc_keeps_last_best_and_every(store: ObjectStore) -> None:
    names = [f"{RUN}/checkpoints/step-{step:08d}" for step in (100, 200, 300, 400)]
    would = list(gc(store, Retention(last=1, best=1, every=300)))
    assert would == [f"would remove {store.uri(names[0])}"]
    assert commits(store, f"{RUN}/checkpoints") == names
    assert list(gc(store, Retention(last=1, best=1), delete=True)) == [
        f"removed {store.uri(name)}" for name in (names[0], names[2])
    ]
    assert commits(store, f"{RUN}/checkpoints") == [names[1], names[3]]
    assert store.versions(f"{names[0]}/a.txt") == []
    assert any("step-00000500" in line for line in gc(store, Retention(), older_s=-60, delete=True))
    assert store.list(f"{RUN}/checkpoints/step-00000500") == []
    assert store.head(f"{RUN}/model/{MANIFEST}") is not None  # weights stay


def test_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("WAV_STORE", (tmp_path / "store").as_uri())
    store = open_store((tmp_path / "store").as_uri())
    folder = folder_of(tmp_path / "c")
    seal(folder, {"step": 3})
    publish(store, folder, f"{RUN}/checkpoints/step-00000003")
    assert main(["storage", "ls"]) == 0
    assert "step=3" in capsys.readouterr().out
    assert main(["storage", "ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["facts"], row["files"]) == ("complete", {"step": 3}, len(list(folder.iterdir())) - 1)
    assert main(["storage", "verify", f"{RUN}/checkpoints/step-00000003"]) == 0
    store.put_bytes(f"{RUN}/checkpoints/step-00000003/a.txt", b"two")
    assert main(["storage", "verify", f"{RUN}/checkpoints/step-00000003"]) == 1
    assert main(["storage", "get", f"{RUN}/checkpoints/step-00000003", str(tmp_path / "back")]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert main(["storage", "gc"]) == 0
    assert commits(store, f"{RUN}/checkpoints")


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    for url, endpoint in [("s3://key:secret@bucket", ""), ("s3://bucket", "http://key:secret@127.0.0.1:1")]:
        with pytest.raises(ConfigError, match="holds credentials") as caught:
            open_store(url, endpoint)
        assert "secret" not in str(caught.value).replace("AWS_SECRET_ACCESS_KEY", "")


KEYS = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|(?i:aws_secret_access_key|aws_session_token)\s*[=:]\s*['\"]?[A-Za-z0-9/+]{16,}"
)


def test_no_keys_in_the_project() -> None:
    """Parameters, presets, code, documents and everything else that is committed."""
    assert KEYS.search("AWS_SECRET_ACCESS_KEY=" + "abcdEFGH0123" * 3)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {*listed.stdout.split("\0"), "params.yaml"} - {""}
    for name in sorted(names):
        path = PROJECT / name
        if path.is_file() and path.stat().st_size < 5 << 20:
            assert not KEYS.search(path.read_text(errors="replace")), f"{name} holds a key"
