"""Work of one stage on many machines: shards go to the workers of a Dask cluster (``WAV_DASK``, docs/cluster.md).

::

    with open_cluster("tcp://head:8786") as cluster:
        label_store(episodes, settings, chunk, "data/rewards", run=cluster.mapper())

A job is idempotent and leaves its result in a file, so that running one twice is harmless. One worker gets one job at
a time and this process keeps the list: whatever Dask does on a loss (it forgets tasks, runs them again, or holds them
for ever), jobs that were on a worker or scheduler that went are handed out anew, and no others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wav.errors import ConfigError, ServiceError, WavError
from wav.io.files import canonical_digest
from wav.local import PROJECT
from wav.shards import Mapper
from wav.source_code import library_versions, module_digests

if TYPE_CHECKING:
    from distributed import Client, Future, Security

LOCAL = "local"
GPU = "GPU"
ATTEMPTS = 3
"""Workers that one job may cost."""
PATIENCE_S = 300.0
"""How long a scheduler, or a worker that fits, is waited for."""
_LOOK_S, _POLL_S, _CONNECT_S = 1.0, 0.05, 10.0
_SAME, _CHANGED = "as at its start", "changed since its start"
_IMPORTED = time.time()  # on a worker, nothing of this project is imported before a task asks for it here
_START = "start one (dask scheduler --host ADDRESS --no-dashboard)"
_REMEDY = "finished shards are kept: run the stage again"
_log = logging.getLogger(__name__)


def describe(entries: tuple[str, ...], folder: str) -> dict[str, str]:
    """What must be equal where a job runs: code of the modules that decide it, versions, the sight of ``folder``.

    A process that imported this module before files changed may run either, and says so.
    """
    digests = module_digests(entries)
    changed = any((PROJECT / path).stat().st_ctime > _IMPORTED for path in digests)
    found = {"code": canonical_digest(digests)[:12], "files": _CHANGED if changed else _SAME}
    found |= {"python": platform.python_version(), **library_versions(entries)}
    return found | {"folder": f"{folder} is {'there' if Path(folder).is_dir() else 'not there'}"}


@functools.cache
def _child() -> Any:
    """This worker's simulator process, which ends with it (:mod:`wav.sim.worker`)."""
    from wav.sim.workers import Caller

    return Caller()


def _run(function: Callable[..., Any], job: tuple[Any, ...], folder: str, in_child: bool) -> Any:
    """A job on a worker; an exit, which would end the worker, becomes an error as any other."""
    try:
        with contextlib.chdir(folder):
            return _child().call(function, job) if in_child else function(*job)
    except (Exception, SystemExit) as error:
        _log.exception("a job failed")
        return error if isinstance(error, WavError) else RuntimeError(f"{type(error).__name__}: {error}")


class Cluster:
    """A Dask scheduler and its workers; open one with :func:`open_cluster`.

    Args:
        address: of the scheduler, as Dask writes it (``tcp://host:8786``).
        patience_s: see :data:`PATIENCE_S`.
        security: Dask's TLS settings; None: those of Dask's own configuration.
    """

    def __init__(self, address: str, patience_s: float = PATIENCE_S, security: Security | None = None) -> None:
        self.address, self.patience_s, self.security = address, patience_s, security

    def mapper(self, in_child: bool = False, gpu: bool = False) -> Mapper:
        """What runs ``function(*job)`` for every job on the workers that fit, and yields outcomes as they are there.

        The function is importable at top level; a worker whose modules behind it are others is refused. Going through
        the outcomes raises ServiceError where neither the scheduler nor a worker that fits answers for ``patience_s``.

        Args:
            in_child: run in a simulator process of the worker's, so that a crash there costs a job and no worker.
            gpu: only on workers that were started with the resource ``GPU=1``.
        """

        def run(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], _: int) -> Iterator[tuple[int, Any]]:
            work = _Run(self, function, jobs, in_child, gpu)
            try:
                yield from work.outcomes()
            finally:
                work.close()

        return run


@contextlib.contextmanager
def open_cluster(address: str, workers: int = 0, patience_s: float = PATIENCE_S) -> Iterator[Cluster]:
    """The cluster at ``address``, or for ``local`` one of this machine's cores that ends with the block.

    ``workers`` are processes of a local cluster (0: the machine's cores). Its ports ask for a certificate that this
    process alone has, since whoever they let in may have the workers run anything. ConfigError where Dask is not
    installed, or for an address that is none.
    """
    try:
        import dask
        import distributed
    except ImportError:
        raise ConfigError(f"WAV_DASK = {address}: distributed is not installed; pip install 'wav[cluster]'") from None
    logging.getLogger("distributed").setLevel(logging.ERROR)
    if address != LOCAL:
        if "://" not in address:
            raise ConfigError(f"WAV_DASK = {address}: is no address; use local, or the scheduler's tcp://HOST:8786")
        yield Cluster(address, patience_s)
        return
    quiet = {"distributed.nanny.pre-spawn-environ.DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error"}  # in a stage's log
    security = distributed.Security.temporary()
    with (
        dask.config.set(quiet),
        distributed.LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=workers or None,
            threads_per_worker=1,
            memory_limit=0,
            host="127.0.0.1",
            protocol="tls",
            security=security,
            dashboard_address=None,
            silence_logs=logging.ERROR,
            env={"WAV_WORKERS": "1"},  # simulators beside each worker
        ) as local,
    ):
        yield Cluster(local.scheduler_address, patience_s, security)


@dataclass
class _Worker:
    """What is known of a worker. With a task and no job it is saying what it is; without a task it is idle."""

    task: Future | None = None
    job: int | None = None
    refused: str = ""


def _present(client: Client) -> dict[str, Any]:
    """Workers by address; ``client.scheduler_info()`` names none where Dask's own update comes between."""
    scheduler: Any = client.scheduler
    if scheduler is None:
        raise OSError("the connection is closed")
    workers: dict[str, Any] = client.sync(scheduler.identity, n_workers=-1)["workers"]
    return workers


def _result(task: Future) -> tuple[Any, str]:
    """What a task that is no longer pending came to, or why there is nothing."""
    if task.status not in ("finished", "error"):
        return None, f"lost its task ({task.status})"
    try:
        return task.result(timeout=_CONNECT_S), ""
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {error}"


class _Run:
    """One list of jobs: who may work, which job is where, and what is left."""

    def __init__(
        self,
        cluster: Cluster,
        function: Callable[..., Any],
        jobs: Sequence[tuple[Any, ...]],
        in_child: bool,
        gpu: bool,
    ) -> None:
        self.name, self.patience_s = f"WAV_DASK = {cluster.address}", cluster.patience_s
        self.address, self.function, self.jobs, self.in_child, self.gpu = cluster.address, function, jobs, in_child, gpu
        self.security = cluster.security
        self.folder = str(Path.cwd())
        own = (function.__module__,) if function.__module__.startswith("wav.") else ()  # else: not of this project
        self.entries = (*own, "wav.sim.worker")
        self.here = describe(self.entries, self.folder) | {"files": _SAME}  # what is asked of workers
        self.todo, self.attempts = deque(range(len(jobs))), Counter[int]()
        self.workers: dict[str, _Worker] = {}
        self.client: Client | None = None
        self.looked = self.fit = time.monotonic()

    def outcomes(self) -> Iterator[tuple[int, Any]]:
        """(index of the job, its result or exception) in any order."""
        left = len(self.jobs)
        while left:
            found: list[tuple[int, Any]] = []
            try:
                client = self._connected()
                self._look(client)
                for address in self.workers:
                    found += self._serve(client, address)
            except (OSError, RuntimeError, ValueError) as error:  # what Dask raises once its scheduler is gone
                if isinstance(error, WavError):
                    raise
                _log.warning("%s: lost (%s); connecting again", self.name, error or type(error).__name__)
                self.close()
            for index in [index for index in self.todo if self.attempts[index] >= ATTEMPTS]:
                self.todo.remove(index)
                found.append((index, ServiceError(f"job {index + 1} of {len(self.jobs)} ended {ATTEMPTS} workers")))
            left -= len(found)
            yield from found
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Drop what was not begun, and the connection."""
        self.todo.extendleft(worker.job for worker in self.workers.values() if worker.job is not None)
        self.workers.clear()
        client, self.client = self.client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close(timeout=2)

    def _connected(self) -> Client:
        """The client; a new one after a loss, since Dask's own way back forgets what it was doing."""
        from distributed import Client

        if self.client is not None and self.client.status == "running":
            return self.client
        self.close()
        deadline, seconds = time.monotonic() + self.patience_s, min(_CONNECT_S, self.patience_s)
        while self.client is None:
            try:
                own = {"timeout": seconds, "security": self.security, "set_as_default": False, "name": "wav"}
                self.client = Client(self.address, **own)
            except (OSError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"{self.name}: no scheduler answered for {self.patience_s:.0f} s ({error}); {_START}, {_REMEDY}"
                    ) from None
                time.sleep(_LOOK_S)
        self.looked, self.fit = time.monotonic() - _LOOK_S, time.monotonic()
        return self.client

    def _look(self, client: Client) -> None:
        """Who came, who went; ServiceError where nobody who fits has been there for long."""
        now = time.monotonic()
        if now - self.looked < _LOOK_S:
            return
        self.looked = now
        present = _present(client)
        for address in set(self.workers) - set(present):
            worker = self.workers.pop(address)
            if worker.job is not None:
                self._again(worker.job, f"worker {address} went", 1)
        for address in present.keys() - self.workers.keys():
            self.workers[address] = _Worker()
            if reason := self._unfit(present[address]):
                self._refuse(address, reason)
            else:
                task = client.submit(describe, self.entries, self.folder, workers=[address], pure=False)
                self.workers[address].task = task
        if any(worker.job is not None for worker in self.workers.values()):
            self.fit = now
        elif now - self.fit > self.patience_s:
            seen = [f"{address} {worker.refused}" for address, worker in self.workers.items() if worker.refused]
            raise ServiceError(
                f"{self.name}: no worker that fits for {self.patience_s:.0f} s ({'; '.join(seen[:3]) or 'none came'}); "
                f"start one (dask worker {self.address} --nthreads 1 --memory-limit 0"
                f"{f' --resources {GPU}=1' if self.gpu else ''}), {_REMEDY}"
            )

    def _unfit(self, facts: dict[str, Any]) -> str:
        """What a worker was started with that would make it fail later; empty where it fits."""
        if facts["nthreads"] != 1:
            return f"has {facts['nthreads']} threads; start it with --nthreads 1"
        if facts["memory_limit"]:  # mapped files count as its memory: it would be paused or killed
            return "has a memory limit; start it with --memory-limit 0"
        if self.gpu and not facts.get("resources", {}).get(GPU):
            return f"has no resource {GPU}; start one per GPU with --resources {GPU}=1"
        return ""

    def _refuse(self, address: str, reason: str) -> None:
        _log.warning("cluster: worker %s is refused: it %s", address, reason)
        self.workers[address].refused = reason

    def _again(self, job: int, why: str, cost: int) -> None:
        _log.warning("cluster: job %d of %d is handed out again: %s", job + 1, len(self.jobs), why)
        self.attempts[job] += cost
        self.todo.appendleft(job)

    def _judge(self, address: str, there: dict[str, str], problem: str) -> None:
        """Refuse a worker by what it says of itself."""
        other = [
            f"{name} {there.get(name)} (here {mine})" for name, mine in self.here.items() if there.get(name) != mine
        ]
        if problem or other:
            self._refuse(address, problem or f"has {', '.join(other)}")

    def _serve(self, client: Client, address: str) -> list[tuple[int, Any]]:
        """What a worker has finished; an idle one is given the next job."""
        worker, task = self.workers[address], self.workers[address].task
        if task is not None and task.status != "pending":
            job, worker.task, worker.job = worker.job, None, None
            outcome, problem = _result(task)
            if job is not None and not problem:
                return [(job, outcome)]  # the next one at the next look, lest a failure there lose this outcome
            if job is not None:
                self._again(job, problem, task.status == "error")
            else:
                self._judge(address, outcome or {}, problem)
        if worker.task is None and not worker.refused and self.todo:
            worker.job = self.todo.popleft()
            arguments = (self.function, self.jobs[worker.job], self.folder, self.in_child)
            worker.task = client.submit(_run, *arguments, workers=[address], pure=False)
        return []
