"""The one table of stages: what each reads, makes and runs. Everything that must name the stages takes them from here.

``dvc.yaml`` is what the table means: ``python -m wav.stages > dvc.yaml`` writes it again after a change, and
``tests/test_pipeline.py`` compares. Which modules decide a stage's result is found by :mod:`wav.source_code`; DVC's
stage ``code`` (``python -m wav.stages code``) writes their digests, without comments, into ``reports/code/STAGE.json``,
and each stage depends on its own file there. So an edit that changes no stage's code runs nothing but ``code`` again.
(``dvc status`` and ``dvc repro --dry`` know what an edit means once ``code`` has run: first ``dvc repro code``.)

``code`` runs every time, in a second, because it looks at what DVC does not know about as well: folders and files that
parameters name (a dataset, weights). What it finds there, names, sizes and times, goes into the same files, so that a
dataset that has grown is ingested again.

To add a stage: a row here, a section in :mod:`wav.config` and params.yaml, a flow ``flows/NAME.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wav.errors import ConfigError, exit_status

#: DVC's own first step; no Prefect flow belongs to it
CODE_STAGE = "code"
CODE_FOLDER = "reports/code"


@dataclass(frozen=True)
class Training:
    """What a training stage has beside the rest: its objective, its folder, and the folder it starts from."""

    objective: str  #: ``module:class`` in wav.training.objectives
    folder: str
    start: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage. Paths are relative to the workspace; a stage's own section of params.yaml has its name."""

    name: str
    makes: str  #: what comes out, in a few words
    sections: tuple[str, ...]  #: of params.yaml, that it may read
    inputs: tuple[str, ...]  #: data that earlier stages make
    outputs: tuple[str, ...]
    kept: tuple[str, ...] = ()  #: outputs that DVC leaves in place: what a run before has done there is not done again
    metrics: str = ""
    modules: tuple[str, ...] = ()  #: that run in processes of their own, which no import names
    unused: tuple[str, ...] = ()  #: modules or packages that the code names but that never run in this stage
    outside: tuple[str, ...] = ()  #: parameters that name files outside DVC's care, such as ``ingest.path``
    training: Training | None = None

    @property
    def flow(self) -> str:
        """Module of the Prefect flow; ``python -m`` it runs the stage."""
        return f"flows.{self.name}"

    @property
    def deployment(self) -> str:
        """Name of the flow and of its deployment."""
        return self.name.replace("_", "-")

    @property
    def record(self) -> str:
        """File with the run's time, memory, machine and versions."""
        return f"reports/stages/{self.name}.json"

    @property
    def code(self) -> str:
        """File with the digests of the modules that decide the result."""
        return f"{CODE_FOLDER}/{self.name}.json"

    @property
    def entries(self) -> tuple[str, ...]:
        """Modules from which everything that the stage runs is imported."""
        objective = (self.training.objective.partition(":")[0],) if self.training else ()
        return (self.flow, *self.modules, *objective)

    @property
    def made(self) -> tuple[str, ...]:
        """Everything the stage makes."""
        return (*self.outputs, *self.kept, self.record, *((self.metrics,) if self.metrics else ()))


_CHECKPOINT = ("checkpoint.json", "conventions.json", "episodes_statistics.json")
_VALUES = "rewards_statistics.json"
_JOINT = (*(f"models/joint/{name}" for name in (*_CHECKPOINT, "model")), f"models/joint/{_VALUES}")


def _training(name: str, makes: str, training: Training, unused: tuple[str, ...] = ()) -> Stage:
    """A training stage: all of them leave the same files."""
    start = training.start
    values = (_VALUES,) if start else ()
    inputs: tuple[str, ...] = ("data/episodes", "data/latents")
    if start:
        of_start = () if start == "models/video" else (_VALUES,)
        inputs += ("data/rewards", *(f"{start}/{file}" for file in (*_CHECKPOINT, "model", *of_start)))
    return Stage(
        name,
        makes,
        sections=("data", "model", *(("coupling",) if start else ()), name),
        inputs=inputs,
        outputs=(),
        kept=tuple(f"{training.folder}/{file}" for file in ("model", "plots", *_CHECKPOINT, *values)),
        metrics=f"{training.folder}/metrics.json",
        modules=("wav.training.loop",),
        unused=("wav.codec", "wav.text", *unused),  # encoders of the latents, which are not loaded
        training=training,
        outside=() if start else ("model.init_from",),
    )


_TABLE = (
    Stage(
        "ingest",
        "one canonical episode store, normalisation statistics, a quarantine report",
        sections=("data", "ingest"),
        inputs=(),
        outputs=("reports/ingest/pictures",),
        kept=("data/episodes",),
        metrics="reports/ingest/metrics.json",
        modules=("wav.sim.worker",),
        outside=("ingest.path",),
    ),
    Stage(
        "label_rewards",
        "the terms of Table 2 and returns, per step",
        sections=("data", "label_rewards"),
        inputs=("data/episodes",),
        outputs=("reports/label_rewards/pictures",),
        kept=("data/rewards",),
        metrics="reports/label_rewards/metrics.json",
    ),
    Stage(
        "encode",
        "latents of all frames, embeddings of all instructions",
        sections=("data", "encode"),
        inputs=("data/episodes",),
        outputs=("reports/encode/pictures",),
        kept=("data/latents",),
        metrics="reports/encode/metrics.json",
        outside=("encode.path", "encode.text"),
    ),
    _training(
        "pretrain_video",
        "the video expert (training stage 1)",
        Training("wav.training.objectives.video:VideoObjective", "models/video"),
        unused=("wav.data.reward_store",),
    ),
    _training(
        "train_value",
        "the value expert on frozen video features (training stage 2)",
        Training("wav.training.objectives.value:ValueObjective", "models/value", "models/video"),
    ),
    _training(
        "train_joint",
        "video, value and action together (training stage 3)",
        Training("wav.training.objectives.joint:JointObjective", "models/joint", "models/value"),
    ),
    Stage(
        "eval_libero",
        "closed-loop success with intervals, planned and unplanned, on data.suites",
        sections=("data", "model", "label_rewards", "planner", "eval_libero"),
        inputs=("data/episodes", "data/latents", "data/rewards", *_JOINT),
        outputs=("reports/index.html", "reports/eval/table.md"),
        kept=tuple(f"reports/eval/{name}" for name in ("episodes", "videos", "strips", "predictions", "values.json")),
        metrics="reports/eval/metrics.json",
        modules=("wav.sim.worker",),
    ),
    Stage(
        "export",
        "a self-contained policy folder that a server loads",
        sections=("data", "model", "planner", "export"),
        inputs=("data/latents", *_JOINT, "reports/eval/metrics.json"),
        outputs=("export",),
    ),
)
#: name -> stage, in the order in which they run
STAGES: Mapping[str, Stage] = MappingProxyType({stage.name: stage for stage in _TABLE})
#: the training stages among them
TRAINING: Mapping[str, Training] = MappingProxyType({s.name: s.training for s in _TABLE if s.training is not None})


def stage(name: str) -> Stage:
    """The stage of that name.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    if name not in STAGES:
        raise ConfigError(f"stage {name!r}: unknown; the stages are {', '.join(STAGES)}")
    return STAGES[name]


def dvc_stages() -> dict[str, Any]:
    """The ``stages`` of ``dvc.yaml`` that the table means."""
    found: dict[str, Any] = {
        CODE_STAGE: {
            "cmd": f"python -m wav.stages {CODE_STAGE}",
            "outs": [{row.code: {"cache": False}} for row in STAGES.values()],
            "always_changed": True,
        }
    }
    for row in STAGES.values():
        kept, record = [{path: {"persist": True}} for path in row.kept], {row.record: {"cache": False}}
        persist = {"persist": True} if row.metrics.startswith("models/") else {}
        found[row.name] = {
            "cmd": f"python -m {row.flow}",
            "deps": [*sorted(row.inputs), row.code],
            "params": list(row.sections),
            "outs": [*kept, *row.outputs, record],
            **({"metrics": [{row.metrics: {"cache": False} | persist}]} if row.metrics else {}),
        }
    return found


_HEADER = """\
# The pipeline: eight stages, each a Prefect flow of the same name, and before them `code`, which writes down which
# modules decide each stage's result and what is in them, comments left out, and what lies in the dataset and weights
# that parameters name. This file is what the table in wav/stages.py means: change it there, then
# `python -m wav.stages > dvc.yaml`.
"""


def dvc_yaml() -> str:
    """Text of ``dvc.yaml``."""
    import yaml  # GPU machines that only measure read this module without it

    curves = {f"{training.folder}/plots/metrics/loss.tsv": "loss" for training in TRAINING.values()}
    whole = {"stages": dvc_stages(), "plots": [{"loss": {"title": "training loss", "x": "step", "y": curves}}]}
    return _HEADER + yaml.safe_dump(whole, sort_keys=False)


def write_code(workspace: Path) -> Iterator[str]:
    """Write each stage's ``reports/code/STAGE.json`` in ``workspace``; yields a line per stage for which it changed."""
    from wav.parameter_files import read_parameters
    from wav.source_code import digests, own_module, stage_modules

    parameters = workspace / "params.yaml"
    given = read_parameters(parameters) if parameters.is_file() else {}
    for row in STAGES.values():
        path, found = workspace / row.code, digests(stage_modules(row.name))
        if row.name == "ingest":
            found |= own_module(str((given.get("ingest") or {}).get("source")))
        for name in row.outside:
            section, _, field = name.partition(".")
            value = (given.get(section) or {}).get(field)
            if value and (listed := listing(_place(workspace, str(value)))):
                found[name] = listed
        text = json.dumps(found, indent=1) + "\n"
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            yield f"{row.name}: {len(found)} modules, and files that parameters name, decide its result"


def _place(workspace: Path, value: str) -> Path:
    """The file or folder that a parameter names; of a hub id the snapshot that was fetched last."""
    path = workspace / Path(value).expanduser()
    if path.exists() or value.count("/") != 1:
        return path
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE) / f"models--{value.replace('/', '--')}"
    fetched = cache / "refs" / "main"
    return cache / "snapshots" / fetched.read_text().strip() if fetched.is_file() else path


def listing(path: Path) -> str:
    """How many files lie at a path, and a digest of their names, sizes and times; empty where nothing does.

    Hidden files are nobody's. Contents are not read: a dataset may have a terabyte.
    """
    found = sorted(_below(path)) if path.is_dir() else [path] if path.is_file() else []
    digest, count = hashlib.sha256(), 0
    for file in found:
        name = file.relative_to(path)
        if any(part.startswith(".") for part in name.parts) or not file.is_file():
            continue
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        count += 1
    return f"{count} files, {digest.hexdigest()[:16]}" if count else ""


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder, those of linked folders too (videos on another disk); each folder once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in files)


def main(arguments: list[str] | None = None) -> int:
    """Print the dvc.yaml that the table means, or write the digests of the stages' code."""
    parser = argparse.ArgumentParser(prog="wav.stages", description=main.__doc__)
    parser.add_argument("command", nargs="?", choices=("dvc", CODE_STAGE), default="dvc")
    command = parser.parse_args(arguments).command

    def run() -> None:
        if command == "dvc":
            sys.stdout.write(dvc_yaml())
            return
        for line in write_code(Path()):
            sys.stdout.write(f"{line}\n")

    return exit_status(run)


if __name__ == "__main__":
    raise SystemExit(main())
