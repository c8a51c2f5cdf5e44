"""What all flows share: settings and services at the start, errors in one line, results at the end.

Every flow has the same shape::

    @flow(name="ingest")
    def ingest(workspace: str = ".") -> None:
        run = start("ingest", workspace)
        ...                                   # call the library
        finish(run, [run.path("reports/ingest")])

    if __name__ == "__main__":
        raise SystemExit(main(ingest))
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import refresh_global_settings_context
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from flows.artifacts import publish_markdown, publish_numbers, publish_objects, publish_table
from flows.memory import PeakMemory
from flows.provenance import PARENT_VARIABLE, hash_table, retrain_tag, run_url
from flows.server import run_flow, show
from wav.cluster import Cluster, open_cluster
from wav.config import Runtime, Settings, load_settings
from wav.errors import ServiceError, exit_status, foreseeable
from wav.io.files import write_json
from wav.io.storage import ObjectStore, open_store
from wav.local import adopt_local_services
from wav.prefect_api import server_version, without_user
from wav.probes import answers
from wav.processes import WORKER_MARK, end_with_starter

REMEDY = "run make up"
PACKAGES = ("wav", "torch", "deepspeed", "diffusers", "transformers", "prefect", "mujoco", "robosuite")


@dataclass(frozen=True)
class StageRun:
    """One run of one stage: where it reads and writes, with what settings, and where it tells about it."""

    stage: str
    workspace: Path
    settings: Settings
    runtime: Runtime
    store: ObjectStore
    flow_run: str
    logger: logging.Logger | logging.LoggerAdapter[Any]
    started: float
    memory: PeakMemory

    def path(self, relative: str) -> Path:
        """A file or folder of the workspace."""
        return self.workspace / relative

    def cluster(self) -> AbstractContextManager[Cluster | None]:
        """The cluster of WAV_DASK, or None where the stage runs here."""
        address = self.runtime.dask
        return open_cluster(address, self.runtime.workers) if address else nullcontext()

    @property
    def gpu(self) -> bool:
        """Whether a GPU is asked for, here and of the cluster's workers."""
        return self.runtime.device.startswith("cuda")

    def scratch(self, relative: str) -> Path:
        """A git-ignored folder that survives the run: resume state and caches."""
        folder = self.workspace / ".wav" / relative
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def require_services(runtime: Runtime) -> None:
    """ServiceError or StorageError within seconds where Prefect or the store does not answer; nothing is started."""
    settings = get_current_settings().api
    api, string = settings.url, settings.auth_string.get_secret_value() if settings.auth_string else ""
    if not api:
        raise ServiceError(f"Prefect server: PREFECT_API_URL is not set and no local server was started; {REMEDY}")
    if problem := answers(lambda seconds: server_version(api, string, seconds)):
        raise ServiceError(f"Prefect server at {without_user(api)} (PREFECT_API_URL): {problem}; {REMEDY}")
    open_store(runtime.store, runtime.s3_endpoint, runtime.s3_region).reach()


def start(stage: str, workspace: str) -> StageRun:
    """Settings of the stage checked, the object store open and tried."""
    folder, runtime = Path(workspace).resolve(), Runtime()
    settings = load_settings(folder / "params.yaml").for_stage(stage)
    store = open_store(runtime.store, runtime.s3_endpoint, runtime.s3_region)
    store.check()
    run_id, logger = flow_run.id or "local", get_run_logger()
    logger.info("%s: workspace %s, objects to %s/runs/%s", stage, folder, runtime.store, run_id)
    publish_numbers("parameters", settings.model_dump(mode="json"), f"{stage}: the sections of params.yaml it reads")
    _tell_parent(run_id)
    return StageRun(stage, folder, settings, runtime, store, run_id, logger, time.time(), PeakMemory())


def _tell_parent(run_id: str) -> None:
    """Link and tag the run that started this one (retrain), which Prefect does not know of across ``dvc repro``."""
    parent = os.environ.get(PARENT_VARIABLE, "")
    if not parent or run_id in ("local", parent):
        return
    from prefect.client.orchestration import get_client

    publish_markdown("parent", f"Started by [retrain {parent}]({run_url(parent, get_current_settings().api.url)})")

    def tag() -> None:
        with get_client(sync_client=True) as client:
            tags = set(client.read_flow_run(UUID(run_id)).tags) | {retrain_tag(parent)}
            client.update_flow_run(UUID(run_id), tags=sorted(tags))

    show("the tag of its retrain", tag)


def step(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A task of a stage: a bar on the flow run's timeline. Never cached: DVC decides what runs."""
    return task(name=name, cache_policy=NO_CACHE)


def _files(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return found


def finish(run: StageRun, results: Iterable[Path]) -> None:
    """Write ``reports/stages/<stage>.json``, copy ``results`` (files and folders) to the store, link them in the UI."""
    now = time.time()
    facts = {
        "stage": run.stage,
        "seconds": round(now - run.started, 2),
        "started": datetime.fromtimestamp(run.started, timezone.utc).isoformat(timespec="seconds"),
        "finished": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="seconds"),
        "peak_memory_gib": run.memory.stop(),
        "flow_run": run.flow_run,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: version(name) for name in PACKAGES},
    }
    record = run.path(f"reports/stages/{run.stage}.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, facts)
    uploaded: list[tuple[str, str, int]] = []
    for path in [*_files(results), record]:
        key = f"runs/{run.flow_run}/{path.relative_to(run.workspace).as_posix()}"
        info = run.store.put_file(path, key)
        uploaded.append((run.store.uri(key), info.version, info.size))
    publish_objects("objects", uploaded, run.runtime, f"{run.stage}: objects in the store")
    publish_table("dvc", hash_table(run.stage, run.workspace), f"{run.stage}: DVC hashes of inputs and outputs")
    run.logger.info("%s: done in %.0f s, peak memory %.2f GiB", run.stage, facts["seconds"], facts["peak_memory_gib"])


class _OneLineErrors(logging.Filter):
    """Drop the traceback of errors that are the input's or the environment's fault; the message says it all."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None and foreseeable(record.exc_info[1]):
            record.exc_info, record.exc_text = None, None
        return True


def begin_process() -> Runtime:
    """What a process that runs flows does before its first one; the settings of its environment.

    Addresses of the local services (``make up``) are filled in where none are set. The process ends with the
    ``dvc repro`` or the worker that started it: were that one killed, the flow would go on beside the next run of the
    same stage. Errors of input or services are logged without a traceback.
    """
    end_with_starter("DVC_STAGE", "dvc")
    end_with_starter(WORKER_MARK, "infra.deploy")
    adopt_local_services()
    refresh_global_settings_context()  # Prefect has read its environment before
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _OneLineErrors) for known in logger.filters):
            logger.addFilter(_OneLineErrors())
    return Runtime()


def begin_deployed(folder: str = "") -> tuple[Runtime, Path, Path]:
    """What a deployment's flow does first: the runtime, the project's workspace, and the folder of this run.

    The folder is ``runs/<flow-run-id>/`` of the workspace unless told otherwise. ServiceError: Prefect or the object
    store does not answer.
    """
    runtime = begin_process()
    require_services(runtime)
    workspace = Path(runtime.workspace).resolve()
    name = flow_run.id or f"local-{time.strftime('%Y%m%d-%H%M%S')}"
    return runtime, workspace, Path(folder).resolve() if folder else workspace / "runs" / name


def by_hand(made: Flow[..., Any], **parameters: Any) -> int:
    """Run a flow as a command; its status. An error of input or services is one line on stderr and status 1."""

    def run() -> None:
        require_services(begin_process())
        run_flow(made, **parameters)

    return exit_status(run, interrupted="interrupted; run it again to go on from what is finished")


def main(stage_flow: Flow[..., Any]) -> int:
    """Run a stage's flow in the current folder."""
    return by_hand(stage_flow, workspace=os.getcwd())
