"""A smoke pipeline to kill things in: its processes, its services, and one undisturbed run, which is the reference.

Every pipeline has a workspace, a DVC cache and a part of the object store of its own, so all its stages really run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.free_ports import find_free
from wav.local import ports, read_env
from wav.local.workspace import make_workspace
from wav.processes import marked
from wav.stages import STAGES, TRAINING

PROJECT = Path(__file__).resolve().parents[2]
TRAININGS = tuple(TRAINING)
#: trainings on two ranks; the others are one process
SPREAD = ("train_joint",)
SIMULATIONS = ("ingest", "eval_libero")
#: victim -> stages in which it exists
VICTIMS: dict[str, tuple[str, ...]] = {
    "flow": tuple(STAGES),
    "rank": TRAININGS,
    "simulator": SIMULATIONS,
    "s3": tuple(STAGES),
    "prefect": tuple(STAGES),
    "dvc": tuple(STAGES),
}
SERVICES = ("s3", "prefect")
RUNNING = re.compile(r"Running stage '(\w+)'")
#: marks every process of the pipeline, and none of the services
MARK = "WAV_KILL_TEST"
REPRO_SECONDS = 1800.0
END_SECONDS = 600.0
#: fields of metrics files that hold wall-clock time, memory, or how much of the work an earlier process had done;
#: everything else must be equal
WALL_CLOCK = frozenset(
    {
        "seconds",
        "samples_per_second",
        "tokens_per_second",
        "data_wait_share",
        "peak_memory_gib",
        "resumed_from_step",
        "timing",  # of an evaluation: seconds, episodes per hour, episodes of earlier processes
    }
)


def kind(process: psutil.Process) -> str:
    """Which victim a process of the pipeline is; empty for none (shells, helpers)."""
    words = process.cmdline()
    text = " ".join(words)
    if "processes.py" in text:
        return ""
    for module, name in (("wav.training.loop", "rank"), ("wav.sim.worker", "simulator"), ("dvc", "dvc")):
        if module in words and "-m" in words:
            return name
    flows = [word for word in words if word.startswith("flows.")]
    return "flow" if flows and "-m" in words and Path(words[0]).name.startswith("python") else ""


def work(found: Mapping[str, Sequence[psutil.Process]], victim: str) -> float:
    """CPU seconds of ranks or simulators so far; for other victims those of all that runs in the stage.

    A share of it is a point of a stage's life whatever else the machine has to do.
    """
    names = (victim,) if victim in ("rank", "simulator") else found.keys() - {"dvc"}
    total = 0.0
    for process in (process for name in names for process in found.get(name, ())):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@dataclass
class Pipeline:
    """One workspace, its environment and the log of its ``dvc repro`` runs."""

    workspace: Path
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    struck: bool = False  #: whether something of this run was killed
    begin: int = 0  #: where in the log this run begins

    def start(self) -> None:
        """``dvc repro`` in a session of its own."""
        self.struck, self.begin = False, len(self.text())
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dvc", "repro"],
                cwd=self.workspace,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def alive(self) -> list[psutil.Process]:
        """Every process that carries this pipeline's mark."""
        return marked(MARK, self.environment[MARK])

    def running(self) -> bool:
        """Whether ``dvc repro`` runs."""
        return self.process is not None and self.process.poll() is None

    def victims(self) -> dict[str, list[psutil.Process]]:
        """Its processes by kind."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                found.setdefault(kind(process), []).append(process)
        return found

    def stage(self) -> str:
        """The stage that this run of ``dvc repro`` said last; empty before the first."""
        return (RUNNING.findall(self.text()[self.begin :]) or [""])[-1]

    def past(self, stage: str) -> bool:
        """Whether this run is at a later stage, or everything is done."""
        order, now = list(STAGES), self.stage()
        done = self.process is not None and self.process.poll() == 0
        return done or (now in order and order.index(now) > order.index(stage))

    def until_past(self, stage: str, seconds: float) -> None:
        """Wait until it is past the stage or has ended, but no longer than that."""
        deadline = time.monotonic() + seconds
        while self.running() and not self.past(stage) and time.monotonic() < deadline:
            time.sleep(0.5)

    def finished(self) -> list[str]:
        """Stages that DVC has written down as done."""
        lock = self.workspace / "dvc.lock"
        return list(yaml.safe_load(lock.read_text())["stages"]) if lock.exists() else []

    def text(self) -> str:
        """What all runs said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ending(self) -> str:
        """The last lines in one, then more of them."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        return " | ".join(lines[-2:]) + "\n" + "\n".join(lines[-60:])

    def wait(self, seconds: float) -> int:
        """Status of ``dvc repro``; everything is killed where it takes longer."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"dvc repro did not end within {seconds:.0f} s: {self.text()[-3000:]}") from None

    def left_over(self, seconds: float = 30.0) -> list[str]:
        """Command lines of processes that are still there after ``seconds``."""
        deadline = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.5)
        found = []
        for process in alive:
            with contextlib.suppress(psutil.Error):
                found.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
        return found

    def end(self) -> None:
        """Kill what is left."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process is not None:
            self.process.wait()


@dataclass
class Lab:
    """Services, the reference run, and how much each kind of process worked in it."""

    root: Path
    environment: dict[str, str]
    #: (victim, stage) -> CPU seconds that :func:`work` found at most in the reference run
    lives: dict[tuple[str, str], float] = field(default_factory=dict)
    reference: Pipeline | None = None

    def services(self, command: str) -> None:
        """``python -m wav.local.services COMMAND``: what make up and make down run."""
        argv = [sys.executable, "-m", "wav.local.services", command]
        subprocess.run(argv, cwd=PROJECT, env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def service(self, name: str) -> psutil.Process:
        """The Prefect or S3 server."""
        return psutil.Process(json.loads((self.root / "local" / f"{name}.json").read_text())["pid"])

    def credentials(self) -> dict[str, str]:
        """Keys of the S3 server."""
        return read_env(self.root / "local" / "credentials.env")

    @property
    def endpoint(self) -> str:
        """Address of the S3 server."""
        return f"http://{ports.HOST}:{self.environment['WAV_S3_PORT']}"

    def pipeline(self, name: str) -> Pipeline:
        """An empty workspace with a cache, a mark and a place in the store of its own."""
        folder, cache = self.root / name, self.root / f"{name}-cache"
        make_workspace("smoke", folder, cache)
        params = yaml.safe_load((folder / "params.yaml").read_text())
        for stage in TRAININGS:  # a checkpoint after every step, so that pruning is met as well
            params[stage] |= {"ranks": 2 if stage in SPREAD else 1, "checkpoint_every": 1}
        params["eval_libero"] |= {"variants": ["planned"], "swapped_episodes": 0}  # two episodes, not ten
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        own = {MARK: uuid.uuid4().hex, "WAV_STORE": f"s3://wav/{name}", "WAV_S3_ENDPOINT": self.endpoint}
        return Pipeline(folder, self.environment | own, self.root / f"{name}.log")

    def run_reference(self) -> Pipeline:
        """The undisturbed run, watched."""
        reference = self.pipeline("reference")
        reference.start()
        assert reference.process is not None
        try:
            deadline = time.monotonic() + REPRO_SECONDS
            while reference.process.poll() is None and time.monotonic() < deadline:
                stage, found = reference.stage(), reference.victims()
                for victim in VICTIMS:
                    self.lives[victim, stage] = max(self.lives.get((victim, stage), 0.0), work(found, victim))
                time.sleep(0.5)
            assert reference.wait(1) == 0, reference.ending()
            assert not reference.left_over()
        finally:
            reference.end()
        return reference


@contextlib.contextmanager
def open_lab(root: Path, keep: bool) -> Iterator[Lab]:
    """Services on free ports and a finished reference run, taken from ``root`` where it holds them.

    With ``keep`` services and files stay for the next block; else they end with this one.
    """
    memory = root / "lab.json"
    if memory.is_file():
        raw = json.loads(memory.read_text())
        lab = Lab(root, raw["environment"], {(name, stage): life for name, stage, life in raw["lives"]})
        lab.reference = Pipeline(root / "reference", raw["reference"], root / "reference.log")
    else:
        lab = Lab(root, environment(root))
    lab.services("up")
    try:
        if lab.reference is None:
            lab.reference = lab.run_reference()
            lives = [[*key, life] for key, life in lab.lives.items()]
            raw = {"environment": lab.environment, "lives": lives, "reference": lab.reference.environment}
            memory.write_text(json.dumps(raw))
        yield lab
    finally:
        if not keep:
            lab.services("down")


def environment(root: Path) -> dict[str, str]:
    """This process's environment, with services of its own and no other settings of the project."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "WAV_", "DVC_"))}
    own = {"WAV_LOCAL_DIR": str(root / "local"), "DVC_SITE_CACHE_DIR": str(root / "dvc-site")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | find_free() | own | {"WAV_WORKERS": "2", "WAV_THREADS": "1", "PYTHONUNBUFFERED": "1", "PATH": path}


def kill(process: psutil.Process) -> bool:
    """SIGKILL; whether it was there."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return False
    return True


def strip(value: Any) -> Any:
    """Metrics without their wall-clock fields."""
    if isinstance(value, dict):
        return {name: strip(inner) for name, inner in value.items() if name not in WALL_CLOCK}
    return [strip(inner) for inner in value] if isinstance(value, list) else value


def results(workspace: Path) -> dict[str, Any]:
    """Every metrics file without wall-clock fields, every weights file by digest, every episode record's outcome."""
    import hashlib

    found: dict[str, Any] = {}
    for path in (row.metrics for row in STAGES.values() if row.metrics):
        found[path] = strip(json.loads((workspace / path).read_text()))
    for weights in sorted(workspace.glob("models/*/model/*.safetensors")):
        found[str(weights.relative_to(workspace))] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return found
