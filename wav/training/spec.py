"""What a training run is given, and the key that says when two runs are the same run.

A run is described by one JSON file (:class:`TrainSpec`). Its ``key`` digests everything that changes the result:
the stage's parameters, its inputs and the code. A restart resumes checkpoints of an equal key and no others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from wav.config import (
    CouplingSettings,
    DataSettings,
    ModelSettings,
    PretrainVideoSettings,
    Settings,
    TrainJointSettings,
    TrainValueSettings,
)
from wav.errors import ConfigError, DataError, cut
from wav.io.files import canonical_digest, file_digest, read_json
from wav.source_code import digests, modules
from wav.stages import STAGES, TRAINING

#: each stage's section has the fields of the one before and more
_AnyTrainSettings = PretrainVideoSettings | TrainValueSettings | TrainJointSettings
#: Parameters that change how a run is watched and kept, not what it computes: they are no part of its key.
WATCHING = frozenset(
    {
        "checkpoint_every",
        "keep_last",
        "keep_best",
        "keep_every",
        "log_every",
        "validate_every",
        "spike_factor",
        "max_skipped_steps",
    }
)
#: How the work is spread. No part of the key either: a run goes on with other ranks or another ZeRO stage
#: (:mod:`wav.training.universal`), and a finished run is not repeated because a machine has more GPUs. With one
#: ``micro_batch_size`` the draws are the same on any ranks, so that losses differ by rounding; left to the ranks
#: (0), runs on one and on two are two equally good samples. (The joint stage deals roles out by micro-batch: its draws
#: are the same where a micro-batch holds whole shares of them.)
LAYOUT = frozenset({"ranks", "nodes", "zero_stage"})
#: Modules that, with the stage's objective and all that they import, decide what a run computes. Those that watch, keep
#: and report it are not among them, so that a run which was broken off survives an edit of theirs.
DECIDING = tuple(f"wav.training.{name}" for name in ("ema", "engine", "inputs", "prefetch", "step"))
#: What these name that decides nothing: files and hashes of what the inputs' digests stand for, and this module.
READING = ("wav/hub", "wav/io", "wav/training/spec")
CHECKPOINT_FILE = "checkpoint.json"


@dataclass(frozen=True)
class TrainPaths:
    """Folders of a run."""

    episodes: Path
    latents: Path
    output: Path  #: appears when the run is complete
    cache: Path  #: keeps work that must survive a killed process
    rewards: Path | None = None  #: may be None for the first stage
    init: Path | None = None  #: the previous stage's output folder


@dataclass(frozen=True)
class TrainSpec:
    """One training run; see :func:`make_spec`. ``inputs``: digest of episodes, latents, rewards, init, init_from."""

    stage: str
    data: DataSettings
    model: ModelSettings
    train: Annotated[_AnyTrainSettings, Field(union_mode="left_to_right")]
    coupling: CouplingSettings
    paths: TrainPaths
    store: str
    endpoint: str
    region: str
    device: str
    threads: int
    inputs: dict[str, str]
    code: str
    key: str

    @property
    def prefix(self) -> str:
        """Where the run's checkpoints live in the store."""
        return f"training/{self.stage}/{self.key}"

    @property
    def work(self) -> Path:
        """Local folder of this run, which survives a killed process."""
        return self.paths.cache / self.stage / self.key

    def to_json(self) -> str:
        """The spec as text; holds no credentials."""
        return TypeAdapter(TrainSpec).dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(text: str | bytes) -> TrainSpec:
        """Read what :meth:`to_json` wrote; ConfigError when it is something else."""
        try:
            return TypeAdapter(TrainSpec).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            problem = ": ".join((".".join(map(str, first["loc"])) or "text", cut(first["msg"])))
            raise ConfigError(f"training spec: {problem}; write it with wav.training.spec.make_spec") from None


def make_spec(
    stage: str,
    settings: Settings,
    paths: TrainPaths,
    *,
    store: str,
    endpoint: str = "",
    region: str = "us-east-1",
    device: str = "auto",
    threads: int = 0,
) -> TrainSpec:
    """Describe a run of ``stage``: digest its inputs and code and derive its key.

    Only the sections of this stage are read, and paths are made absolute. ``threads`` 0: the machine's cores, shared by
    the ranks.

    Raises:
        ConfigError: no such stage.
        DataError: an input folder is missing or incomplete.
        CheckpointError, ServiceError: ``model.init_from`` names no weights, or a hub id that was not fetched.
    """
    if stage not in TRAINING:
        raise ConfigError(f"training stage {stage!r}: unknown; the stages are {', '.join(TRAINING)}")
    train: _AnyTrainSettings = getattr(settings, stage)
    if stage != "pretrain_video" and paths.init is None:
        raise ConfigError(f"{stage}: paths.init is not set; give it the previous stage's output folder")
    absolute: dict[str, Any] = {n: None if p is None else Path(p).absolute() for n, p in asdict(paths).items()}
    paths = TrainPaths(**absolute)
    coupling = settings.coupling if paths.init is not None else CouplingSettings()
    common = (settings.data, settings.model, train, coupling, paths)
    spec = TrainSpec(stage, *common, store, endpoint, region, device, threads, {}, "", "")
    inputs, code = input_digests(paths), code_digest(stage)
    if stage == "pretrain_video" and spec.model.init_from:
        from wav.model.weights import weights_digest  # slow import

        inputs["init_from"] = weights_digest(spec.model.init_from)
    parameters = {
        "data": spec.data.model_dump(mode="json"),
        "model": spec.model.model_dump(mode="json"),
        "train": train.model_dump(mode="json", exclude=set(WATCHING | LAYOUT)),
        "coupling": coupling.model_dump(mode="json"),
    }
    whole = {"stage": stage, "parameters": parameters, "inputs": inputs, "code": code}
    return replace(spec, inputs=inputs, code=code, key=canonical_digest(whole)[:24])


def input_digests(paths: TrainPaths) -> dict[str, str]:
    """Digest of every input: the stores' manifests (which list their files' digests) and the initial weights.

    Raises:
        DataError: an input is not there; names the stage that makes it.
    """
    digests = {}
    for name, stage in (("episodes", "ingest"), ("latents", "encode"), ("rewards", "label_rewards")):
        if folder := getattr(paths, name):
            manifest = folder / "manifest.json"
            if not manifest.is_file():
                raise DataError(f"{manifest}: missing; make it with `dvc repro {stage}`")
            digests[name] = file_digest(manifest)
    if paths.init is not None:
        digests["init"] = read_checkpoint_file(paths.init)["model_digest"]
    return digests


def read_checkpoint_file(folder: Path) -> dict[str, str]:
    """``checkpoint.json`` of a stage's output folder; DataError when it is missing or damaged."""
    path, remedy = folder / CHECKPOINT_FILE, "train the previous stage first (`dvc repro` does)"
    raw = read_json(path, remedy)
    if not isinstance(raw, dict) or "model_digest" not in raw:
        raise DataError(f"{path}: has no model_digest; {remedy}")
    return raw


def code_digest(stage: str) -> str:
    """Digest of the code, without comments, of the modules that decide what a training stage computes."""
    objective = TRAINING[stage].objective.partition(":")[0]
    unused = (module.replace(".", "/") for module in STAGES[stage].unused)
    return canonical_digest(digests(modules((objective, *DECIDING), (*READING, *unused))))
