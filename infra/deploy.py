"""What the Prefect server must know of this project: ``make deploy``. Doing it twice is doing it once.

A process work pool ``gpu`` that runs one flow at a time, its queue, the automation that marks runs as crashed whose
worker died (their heartbeats stop), the one that tells of failed retrains (:mod:`infra.notify`), and the deployments of
``prefect.yaml``.
``python -m infra.deploy worker`` starts a worker of the pool in the project folder (:mod:`infra.worker`).
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from flows.common import begin_process, require_services
from infra import notify
from infra.worker import supervise
from wav.errors import ServiceError, exit_status
from wav.local import PROJECT

POOL = QUEUE = "gpu"
AUTOMATION = "wav: crash runs whose worker died"
#: flow runs beat every minute (prefect.toml); this many silent seconds mean that nobody runs them any more. Prefect's
#: worker itself gives up after about 20 minutes without its server, so no living run is silent for longer
SILENT_SECONDS = 1800


def base_job_template() -> dict[str, Any]:
    """Prefect's template of a process pool without the command and the folder: no deployment or run may set them.

    They are refused by name, at deploy and at run. This is no fence against whoever may talk to the server, who can
    make a deployment of other code; the authentication string is.
    """
    template = copy.deepcopy(ProcessWorker.get_default_base_job_template())
    for name in ("command", "working_dir"):
        del template["variables"]["properties"][name]
        del template["job_configuration"][name]
    template["variables"]["additionalProperties"] = False
    return template


def make_pool(client: SyncPrefectClient) -> None:
    """The pool with one slot, and its queue."""
    template = base_job_template()
    try:
        pool = client.read_work_pool(POOL)
        if pool.type != "process":
            raise ServiceError(f"work pool {POOL}: is of type {pool.type}, not process; delete it or rename it")
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1, base_job_template=template))
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(
                name=POOL,
                type="process",
                description="The GPU server: one flow at a time.",
                concurrency_limit=1,
                base_job_template=template,
            )
        )
    try:
        queue = client.read_work_queue_by_name(QUEUE, work_pool_name=POOL)
        client.update_work_queue(queue.id, concurrency_limit=1)
    except ObjectNotFound:
        client.create_work_queue(QUEUE, description="wav", concurrency_limit=1, work_pool_name=POOL)


def automation() -> AutomationCore:
    """Crash a flow run that has beaten and then is silent without having ended."""
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name=AUTOMATION,
        description="A run that stops sending heartbeats has lost its worker (killed, rebooted, out of memory).",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ended},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {SILENT_SECONDS} s: the worker died. Start the run again; it resumes.",
            )
        ],
    )


def make_automation(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Create an automation, or bring the one of its name up to date; more of the same name are removed."""
    known = client.read_automations_by_name(wanted.name)
    for extra in known[1:]:
        client.delete_automation(extra.id)
    if known:
        client.update_automation(known[0].id, wanted)
    else:
        client.create_automation(wanted)


def make_deployments() -> None:
    """``prefect deploy --all``; its output is shown only where it fails."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())[-600:]
        raise ServiceError(f"prefect deploy --all: failed; correct prefect.yaml: {said}")


def deploy() -> None:
    """Everything, in the order in which it needs each other."""
    require_services(begin_process())
    with get_client(sync_client=True) as client:
        make_pool(client)
        make_automation(client, automation())
        told = os.environ.get(notify.VARIABLE, "")
        if told:
            make_automation(client, notify.automation(notify.find_block(client, told)))
        make_deployments()
        names = sorted(deployment.name for deployment in client.read_deployments(limit=100))
    sys.stdout.write(f"work pool {POOL}: one flow at a time, queue {QUEUE}\nautomation: {AUTOMATION}\n")
    who = f"{told} is told" if told else f"nobody is told (set {notify.VARIABLE}, see docs/operations.md)"
    sys.stdout.write(f"retrains that fail, and champions that grow old: {who}\n")
    sys.stdout.write(f"deployments: {', '.join(names)}\nstart a worker: make worker\n")


def worker() -> int:
    """A worker of the pool, in the project folder, with this process's environment, until a signal ends it."""
    require_services(begin_process())
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--work-queue", QUEUE]
    return supervise([*command, "--limit", "1"], str(PROJECT))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="infra.deploy", description="register deployments, or run a worker")
    parser.add_argument("command", nargs="?", choices=("deploy", "worker"), default="deploy")
    command = parser.parse_args(arguments).command
    return exit_status(worker if command == "worker" else deploy)


if __name__ == "__main__":
    raise SystemExit(main())
