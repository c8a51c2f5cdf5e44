"""What the Prefect server must know of this project: ``make deploy``. Doing it twice is doing it once.

A work pool ``wav`` with two queues, ``gpu`` (trainings and evaluations, one at a time) and ``cpu`` (data stages), the
automation that marks runs as crashed whose worker died (their heartbeats stop), the one that tells of failed retrains
(:mod:`infra.notify`), and the deployments of ``prefect.yaml``. Runs are processes of the worker, or containers
(``--type docker``) or Jobs (``--type kubernetes``) that it makes.
``python -m infra.deploy worker`` starts a worker of the pool in the project folder (:mod:`infra.worker`), of both
queues or of those that ``--queue`` names.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import yaml
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
from infra.worker import HEALTH_VARIABLES, supervise
from wav.errors import ServiceError, exit_status
from wav.local import PROJECT

POOL, QUEUES = "wav", ("gpu", "cpu")
TYPES = ("process", "docker", "kubernetes")
AUTOMATION = "wav: crash runs whose worker died"
#: flow runs beat every minute (prefect.toml); this many silent seconds mean that nobody runs them any more. Prefect's
#: worker itself gives up after about 20 minutes without its server, so no living run is silent for longer
SILENT_SECONDS = 1800


def base_job_template(kind: str = "process") -> dict[str, Any]:
    """What a run of a pool of this type is; ``infra/docker/pool.yaml``, ``infra/kubernetes/pool.yaml``.

    Of a process pool: Prefect's own without the command and the folder, which no deployment or run may set. They are
    refused by name, at deploy and at run. This is no fence against whoever may talk to the server, who can make a
    deployment of other code; the authentication string is.
    """
    if kind != "process":
        return dict(yaml.safe_load((PROJECT / "infra" / kind / "pool.yaml").read_text()))
    template = copy.deepcopy(ProcessWorker.get_default_base_job_template())
    for name in ("command", "working_dir"):
        del template["variables"]["properties"][name]
        del template["job_configuration"][name]
    template["variables"]["properties"]["gpus"] = {"type": "integer", "description": "docker and kubernetes give them"}
    template["variables"]["additionalProperties"] = False
    return template


def make_pool(client: SyncPrefectClient, kind: str = "process", gpu_runs: int = 1) -> None:
    """The pool, ServiceError if of another type, and its queues: gpu, ``gpu_runs`` at a time, and cpu without limit."""
    template = base_job_template(kind)
    try:
        pool = client.read_work_pool(POOL)
        if pool.type != kind:
            remedy = f"give --type {pool.type}, or delete it (prefect work-pool delete {POOL})"
            raise ServiceError(f"work pool {POOL}: is of type {pool.type}, not {kind}; {remedy}")
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type=kind, description="wav", base_job_template=template))
    for name in QUEUES:
        limit = gpu_runs if name == "gpu" else None
        try:
            queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
            client.update_work_queue(queue.id, concurrency_limit=limit)
        except ObjectNotFound:
            client.create_work_queue(name, description="wav", concurrency_limit=limit, work_pool_name=POOL)


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
    """``prefect deploy --all``; its output is shown only where it fails.

    Raises:
        ServiceError: it failed; holds the end of what it said.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())[-600:]
        raise ServiceError(f"prefect deploy --all: failed; correct prefect.yaml: {said}")


def deploy(kind: str = "process", gpu_runs: int = 1) -> None:
    """Everything, in the order in which it needs each other."""
    require_services(begin_process())
    with get_client(sync_client=True) as client:
        make_pool(client, kind, gpu_runs)
        make_automation(client, automation())
        told = os.environ.get(notify.VARIABLE, "")
        if told:
            make_automation(client, notify.automation(notify.find_block(client, told)))
        make_deployments()
        names = sorted(deployment.name for deployment in client.read_deployments(limit=100))
    sys.stdout.write(
        f"work pool {POOL} ({kind}): queue gpu, {gpu_runs} at a time; queue cpu\nautomation: {AUTOMATION}\n"
    )
    who = f"{told} is told" if told else f"nobody is told (set {notify.VARIABLE}, see docs/operations.md)"
    sys.stdout.write(f"retrains that fail, and champions that grow old: {who}\n")
    sys.stdout.write(f"deployments: {', '.join(names)}\nstart a worker: make worker\n")


def worker(queues: Sequence[str] = QUEUES, healthcheck: bool = False) -> int:
    """A worker of the pool, in the project folder, with this process's environment, until a signal ends it.

    It runs one flow at a time itself; of containers and Jobs it makes as many as the queues let it. ``healthcheck``: it
    says on a port of this machine whether it still asks for work (:func:`infra.worker.ask`).
    ServiceError: there is no pool.
    """
    require_services(begin_process())
    with get_client(sync_client=True) as client:
        try:
            kind = client.read_work_pool(POOL).type
        except ObjectNotFound:
            raise ServiceError(f"work pool {POOL}: is not there; run make deploy") from None
    command = [sys.executable, "-m", "prefect", "--no-prompt", "worker", "start", "--pool", POOL]
    command += [word for name in queues for word in ("--work-queue", name)]
    if healthcheck:
        os.environ |= HEALTH_VARIABLES
        command.append("--with-healthcheck")
    return supervise([*command, *(("--limit", "1") if kind == "process" else ())], str(PROJECT))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="infra.deploy", description="register deployments, or run a worker")
    parser.add_argument("command", nargs="?", choices=("deploy", "worker"), default="deploy")
    parser.add_argument("--type", choices=TYPES, default="process", help="of the work pool: what a run is")
    parser.add_argument("--gpu-runs", type=int, default=1, help="runs of queue gpu at a time: machines with GPUs")
    parser.add_argument("--queue", action="append", choices=QUEUES, help="that the worker serves; both unless given")
    parser.add_argument(
        "--healthcheck", action="store_true", help="let python -m infra.worker ask for the worker's health"
    )
    given = parser.parse_args(arguments)
    if given.command == "worker":
        return exit_status(lambda: worker(given.queue or QUEUES, given.healthcheck))
    return exit_status(lambda: deploy(given.type, given.gpu_runs))


if __name__ == "__main__":
    raise SystemExit(main())
