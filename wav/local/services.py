"""The Prefect server and the S3 server (SeaweedFS) of one machine, on 127.0.0.1.

``python -m wav.local.services up | down | status | ui | where FOLDER`` (``make up``, ``make down``, ...).

State lies in ``.local/`` (``WAV_LOCAL_DIR``): ``prefect/`` and ``s3/`` hold the data, ``logs/`` what they said,
``NAME.json`` the process, ``env`` the addresses and ``credentials.env`` the generated keys (:mod:`.secrets`). Ports
come from :data:`PORTS`' variables. ``up`` twice is ``up`` once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wav.errors import ServiceError, exit_status
from wav.local import PROJECT, bypass_proxies, drop_empty_variables, local_folder, ports, read_env
from wav.local.secrets import credentials, private_folder, weed_tls, write_private
from wav.prefect_api import STRING, URL, server_version
from wav.processes import ending, marked, stop

HOST = "127.0.0.1"
BUCKETS = ("wav", "wav-dvc")
#: a server needs a dozen seconds of CPU to start, which on a machine that others use is minutes
READY_SECONDS = 360.0
STOP_SECONDS = 20.0
#: how long Prefect remembers which heartbeats it waits for (ISO 8601). With its minute, a server that was away for
#: longer than the allowed silence forgets the runs that died meanwhile: Running for ever, they would keep their slot
AWAITED = "P30D"
#: marks the processes as this folder's, so that one that lost its pid file is still known as ours
MARK = "WAV_LOCAL_SERVICE"


@dataclass(frozen=True)
class Service:
    """One server: how it is started and when it is ready."""

    name: str
    ports: dict[str, int]
    command: tuple[str, ...]
    environment: dict[str, str]
    ready: Callable[[], str]
    """Empty when it answers for real, else what it said."""

    @property
    def settings(self) -> str:
        """Digest of how it is started: a server that an older version of this code started is started again."""
        return hashlib.sha256(json.dumps([self.command, self.environment], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Running:
    """A server that was started here."""

    pid: int
    ports: dict[str, int]
    settings: str


def s3_client(endpoint: str, keys: dict[str, str]) -> Any:
    """An impatient client of an S3 server of ours; ``keys`` by the names of their variables."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
    )
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=config,
    )


def _s3_ready(endpoint: str, keys: dict[str, str]) -> str:
    """A real round trip: after a crash the port answers seconds before the store does."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = s3_client(endpoint, keys)
    try:
        existing = {bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])}
        for bucket in BUCKETS:
            if bucket not in existing:
                client.create_bucket(Bucket=bucket)
        client.put_bucket_versioning(Bucket=BUCKETS[0], VersioningConfiguration={"Status": "Enabled"})
        # In the unversioned bucket: a probe must leave no versions behind.
        body, key = os.urandom(32), ".ready"
        client.put_object(Bucket=BUCKETS[1], Key=key, Body=body)
        echo = client.get_object(Bucket=BUCKETS[1], Key=key)["Body"].read()
        client.delete_object(Bucket=BUCKETS[1], Key=key)
    except (BotoCoreError, ClientError) as error:
        return " ".join(str(error).split())
    return "" if echo == body else "it returned other bytes than were put"


def _prefect_ready(url: str, string: str) -> str:
    try:
        server_version(url, string)
    except (ServiceError, OSError) as error:
        return str(error)
    return ""


def _prefect(folder: Path, chosen: dict[str, int]) -> Service:
    port, string = chosen["prefect"], credentials(folder)[STRING]
    url = f"http://{HOST}:{port}/api"
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", HOST, "--port", str(port), "--timeout-keep-alive", "5", "--log-level", "warning"]
    environment = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_UI_API_URL": url,
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_AUTH_STRING": string,
        # Without spaces. A page of another origin could else talk to the server through the user's browser
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect' / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": AWAITED,
        "DO_NOT_TRACK": "1",
    }
    return Service("prefect", {"prefect": port}, tuple(command), environment, lambda: _prefect_ready(url, string))


def weed_command(folder: Path, chosen: dict[str, int], bind: str = HOST) -> list[str]:
    """How SeaweedFS is started on ``folder``: its parts dial each other on 127.0.0.1 and listen on ``bind``.

    Raises:
        ServiceError: SeaweedFS is not installed.
    """
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        raise ServiceError(f"{weed}: the S3 server is not installed; run make install")
    command = [str(weed), "mini", f"-dir={folder}", f"-ip={HOST}", f"-ip.bind={bind}"]
    for name, port in chosen.items():
        if name != "prefect":
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + ports.GRPC_OFFSET}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-webdav=false"]
    return [*command, "-admin.ui=false", "-master.telemetry=false"]


def _s3(folder: Path, chosen: dict[str, int]) -> Service:
    keys, endpoint = credentials(folder), f"http://{HOST}:{chosen['s3']}"
    own = {name: port for name, port in chosen.items() if name != "prefect"}
    opened = own | {f"{name} (gRPC)": port + ports.GRPC_OFFSET for name, port in own.items()}
    environment = {name: value for name, value in keys.items() if name.startswith("AWS_")} | weed_tls(folder)
    command = tuple(weed_command(folder / "s3", chosen))
    return Service("s3", opened, command, environment, lambda: _s3_ready(endpoint, keys))


def services(folder: Path, chosen: dict[str, int]) -> tuple[Service, ...]:
    """The servers of one machine, for the given ports (name -> port, as :func:`ports.from_environment` gives)."""
    return _prefect(folder, chosen), _s3(folder, chosen)


def _record(folder: Path, name: str) -> Running | None:
    """What was started here under ``name``, if it still runs: its processes carry this folder's mark."""
    found = marked(MARK, f"{folder}:{name}")
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        opened, settings = dict(record["ports"]), str(record.get("settings"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Running(found[0].pid, opened, settings) if found else None


def _stop(folder: Path, name: str) -> bool:
    """Stop the service and everything it started, whatever became of its file; true if anything ran."""
    found = marked(MARK, f"{folder}:{name}")
    stop(found, STOP_SECONDS)
    (folder / f"{name}.json").unlink(missing_ok=True)
    return bool(found)


def _start(folder: Path, service: Service) -> Running:
    log = folder / "logs" / f"{service.name}.log"
    for part in (log.parent, folder / service.name):
        part.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            service.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env=os.environ | service.environment | {MARK: f"{folder}:{service.name}"},
        )
    running = Running(process.pid, service.ports, service.settings)
    write_private(folder / f"{service.name}.json", json.dumps(asdict(running)))
    began = spoke = time.monotonic()
    while problem := service.ready():
        now = time.monotonic()
        if process.poll() is not None or now - began > READY_SECONDS:
            code = process.poll()
            _stop(folder, service.name)
            how = ending(code) if code is not None else f"not ready after {READY_SECONDS:.0f} s"
            said = " | ".join(log.read_text(errors="replace").splitlines()[-5:])
            raise ServiceError(f"{service.name} server: {how} ({problem}; log: {said}); read {log}, run make up again")
        if now - spoke > 8:
            sys.stdout.write(f"{service.name}: starting, {now - began:.0f} s\n")
            sys.stdout.flush()
            spoke = now
        time.sleep(0.3)
    return running


def _write_env(folder: Path, recorded: dict[str, int], project: Path = PROJECT) -> None:
    """Leave addresses for the flows and, for DVC, the remote's keys (both outside git)."""
    endpoint = f"http://{HOST}:{recorded['s3']}"
    values = {
        "PREFECT_API_URL": f"http://{HOST}:{recorded['prefect']}/api",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "WAV_S3_ENDPOINT": endpoint,
    }
    write_private(folder / "env", "".join(f"{name}={value}\n" for name, value in values.items()))
    if (project / ".dvc").is_dir() and folder == (project / ".local"):
        keys = credentials(folder)
        write_private(
            project / ".dvc" / "config.local",
            "['remote \"local\"']\n"
            f"    endpointurl = {endpoint}\n"
            f"    access_key_id = {keys['AWS_ACCESS_KEY_ID']}\n"
            f"    secret_access_key = {keys['AWS_SECRET_ACCESS_KEY']}\n",
        )


def up(folder: Path) -> None:
    """Start what does not run, wait until it answers, write ``env``.

    Raises:
        ServiceError: a port is taken (names port, holder and variable), or a server does not come up (names its log).
    """
    private_folder(folder)
    chosen = ports.from_environment()
    recorded: dict[str, int] = {}
    for service in services(folder, chosen):
        running = _record(folder, service.name)
        if running is not None:
            chosen |= {name: port for name, port in running.ports.items() if name in chosen}
            current = next(s for s in services(folder, chosen) if s.name == service.name)
            problem = "was started with other settings" if running.settings != current.settings else ""
            if problem := problem or _wait_ready(current):
                sys.stdout.write(f"{service.name}: runs, but {problem}; starting it again\n")
                running = None
        verb = "already up"
        if running is None:
            _stop(folder, service.name)
            current = next(s for s in services(folder, chosen) if s.name == service.name)
            ports.require_free(current.ports)
            running, verb = _start(folder, current), "up"
        recorded |= running.ports
        port = running.ports[service.name]
        sys.stdout.write(f"{service.name}: {verb} at http://{HOST}:{port} (pid {running.pid})\n")
        sys.stdout.flush()
    _write_env(folder, recorded)
    if recorded["prefect"] != ports.PORTS["prefect"][1] and folder == PROJECT / ".local":
        url = f"http://{HOST}:{recorded['prefect']}/api"
        sys.stdout.write(f"for the prefect command in this shell: export PREFECT_API_URL={url}\n")


def _wait_ready(service: Service, seconds: float = 10.0) -> str:
    """Empty once the service answers, within ``seconds``."""
    deadline = time.monotonic() + seconds
    while (problem := service.ready()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return f"does not answer ({problem})" if problem else ""


def down(folder: Path) -> None:
    """Stop both servers; their data stays."""
    for name in ("prefect", "s3"):
        sys.stdout.write(f"{name}: {'stopped' if _stop(folder, name) else 'was not up'}\n")
        sys.stdout.flush()


def status(folder: Path) -> bool:
    """Say what runs; true if both do."""
    alive = []
    for name in ("prefect", "s3"):
        running = _record(folder, name)
        alive.append(running is not None)
        where = f"http://{HOST}:{running.ports[name]} (pid {running.pid})" if running else "not up; run make up"
        sys.stdout.write(f"{name}: {where}\n")
    return all(alive)


def ui(folder: Path) -> bool:
    """Open Prefect's UI where there is a browser, and say what its sign-in asks for; true if the servers run."""
    good, prefect = status(folder), _record(folder, "prefect")
    if prefect is not None:
        sys.stdout.write(f"Prefect's UI asks once in each browser for: {credentials(folder)[STRING]}\n")
        if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(f"http://{HOST}:{prefect.ports['prefect']}")
    return good


def where(folder: Path, workspace: Path) -> None:
    """After a run: where its results are."""
    values = read_env(folder / "env")
    lines = [
        ("report", str(workspace / "reports" / "index.html")),
        ("policy", f"{workspace / 'export'}   try: wav act {workspace / 'export'} --suite tabletop --episodes 2"),
        ("metrics", "dvc metrics show"),
        ("flow runs", f"{values.get(URL, '').removesuffix('/api')}   to sign in: make ui"),
        ("objects", f"{values.get('WAV_S3_ENDPOINT', '')}  bucket {BUCKETS[0]}; keys in {folder / 'credentials.env'}"),
    ]
    for name, text in lines:
        sys.stdout.write(f"{name:>10}  {text}\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="wav.local.services", description="local Prefect and S3 servers")
    parser.add_argument("command", choices=("up", "down", "status", "ui", "where"))
    parser.add_argument("workspace", nargs="?", default=".", type=Path)
    chosen = parser.parse_args(arguments)
    drop_empty_variables()
    bypass_proxies()
    folder = local_folder()

    if chosen.command == "where":
        return exit_status(lambda: where(folder, chosen.workspace))
    command = {"up": up, "down": down, "status": status, "ui": ui}[chosen.command]
    return exit_status(lambda: 1 if command(folder) is False else 0)


if __name__ == "__main__":
    raise SystemExit(main())
