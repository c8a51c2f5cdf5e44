"""Which checkpoint a run goes on from, where the store falters, lags, lies or holds more than this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wav.errors import CheckpointError, StorageError
from wav.io.files import MANIFEST
from wav.io.storage import ObjectInfo
from wav.io.storage.base import TransferError
from wav.io.storage.commit import Retention, publish, seal
from wav.io.storage.file import FileStore
from wav.training import resume
from wav.training.checkpoint import Checkpoints
from wav.training.engine import World
from wav.training.resume import newest_checkpoint
from wav.training.universal import Layout

PREFIX = "training/stage/key/checkpoints"


class Faulty(FileStore):
    """A folder whose operations first meet what ``trouble`` raises, and whose listing may be old."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.trouble: Callable[[str], None] = lambda operation: None
        self.stale = False

    def list(self, prefix: str) -> list[ObjectInfo]:
        self.trouble("list")
        return [] if self.stale else super().list(prefix)

    def head(self, key: str) -> ObjectInfo | None:
        self.trouble("head")
        return super().head(key)

    def get_bytes(self, key: str, version: str = "") -> bytes:
        self.trouble("get")
        return super().get_bytes(key, version)

    def get_file(self, key: str, path: Path, sha256: str = "", version: str = "") -> ObjectInfo:
        self.trouble("get")
        return super().get_file(key, path, sha256, version)


class Outage:
    """Every operation, or one kind, fails ``times`` times."""

    def __init__(self, times: int, kind: type[StorageError] = TransferError, only: str = "") -> None:
        self.left, self.kind, self.only = times, kind, only

    def __call__(self, operation: str) -> None:
        if self.left and self.only in ("", operation):
            self.left -= 1
            raise self.kind("s3://wav: the server answered 503 SlowDown")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting costs no time; returns the waits."""
    waits: list[float] = []
    monkeypatch.setattr("wav.io.storage.base.time.sleep", waits.append)
    monkeypatch.setattr("wav.io.storage.base.time.monotonic", lambda: sum(waits))
    return waits


@pytest.fixture
def store(tmp_path: Path) -> Faulty:
    return Faulty(tmp_path / "store")


def checkpoint(folder: Path, step: int) -> Path:
    place = folder / f"step-{step:08d}"
    place.mkdir(parents=True)
    (place / "state").write_text(str(step))
    seal(place, {"step": step})
    return place


def upload(store: Faulty, folder: Path, *steps: int) -> None:
    for step in steps:
        place = checkpoint(folder, step)
        publish(store, place, f"{PREFIX}/{place.name}")
        resume.announce(store, PREFIX, place.name)


def chosen(store: Faulty, folder: Path) -> str | None:
    found = newest_checkpoint(folder, store, PREFIX)
    return None if found is None else (found / "state").read_text()


@pytest.mark.parametrize("only", ["", "list", "head", "get"])
def test_a_store_in_trouble_is_waited_for(only: str, store: Faulty, tmp_path: Path, clock: list[float]) -> None:
    """Half a minute of 503, or a server that is restarted: the run goes on from the newest, not from step 0."""
    upload(store, tmp_path / "other machine", 12, 20)
    store.trouble = Outage(6, only=only)
    assert chosen(store, tmp_path / "here") == "20"
    assert len(clock) == 6


@pytest.mark.parametrize("only", ["list", "head", "get"])
@pytest.mark.parametrize("kind", [TransferError, StorageError])
def test_trouble_that_stays_ends_the_run(
    only: str, kind: type[StorageError], store: Faulty, tmp_path: Path, clock: list[float]
) -> None:
    """A refusal (another kind than trouble) is said at once; what was trained is never taken for nothing."""
    upload(store, tmp_path / "other machine", 12, 20)
    store.trouble = Outage(10**6, kind, only)
    with pytest.raises(kind, match="503"):
        chosen(store, tmp_path / "here")
    assert bool(clock) is (kind is TransferError)
    assert not list((tmp_path / "here").glob("step-*"))


def test_the_newest_of_both_wins(store: Faulty, tmp_path: Path) -> None:
    """A machine that was away holds step 4, the store 12 and 24; and the other way round, not uploaded yet."""
    upload(store, tmp_path / "other machine", 12, 24)
    checkpoint(tmp_path / "away", 4)
    assert chosen(store, tmp_path / "away") == "24"
    checkpoint(tmp_path / "ahead", 30)
    assert chosen(store, tmp_path / "ahead") == "30"
    assert chosen(store, tmp_path / "other machine") == "24"


def test_damage_is_passed_over_with_a_line(store: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged local one comes back from the store, a damaged stored one gives way to the one before."""
    upload(store, tmp_path / "here", 12, 24)
    (tmp_path / "here" / "step-00000024" / "state").write_text("42")
    assert chosen(store, tmp_path / "here") == "24"
    assert "step-00000024/state: content does not match" in caplog.text
    store.put_bytes(f"{PREFIX}/step-00000024/state", b"42")
    assert chosen(store, tmp_path / "new") == "12"
    store.delete(f"{PREFIX}/step-00000012/state")
    assert chosen(store, tmp_path / "newer") is None
    assert "step-00000012/state: no such object" in caplog.text


def test_a_checkpoint_that_does_not_say_how_it_is_cut_is_one_sentence(store: Faulty, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "work", 4)
    one = World(0, 1, torch.device("cpu")), Layout(1, 0, "fp32")
    with pytest.raises(CheckpointError, match=f"{folder.name}/manifest.json: lacks 'ranks'.*delete the folder and run"):
        Checkpoints(tmp_path / "work", store, "training/stage/key", Retention(), *one).find()


def test_a_damaged_checkpoint_holds_up_no_thinning_out(store: Faulty, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        folder = checkpoint(tmp_path / "work", step)
        if step < 6:
            (folder / MANIFEST).write_bytes(b"{")
    one = World(0, 1, torch.device("cpu")), Layout(1, 0, "fp32")
    Checkpoints(tmp_path / "work", store, "training/stage/key", Retention(last=2), *one)._prune()
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["step-00000004", "step-00000006"]


def test_an_old_listing_loses_nothing(store: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upload(store, tmp_path / "other machine", 12, 24)
    store.stale = True
    assert chosen(store, tmp_path / "here") == "24"
    assert "the store's list lacks step-00000024" in caplog.text


def test_starting_over_is_said(store: Faulty, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wav.training"):
        assert chosen(store, tmp_path / "here") is None
    assert (
        f"no checkpoint of this run in {tmp_path / 'here'} or {store.uri(PREFIX)}: it starts at step 0" in caplog.text
    )
    store.put_bytes(f"{PREFIX}/newest", b"../../evil")
    assert chosen(store, tmp_path / "here") is None


def test_what_a_kill_left_is_swept(store: Faulty, tmp_path: Path) -> None:
    whole, half = checkpoint(tmp_path / "here", 12), checkpoint(tmp_path / "here", 4)
    (half / "manifest.json").unlink()
    half.with_name(".step-00000002.gone").mkdir()
    assert chosen(store, tmp_path / "here") == "12"
    assert list((tmp_path / "here").iterdir()) == [whole]


def test_what_was_half_made_goes_once_a_checkpoint_is_found_and_no_sooner(store: Faulty, tmp_path: Path) -> None:
    """Of a checkpoint's size each; a download that broke off is what the next try goes on from."""
    upload(store, tmp_path / "other machine", 12, 20)
    here = tmp_path / "here"
    for name in (".step-00000008.part", ".step-00000012.0123456789ab.part", ".step-00000016.universal"):
        (here / name).mkdir(parents=True)
    store.trouble = Outage(10**6, only="get")
    with pytest.raises(TransferError):
        chosen(store, here)
    assert len(list(here.glob(".step-*"))) == 3
    store.trouble = Outage(0)
    assert chosen(store, here) == "20"
    assert sorted(path.name for path in here.iterdir()) == ["step-00000020"]
