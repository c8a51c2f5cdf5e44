"""The local services for real, on free ports: up, idempotent, used by a flow, missed by a flow, down; bad ports."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from botocore.exceptions import ClientError
from prefect.exceptions import PrefectHTTPStatusError

from infra import deploy
from infra.local import system
from tests.free_ports import find_free
from tests.helpers.local_services import prefect_client, variables
from wav.errors import ConfigError, ServiceError
from wav.local import adopt_local_services, ports, read_env, secrets, services, workspace
from wav.local.workspace import make_workspace
from wav.prefect_api import server_version
from wav.sim.libero import assets as libero_assets

pytestmark = pytest.mark.services

PROJECT = Path(__file__).resolve().parents[1]


def clean_environment(folder: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "WAV_"))}
    return environment | find_free() | {"WAV_LOCAL_DIR": str(folder)}


def run(environment: dict[str, str], *command: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", *command]
    return subprocess.run(full, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=180)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("services") / "local"
    environment = clean_environment(folder)
    try:
        done = run(environment, "wav.local.services", "up")
        assert done.returncode == 0, done.stdout + done.stderr
        yield folder, environment
    finally:
        run(environment, "wav.local.services", "down")


def pids(folder: Path) -> dict[str, int]:
    return {name: json.loads((folder / f"{name}.json").read_text())["pid"] for name in ("prefect", "s3")}


def test_up_twice_is_up_once(server: tuple[Path, dict[str, str]]) -> None:
    folder, environment = server
    before = pids(folder)
    done = run(environment, "wav.local.services", "up")
    assert done.stdout.count("already up") == 2, done.stdout + done.stderr
    assert pids(folder) == before


def test_only_this_machine_is_served_and_keys_are_private(server: tuple[Path, dict[str, str]]) -> None:
    folder, _ = server
    for pid in pids(folder).values():
        listening = [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("credentials.env", "env", "weed.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name


def test_prefect_lets_in_who_has_the_string_and_no_page_of_another_origin(server: tuple[Path, dict[str, str]]) -> None:
    _, environment = server
    found = variables(environment)
    url, string = found["PREFECT_API_URL"], found["PREFECT_API_AUTH_STRING"]
    server_version(url, string)
    for other, said in (("", "not set"), ("wav:other", "refuses PREFECT_API_AUTH_STRING")):
        with pytest.raises(ServiceError, match=said):
            server_version(url, other)
    for origin, allowed in ((url.removesuffix("/api"), True), ("http://elsewhere.example", False), ("null", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        reply = httpx.options(f"{url}/flow_runs/filter", headers=asked)
        assert (reply.headers.get("access-control-allow-origin") == origin) is allowed, origin
    done = run(environment, "prefect", "work-pool", "ls")
    assert done.returncode == 0, "the command finds address and string in the project folder: " + done.stderr


def test_a_run_cannot_name_the_command_or_the_folder_of_its_process(server: tuple[Path, dict[str, str]]) -> None:
    with prefect_client(server[1]) as client:
        deploy.make_pool(client)
        flow = client.create_flow_from_name("nothing")
        made = client.create_deployment(flow, "nothing", work_pool_name=deploy.POOL)
        for name in ("command", "working_dir"):
            with pytest.raises(PrefectHTTPStatusError, match=name):
                client.create_flow_run_from_deployment(made, job_variables={name: "/tmp"})
        client.create_flow_run_from_deployment(made, job_variables={"env": {"CUDA_VISIBLE_DEVICES": "1"}})


def answer(port: int, request: str, context: ssl.SSLContext | None = None) -> bytes:
    """What a port says to a request by HTTP, or HTTPS with a context; empty where it breaks off."""
    stream = socket.create_connection(("127.0.0.1", port), 5)
    try:
        stream = context.wrap_socket(stream, server_hostname="127.0.0.1") if context else stream
        stream.sendall(f"{request} HTTP/1.0\r\n\r\n".encode())
        return stream.recv(1000)
    except (ssl.SSLError, ConnectionError):
        return b""
    finally:
        stream.close()


def test_no_port_of_the_store_but_s3_answers_who_has_no_certificate(server: tuple[Path, dict[str, str]]) -> None:
    """The filer, the master and the volume server read and write the same objects as S3, and ask for no S3 keys."""
    folder, _ = server
    opened = json.loads((folder / "s3.json").read_text())["ports"]
    context = ssl.create_default_context(cafile=str(folder / "weed.crt"))
    for name, port in opened.items():
        for path in ("/", "/buckets/wav/", "/dir/status", "/dir/assign", "/col/delete?collection=wav"):
            for method in ("GET", "PUT", "POST", "DELETE"):
                said = answer(port, f"{method} {path}")
                assert re.match(rb"$|HTTP/1\.[01] 4\d\d ", said), f"{name}: {method} {path}: {said!r}"
        assert answer(port, "GET /dir/status", context) == b"", name
    context.load_cert_chain(folder / "weed.crt", folder / "weed.key")
    assert b" 200 OK" in answer(opened["master"], "GET /dir/status", context)


def test_the_bucket_keeps_versions_and_refuses_other_keys(server: tuple[Path, dict[str, str]]) -> None:
    folder, _ = server
    keys, endpoint = read_env(folder / "credentials.env"), read_env(folder / "env")["WAV_S3_ENDPOINT"]
    client = services.s3_client(endpoint, keys)
    versions = {client.put_object(Bucket="wav", Key="test/x", Body=body)["VersionId"] for body in (b"1", b"2")}
    assert len(versions) == 2
    assert client.list_object_versions(Bucket="wav-dvc").get("Versions", []) == []
    stranger = services.s3_client(endpoint, {"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "other"})
    with pytest.raises(ClientError):
        stranger.put_object(Bucket="wav", Key="test/y", Body=b"")


def test_a_taken_port_is_named_with_holder_and_variable(server: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, environment = server
    other = environment | {"WAV_LOCAL_DIR": str(tmp_path / "other")}
    done = run(other, "wav.local.services", "up")
    assert done.returncode == 1
    port, pid = environment["WAV_PREFECT_PORT"], pids(folder)["prefect"]
    assert f"port {port} (WAV_PREFECT_PORT) is in use by process {pid}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert pids(folder)["prefect"] == pid, "the other folder's server must be left alone"


def test_a_server_that_was_killed_comes_back_with_its_data(server: tuple[Path, dict[str, str]]) -> None:
    folder, environment = server
    keys, endpoint = read_env(folder / "credentials.env"), read_env(folder / "env")["WAV_S3_ENDPOINT"]
    services.s3_client(endpoint, keys).put_object(Bucket="wav", Key="test/kept", Body=b"kept")
    before = pids(folder)
    psutil.Process(before["s3"]).kill()
    done = run(environment, "wav.local.services", "up")
    assert done.returncode == 0, done.stdout + done.stderr
    after = pids(folder)
    assert after["s3"] != before["s3"]
    assert after["prefect"] == before["prefect"]
    body = services.s3_client(endpoint, keys).get_object(Bucket="wav", Key="test/kept")["Body"].read()
    assert body == b"kept"


def test_a_flow_without_a_server_ends_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "local"
    environment = clean_environment(folder)
    secrets.write_private(
        folder / "env",
        f"PREFECT_API_URL=http://127.0.0.1:{environment['WAV_PREFECT_PORT']}/api\nPREFECT_HOME={folder}/prefect\n"
        f"WAV_S3_ENDPOINT=http://127.0.0.1:{environment['WAV_S3_PORT']}\n",
    )
    secrets.credentials(folder)
    workspace = make_workspace("smoke", tmp_path / "workspace", tmp_path / "cache")
    done = run(environment, "flows.label_rewards", cwd=workspace)
    assert done.returncode == 1
    assert "Prefect server at" in done.stderr
    assert done.stderr.strip().endswith("run make up")
    assert "Traceback" not in done.stderr
    assert not (workspace / "data").exists()


def test_missing_input_is_one_line(server: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    _, environment = server
    workspace = make_workspace("smoke", tmp_path / "workspace", tmp_path / "cache")
    done = run(environment, "flows.label_rewards", cwd=workspace)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "data/episodes" in last
    assert not (workspace / "data").exists()


def test_another_process_under_a_recorded_pid_is_not_ours(tmp_path: Path) -> None:
    record = {"pid": os.getpid(), "started": 1.0, "ports": {"prefect": 4200}}
    (tmp_path / "prefect.json").write_text(json.dumps(record))
    assert services._record(tmp_path, "prefect") is None
    assert not services._stop(tmp_path, "prefect"), "this test process would have been stopped"


@pytest.mark.parametrize("value", ["http", "80", "70000", "60000"])
def test_bad_ports_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WAV_S3_PORT", value)
    with pytest.raises(ServiceError, match="WAV_S3_PORT"):
        ports.from_environment()


def test_a_foreign_listener_is_reported() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} \(WAV_S3_PORT plus 10000\).*{os.getpid()}"):
            ports.require_free({"s3 (gRPC)": port})


def test_environment_wins_over_local_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env").write_text("PREFECT_API_URL=http://local/api\nWAV_S3_ENDPOINT=http://local:1\n")
    (tmp_path / "credentials.env").write_text("AWS_ACCESS_KEY_ID=local\nAWS_SECRET_ACCESS_KEY=key\n")
    for name in ("WAV_STORE", "WAV_S3_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "http://mine/api")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "cloud")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "cloud")
    monkeypatch.setenv("WAV_STORE", "s3://mine")
    adopt_local_services(tmp_path)
    assert os.environ["PREFECT_API_URL"] == "http://mine/api"
    assert os.environ["AWS_ACCESS_KEY_ID"] == "cloud"
    assert "WAV_S3_ENDPOINT" not in os.environ
    monkeypatch.delenv("WAV_STORE")
    monkeypatch.setenv("WAV_S3_ENDPOINT", "")  # restored by monkeypatch afterwards
    adopt_local_services(tmp_path)
    assert os.environ["AWS_ACCESS_KEY_ID"] == "local"
    assert os.environ["WAV_S3_ENDPOINT"] == "http://local:1"


def test_missing_system_libraries_give_the_apt_packages() -> None:
    assert system.missing_packages("egl", lambda _: True) == []
    none = system.missing_packages("egl", lambda _: False)
    assert "libegl1" in none
    assert "libegl-mesa0" in none
    assert system.missing_packages("egl", lambda name: "mesa" not in name) == []
    assert system.missing_packages("osmesa", lambda name: name != "libOSMesa.so.8") == ["libosmesa6"]


def test_heartbeat_speaks_and_passes_the_status_on() -> None:
    script = "import time, sys; time.sleep(0.7); print('end'); sys.exit(3)"
    command = [sys.executable, "infra/local/heartbeat.py", "quiet", "--", sys.executable, "-c", script]
    environment = os.environ | {"WAV_HEARTBEAT_SECONDS": "0.2"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "[quiet] still working" in done.stdout
    assert done.stdout.endswith("end\n")


def test_an_unknown_preset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smoke"):
        make_workspace("smok", tmp_path)


def test_a_libero_preset_is_refused_before_anything_runs_without_assets(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(tmp_path))
    libero_assets.find_assets.cache_clear()
    # without hf-libero its absence comes first
    with pytest.raises(ServiceError, match=r"WAV_LIBERO_ASSETS|make libero"):
        workspace.require_simulator(make_workspace("libero-cpu", tmp_path / "workspace"))
