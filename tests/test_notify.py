"""Failed, crashed and late retrains and old champions reach a webhook; other flows, and good ends, do not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import BlockDocumentCreate
from prefect.client.schemas.objects import State
from prefect.states import Completed, Crashed, Failed, Late

from infra import notify
from infra.deploy import make_automation
from tests.helpers.local_services import prefect_client
from tests.test_deploy import PROJECT, environment  # noqa: F401 - a fixture
from wav.errors import ServiceError

pytestmark = [pytest.mark.long, pytest.mark.services]
#: what a retrain emits of an old champion, from a flow of that name
STALE = """
from prefect import flow
from flows.housekeeping import tell_stale
@flow(name="retrain")
def run():
    tell_stale("tabletop", "2020-01-01T00:00:00+00:00", 28, "may be worse")
run()
"""


@pytest.fixture
def received() -> Iterator[tuple[str, list[str]]]:
    """A receiver's address, and the texts that came."""
    texts: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", texts
        server.shutdown()


def make_block(client: SyncPrefectClient, address: str) -> None:
    """What a user makes in the UI: a webhook of their own, called ops."""
    kind = client.read_block_type_by_slug("custom-webhook")
    schema = client.get_most_recent_block_schema_for_block_type(kind.id)
    assert schema is not None
    data = {"name": "ops", "url": address, "json_data": {"text": "{{body}}"}}
    client.create_block_document(
        BlockDocumentCreate(name="ops", data=data, block_type_id=kind.id, block_schema_id=schema.id)
    )


def end(client: SyncPrefectClient, flow: str, state: State[None]) -> None:
    """A run of a flow that ends in a state."""
    created = {"flow_id": str(client.create_flow_from_name(flow)), "state": {"type": "RUNNING"}}
    reply = client.request("POST", "/flow_runs/", json=created)  # type: ignore[arg-type]
    client.set_flow_run_state(UUID(reply.json()["id"]), state, force=True)


def test_failed_crashed_and_late_retrains_and_old_champions_are_told(
    environment: dict[str, str],  # noqa: F811
    received: tuple[str, list[str]],
) -> None:
    address, texts = received
    with prefect_client(environment) as client:
        with pytest.raises(ServiceError, match="WAV_NOTIFY = 'custom-webhook/ops': the Prefect server has no such"):
            notify.find_block(client, "custom-webhook/ops")
        make_block(client, address)
        for _ in range(2):
            make_automation(client, notify.automation(notify.find_block(client, "custom-webhook/ops")))
        assert len(client.read_automations_by_name(notify.AUTOMATION)) == 1
        end(client, "train-joint", Failed(message="another flow"))
        end(client, "retrain", Completed(message="a good end"))
        end(client, "retrain", Failed(message="stage export failed"))
        end(client, "retrain", Crashed(message="No heartbeat"))
        end(client, "retrain", Late())
    there = environment | {"PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", STALE], cwd=PROJECT, env=there, check=True)
    deadline = time.monotonic() + 60
    while len(texts) < 4 and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(2)  # whatever else may come
    assert len(texts) == 4, texts
    told = "\n".join(texts)
    late = "is Late: no worker took it"
    for part in ("is Failed: stage export failed", "is Crashed: No heartbeat", late, "champion tabletop is "):
        assert part in told
    assert all("/runs/flow-run/" in text for text in texts)
