"""infra/ agrees with the code and with itself: permissions, ports, variables, DeepSpeed, no secrets."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.exceptions import ClientError

from infra.deepspeed.__main__ import configuration
from infra.docker import s3
from infra.worker import GRACE_S
from wav.config import Runtime
from wav.local.ports import PORTS
from wav.local.services import AWAITED, BUCKETS
from wav.prefect_api import STRING

PROJECT = Path(__file__).resolve().parents[1]
INFRA = PROJECT / "infra"
#: call of boto3's client -> permissions it takes; versions are named wherever the store knows one
ACTIONS = {
    "head_bucket": {"s3:ListBucket"},
    "list_objects_v2": {"s3:ListBucket"},
    "list_object_versions": {"s3:ListBucketVersions"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
    "head_object": {"s3:GetObject", "s3:GetObjectVersion"},
    "get_object": {"s3:GetObject", "s3:GetObjectVersion"},
    "download_file": {"s3:GetObject", "s3:GetObjectVersion"},
    "put_object": {"s3:PutObject"},
    "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    "delete_object": {"s3:DeleteObject", "s3:DeleteObjectVersion"},
    # make_buckets.py alone, with an administrator's keys
    "create_bucket": set(),
    "put_bucket_versioning": set(),
}
#: dvc push and pull (s3fs): list, head, get, put in parts
DVC_ACTIONS = {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"}


def client_calls() -> set[str]:
    """Methods of boto3's client that the S3 store calls, paginators by their operation."""
    found = set()
    for node in ast.walk(ast.parse((PROJECT / "wav/io/storage/s3.py").read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        if node.func.attr == "get_paginator":
            found.add(ast.literal_eval(node.args[0]))
        elif owner == "self._client" or owner.startswith("self._connect("):
            found.add(node.func.attr)
    return found


def allowed(bucket: str) -> set[str]:
    """Actions that the policy allows on a bucket or its objects."""
    policy = json.loads((INFRA / "aws/policy.json").read_text())
    found: set[str] = set()
    for statement in policy["Statement"]:
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        if statement["Effect"] == "Allow" and any(name.removesuffix("/*").endswith(bucket) for name in resources):
            found |= set(statement["Action"])
    return found


def test_the_policy_allows_what_the_store_calls_and_nothing_more() -> None:
    calls = client_calls()
    assert calls, "the calls were not found in the source"
    assert calls <= ACTIONS.keys(), "say here which permissions the new call takes"
    assert allowed(":BUCKET") == set().union(*(ACTIONS[call] for call in calls))
    assert allowed("BUCKET-dvc") >= DVC_ACTIONS
    assert not {action for action in allowed("BUCKET-dvc") if "Delete" in action}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_zero_configurations_are_what_training_gives_deepspeed(stage: int) -> None:
    stored = json.loads((INFRA / f"deepspeed/zero{stage}.json").read_text())
    assert stored == configuration(stage), "run python -m infra.deepspeed"
    assert stored["zero_optimization"]["stage"] == stage


def compose() -> dict[str, Any]:
    """The compose file."""
    return dict(yaml.safe_load((INFRA / "docker/compose.yaml").read_text()))


def manifests(name: str) -> list[dict[str, Any]]:
    """The objects of a file of Kubernetes'."""
    return list(yaml.safe_load_all((INFRA / f"kubernetes/{name}.yaml").read_text()))


def example_names() -> set[str]:
    """Variables that the example of the environment files names."""
    lines = (INFRA / "docker/example.env").read_text().splitlines()
    return {line.partition("=")[0] for line in lines if "=" in line and not line.startswith("#")}


def test_compose_is_consistent_with_itself_and_the_code() -> None:
    raw = compose()
    services = raw["services"]
    for name, service in services.items():
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in raw["volumes"], f"{name}: {volume}"
        for other, condition in service.get("depends_on", {}).items():
            assert other in services
            assert condition == {"condition": "service_healthy"}
    known = {f"WAV_{field.upper()}" for field in Runtime.model_fields}
    for name in ("deploy", "worker"):
        variables = services[name]["environment"]
        assert {key for key in variables if key.startswith("WAV_")} <= known
        assert variables["PREFECT_API_URL"] == f"http://prefect:{PORTS['prefect'][1]}/api"
        assert variables["WAV_S3_ENDPOINT"] == f"http://s3:{PORTS['s3'][1]}"
        assert variables["WAV_STORE"] == f"s3://{BUCKETS[0]}"
    assert services["prefect"]["ports"] == [f"127.0.0.1:{PORTS['prefect'][1]}:{PORTS['prefect'][1]}"]
    assert services["s3"]["ports"] == [f"127.0.0.1:{PORTS['s3'][1]}:{PORTS['s3'][1]}"]
    assert services["prefect"]["environment"]["PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER"] == AWAITED
    assert services["s3"]["command"] == ["python", "-m", "infra.docker.s3"]
    assert f'("{BUCKETS[0]}", True), ("{BUCKETS[1]}", False)' in (INFRA / "docker/make_buckets.py").read_text()
    asked = set(re.findall(r"\$\{(\w+)", (INFRA / "docker/compose.yaml").read_text()))
    assert asked - {"PREFECT_UI_ORIGIN"} <= example_names()


def test_every_server_is_asked_what_it_is_there_for() -> None:
    """An open port, or an address that answers whoever asks, tells neither that it works nor that it takes our keys."""
    questions = {"postgres": "pg_isready", "prefect": "server_version as v; v(", "s3": "infra.docker.s3 ask"}
    questions["worker"] = "infra.worker"
    services = compose()["services"]
    pods = [read for name in ("services", "worker") for read in manifests(name) if "template" in read.get("spec", {})]
    containers = {read["metadata"]["name"]: read["spec"]["template"]["spec"]["containers"][0] for read in pods}
    assert set(containers) == set(questions) == set(services) - {"deploy"}
    for name, question in questions.items():
        assert question in " ".join(services[name]["healthcheck"]["test"]), name
        assert question in " ".join(containers[name]["readinessProbe"]["exec"]["command"]), name
    for command in (services["worker"]["command"], containers["worker"]["command"]):
        assert command[-1] == "--healthcheck"
    names = {entry["name"] for entry in containers["prefect"]["env"]}
    assert STRING in names, "server_version sends this process's string"


@pytest.mark.parametrize("keys", ["taken", "refused"])
def test_the_store_of_compose_is_asked_with_its_keys_and_beside_a_proxy(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = "Credential=taken/" in self.headers.get("Authorization", "")
            body = b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>" if known else b""
            self.send_response(200 if known else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9" if name == "http_proxy" else "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with HTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setitem(PORTS, "s3", ("", server.server_port))
        with nullcontext() if keys == "taken" else pytest.raises(ClientError, match="403"):
            s3.ask()


def test_compose_lets_nobody_in_and_runs_nothing_as_root() -> None:
    services = compose()["services"]
    prefect = services["prefect"]["environment"]
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"].startswith("${PREFECT_API_AUTH_STRING:?")
    assert "*" not in prefect["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"]
    for name in ("deploy", "worker"):
        assert services[name]["environment"]["PREFECT_API_AUTH_STRING"] == "${PREFECT_API_AUTH_STRING}"
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("user") == "postgres" or service["image"] == "wav-worker:latest", name
    last = [line for line in (INFRA / "docker/Dockerfile").read_text().splitlines() if line.startswith("USER")][-1]
    assert last == "USER wav"
    assert int(services["worker"]["stop_grace_period"].removesuffix("s")) > GRACE_S


def test_the_store_of_compose_asks_for_the_certificate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []
    monkeypatch.setattr(s3, "FOLDER", tmp_path)
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    s3.main()
    ((_, command, environment),) = started
    assert f"-s3.port={PORTS['s3'][1]}" in command
    for name in ("WEED_HTTPS_FILER_CA", "WEED_HTTPS_MASTER_CA", "WEED_HTTPS_VOLUME_CA", "WEED_GRPC_CA"):
        assert Path(environment[name]).read_text().startswith("-----BEGIN CERTIFICATE")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_nothing_in_infra_holds_a_secret_and_none_goes_into_the_image() -> None:
    for line in (INFRA / "docker/example.env").read_text().splitlines():
        name, _, value = line.partition("=")
        if not name.startswith(("PREFECT_API_URL", "WAV_", "#")):
            assert value == "", f"example.env: {name} has a value"
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|SECRET|TOKEN|AUTH_STRING", name):
                assert re.fullmatch(r"\$\{\w+(:\?[^}]*)?\}", value), f"compose.yaml: {name} has a value"
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    assert {".local/", ".dvc/config.local", ".venv/"} <= set(ignored)


def test_the_image_installs_what_make_install_does() -> None:
    text = (INFRA / "docker/Dockerfile").read_text()
    makefile = (PROJECT / "Makefile").read_text()
    torch = re.findall(r"torch==[\d.]+", text)
    assert torch
    assert set(torch) == set(re.findall(r"torch==[\d.]+", makefile))
    assert "-c constraints.txt" in text
    for line in re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE):
        for name in (word for word in line.split() if not word.startswith("--")):
            assert (PROJECT / name).exists(), f"Dockerfile copies {name}, which is not there"


def test_base_images_are_pinned_by_one_command(tmp_path: Path) -> None:
    """They are today, and twice again with other digests; `docker` is a script that says what buildx says."""
    image_files = ("infra/docker/Dockerfile", "infra/docker/compose.yaml", "infra/kubernetes/services.yaml")
    for name in image_files:
        images = re.findall(r"^(?:FROM| +image:) ([a-z]+:\S+)$", (PROJECT / name).read_text(), flags=re.MULTILINE)
        foreign = [image for image in images if not image.startswith("wav-worker:")]
        assert foreign, name
        assert all(re.fullmatch(r"[a-z]+:[\w.-]+@sha256:[0-9a-f]{64}", image) for image in foreign), foreign
    for name in ("Makefile", *image_files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    command = ["make", "pin-images"]
    environment = os.environ | {"PATH": f"{docker.parent}:{os.environ['PATH']}"}
    for letter in "ab":
        digest = f"sha256:{letter * 64}"
        docker.write_text(f"#!/bin/sh\necho 'Name:   '$4\necho 'Digest: {digest}'\n")
        docker.chmod(0o755)
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert re.findall(r"FROM .+@(.+)", (tmp_path / "infra/docker/Dockerfile").read_text()) == [digest]
        services = yaml.safe_load((tmp_path / "infra/docker/compose.yaml").read_text())["services"]
        assert services["postgres"]["image"] == f"postgres:17@{digest}"
        assert services["worker"]["image"] == "wav-worker:latest"
        assert f"image: postgres:17@{digest}\n" in (tmp_path / "infra/kubernetes/services.yaml").read_text()
    docker.write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "docker named no digest" in done.stderr


def test_systemd_units_name_what_is_there() -> None:
    worker = (INFRA / "systemd/wav-worker.service").read_text()
    services = (INFRA / "systemd/wav-services.service").read_text()
    assert "ExecStart=/opt/wav/.venv/bin/python -m infra.deploy worker" in worker
    assert re.search(r"KillMode=(mixed|control-group)", worker), "what the worker leaves must not outlive it"
    started = re.search(r"ExecStart=/usr/bin/docker compose up --detach --wait (.+)", services)
    assert started is not None
    assert set(started[1].split()) <= compose()["services"].keys()


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for path in sorted((INFRA / "systemd").glob("*.service")):
        # the programs stand at the server's paths; here only the unit's grammar is checked
        text = re.sub(r"^(Exec\w+)=\S+", r"\1=/bin/true", path.read_text(), flags=re.MULTILINE)
        unit = tmp_path / path.name
        unit.write_text(re.sub(r"^(Requires|User)=.*\n", "", text, flags=re.MULTILINE))
        command = ["systemd-analyze", "verify", "--man=no", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if path.name in line]
        assert not said, said
