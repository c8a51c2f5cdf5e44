"""Every kind of S3 fault in every operation, once and always; and servers that lack a part of S3.

Seed 0 breaks an operation's first request, other seeds one drawn among all that it makes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.tally import Tally, WrongError, blocks
from tests.helpers.fake_s3 import FakeS3
from tests.helpers.fault_proxy import ANSWERS, KINDS, FaultProxy
from wav.errors import StorageError, WavError
from wav.io.storage import open_store, s3
from wav.io.storage.base import TransferError
from wav.io.storage.commit import fetch, publish, seal
from wav.io.storage.s3 import S3Store

ALL = (*KINDS, *ANSWERS)
DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys of no use, and no long waits."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(s3, "BACKOFF_429_S", 0.01)
    monkeypatch.setattr(s3, "READ_S", 1)
    monkeypatch.setattr(s3, "REACH_READ_S", 1)
    monkeypatch.setattr("tests.helpers.fault_proxy.SILENCE_S", 1.5)


@pytest.fixture
def server() -> Iterator[FakeS3]:
    with FakeS3() as server:
        yield server


def same(found: object, wanted: object) -> None:
    """WrongError where an operation gives something else."""
    if found != wanted:
        raise WrongError(f"{str(found)[:80]} where {str(wanted)[:80]} is right")


def operations(store: S3Store, folder: Path) -> dict[str, Callable[[], None]]:
    """What a store is asked for; each raises WrongError where the answer is not the right one."""
    source, target = folder / "source", folder / "target"

    def committed() -> None:
        publish(store, folder / "commit", "run/x")

    def fetched() -> None:
        fetch(store, "there/commit", folder / "back")
        same((folder / "back/a.bin").read_bytes(), DATA)

    def downloaded() -> None:
        store.get_file("there/file", target)
        same(target.read_bytes(), DATA)

    return {
        "check": store.check,
        "reach": store.reach,
        "put_bytes": lambda: same(store.put_bytes("new/bytes", DATA).size, len(DATA)),
        "put_file": lambda: same(store.put_file(source, "new/file").size, len(DATA)),
        "get_bytes": lambda: same(store.get_bytes("there/file"), DATA),
        "get_file": downloaded,
        "head": lambda: same(getattr(store.head("there/file"), "size", None), len(DATA)),
        "list": lambda: same([info.key for info in store.list("there/f")], ["there/file"]),
        "claim": lambda: same(getattr(store.put_if_absent("new/claim", DATA), "size", None), len(DATA)),
        "absent": lambda: same(store.put_if_absent("there/file", b"x"), None),
        "delete": lambda: store.delete("there/other"),
        "versions": lambda: same(len(store.versions("there/file")), 1),
        "publish": committed,
        "fetch": fetched,
    }


#: a server that says so plainly that an object is not there, or a condition lost, is believed
BELIEVED = {("no_key", name) for name in ("head", "absent", "claim")}
BELIEVED |= {(kind, name) for kind in ("precondition", "conflict") for name in ("absent", "claim")}
#: an answer to HEAD has no text: that there is no bucket, or what an object's digest is, cannot be told from it
BELIEVED |= {(kind, "head") for kind in ("no_bucket", "no_metadata")}


#: operation -> what a success has stored
WRITTEN = {"put_bytes": "new/bytes", "put_file": "new/file", "claim": "new/claim", "publish": "run/x/a.bin"}


def run_kind(kind: str, times: int, server: FakeS3, folder: Path, tally: Tally, share: slice) -> None:
    """One kind of fault in some operations; afterwards what was said to be saved is there."""
    (folder / "source").write_bytes(DATA)
    (folder / "commit").mkdir()
    (folder / "commit/a.bin").write_bytes(DATA)
    seal(folder / "commit", {"step": 1})
    sound = S3Store("b", endpoint=server.endpoint, attempts=2)
    sound.put_file(folder / "source", "there/file")
    publish(sound, folder / "commit", "there/commit")
    with FaultProxy(server.endpoint) as proxy:
        for name in list(operations(sound, folder))[share]:
            proxy.clear()
            store = S3Store("b", endpoint=proxy.endpoint, attempts=3)
            store._conditions = True  # what a sound check() has learnt
            after = drawn(tally, proxy, operations(store, folder)[name]) if tally.seed else 0
            forget(server, folder)
            proxy.arm(kind, times=times, after=after)
            with tally.case(tally.counts["cases"], f"{kind} {name} {times} after {after}"):
                try:
                    operations(store, folder)[name]()
                except WrongError:
                    if (kind, name) not in BELIEVED:
                        raise
                if name in WRITTEN and (kind, name) not in BELIEVED:
                    same(server.objects.get(WRITTEN[name], (b"",))[0], DATA)
    same(sound.get_bytes("there/file"), DATA)


def forget(server: FakeS3, folder: Path) -> None:
    """Take away what an operation has made, so that a case cannot pass by what an earlier one made."""
    for key in [key for key in server.objects if key.startswith(("new/", "run/"))]:
        del server.objects[key]
    shutil.rmtree(folder / "back", ignore_errors=True)
    (folder / "target").unlink(missing_ok=True)


def drawn(tally: Tally, proxy: FaultProxy, operation: Callable[[], None]) -> int:
    """How many of an operation's requests to let through, of as many as it makes undisturbed."""
    before = len(proxy.requests)
    operation()
    return int(tally.random(tally.counts["cases"]).integers(len(proxy.requests) - before))


@pytest.mark.services
@blocks(3, len(ALL), 9)
def test_s3_faults(
    numbers: range,
    seed: int,
    server: FakeS3,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, Any], None],
) -> None:
    always = "slice" in request.node.name  # a fifth of the operations
    tally = Tally(seed, "s3")
    for number, kind in enumerate(("too_many", "html", "truncate") if always else (ALL[n] for n in numbers)):
        for times in (1, -1):
            folder = tmp_path / f"{kind}{times}"
            folder.mkdir()
            run_kind(kind, times, server, folder, tally, slice(number, None, 5) if always else slice(None))
    record_property("kinds", len(numbers))
    tally.finish(record_property)


@pytest.mark.parametrize("kind", ["empty", "html"])
def test_a_page_is_no_receipt(kind: str, server: FakeS3) -> None:
    """Status 200 from something between that stores nothing: no commit and no champion is taken for written."""
    with FaultProxy(server.endpoint) as proxy:
        store = S3Store("b", endpoint=proxy.endpoint, attempts=2)
        store._conditions = True
        proxy.arm(kind, times=-1)
        for write in (store.put_bytes, store.put_if_absent):
            with pytest.raises(StorageError, match="not an S3 server's"):
                write("a", DATA)
    assert not server.objects


def test_who_has_won_knows_it_although_the_answer_was_lost(server: FakeS3) -> None:
    with FaultProxy(server.endpoint) as proxy:
        store, other = S3Store("b", endpoint=proxy.endpoint), S3Store("b", endpoint=server.endpoint)
        store._conditions = other._conditions = True
        proxy.arm("reset_after", method="PUT")
        assert store.put_if_absent("champion", b"mine") is not None
        proxy.arm("reset", method="PUT")
        assert other.put_if_absent("next", b"theirs") is not None
        assert store.put_if_absent("next", b"mine") is None


def test_an_object_that_is_replaced_while_it_is_read_can_be_asked_for_again(server: FakeS3, tmp_path: Path) -> None:
    with FaultProxy(server.endpoint) as proxy:
        store = S3Store("b", endpoint=proxy.endpoint)
        store.put_bytes("a", DATA)
        proxy.arm("precondition", method="GET")
        with pytest.raises(TransferError, match="replaced while it was read; try again"):
            store.get_file("a", tmp_path / "a")
        store.get_file("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("kind", ["too_many", "too_many_html"])
def test_too_many_requests_is_asked_again(kind: str, server: FakeS3) -> None:
    with FaultProxy(server.endpoint) as proxy:
        store = S3Store("b", endpoint=proxy.endpoint, attempts=3)
        for operation in (lambda: store.put_bytes("a", DATA), lambda: same(store.get_bytes("a"), DATA)):
            fault = proxy.arm(kind)
            operation()
            assert fault.hits == 1


def test_the_kinds_are_at_least_forty() -> None:
    assert len(set(ALL)) >= 40


def test_a_server_without_checksums_is_written_to_and_read_back() -> None:
    with FakeS3("checksums") as server:
        store = open_store("s3://b", server.endpoint)
        store.check()
        assert store.put_bytes("a", DATA).size == len(DATA)
        with FaultProxy(server.endpoint) as proxy:
            beside = open_store("s3://b", proxy.endpoint)
            beside.check()
            proxy.arm("corrupt_upload", method="PUT", times=-1)
            with pytest.raises(StorageError, match="damaged"):
                beside.put_bytes("a", DATA)


def test_a_server_that_ignores_conditions_gets_no_champion(tmp_path: Path) -> None:
    with FakeS3("conditions") as server:
        store = open_store("s3://b", server.endpoint)
        store.check()
        with pytest.raises(StorageError, match="ignores conditions"):
            store.put_if_absent("champion", b"1")
        assert "champion" not in server.objects


def test_a_server_without_versions_is_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with FakeS3() as server:
        open_store("s3://b", server.endpoint).check()
    assert "keeps no versions" not in caplog.text
    with FakeS3("versions") as server:
        store = open_store("s3://b", server.endpoint)
        store.check()
        assert "s3://b: the bucket keeps no versions, so no champion can be rolled back" in caplog.text
        assert "put-bucket-versioning --bucket b " in caplog.text
        store.put_bytes("a", b"1")
        assert len(store.versions("a")) == 1
        assert set(server.objects) == {"a"}


def test_another_region_is_named_and_can_be_set() -> None:
    with FakeS3(region="garage") as server:
        with pytest.raises(WavError, match="WAV_S3_REGION"):
            open_store("s3://b", server.endpoint).check()
        open_store("s3://b", server.endpoint, "garage").check()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_PROFILE": "lab-prod"}, "AWS_PROFILE"),
        ({"AWS_CONFIG_FILE": "broken"}, "AWS configuration"),
    ],
)
def test_settings_of_aws_that_do_not_hold(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken").write_text("[profile\nregion")
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WavError, match=words):
        open_store("s3://b", "https://127.0.0.1:9").check()
