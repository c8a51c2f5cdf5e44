"""A training run's metrics in the tracker that a team uses, beside dvclive's curves: ``WAV_TRACK``.

``WAV_TRACK=tensorboard``, ``wandb`` or ``mlflow``; where to, each says by its own variables (``WANDB_PROJECT``,
``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``; TensorBoard's files lie in
``.wav/training/tracking``). A run that goes on after a break goes on there too, under the name ``STAGE-KEY``. What a
tracker refuses while training goes on is told once and costs no step: dvclive has every row.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from wav.errors import ConfigError, cut
from wav.training.step import Row

LOG = logging.getLogger("wav.training")
PROJECT = "wav"


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run."""

    name: str  #: ``STAGE-KEY``: the same after a restart
    folder: Path  #: for the files of trackers that write some
    settings: Mapping[str, Any]  #: sections of the parameters


@dataclass(frozen=True)
class Tracker:
    """Takes rows of metrics, each step's once, until it is closed."""

    log: Callable[[int, Row], None]
    close: Callable[[], None]


def tensorboard(run: RunFacts) -> Tracker:
    """Event files; written anew after a restart, whose rows come again."""
    folder = run.folder / run.name
    shutil.rmtree(folder, ignore_errors=True)
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def log(step: int, row: Row) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def weights_and_biases(run: RunFacts) -> Tracker:
    """A run of wandb, resumed by its id: it knows itself at which step it was."""
    run.folder.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    settings, named = dict(run.settings), {"id": run.name, "name": run.name, "resume": "allow"}
    begun = import_module("wandb").init(project=project, dir=str(run.folder), config=settings, **named)

    def log(step: int, row: Row) -> None:
        if step >= begun.step:
            begun.log(dict(row), step=step)

    return Tracker(log, begun.finish)


def mlflow(run: RunFacts) -> Tracker:
    """A run of MLflow, found again by its name; the store is ``MLFLOW_TRACKING_URI``'s."""
    client, metric = import_module("mlflow").MlflowClient(), import_module("mlflow.entities").Metric
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    last = -1
    if tagged := client.search_runs([experiment], f"tags.`wav.run` = '{run.name}'", max_results=1):
        number = tagged[0].info.run_id
        client.update_run(number, status="RUNNING")
        last = max((entry.step for entry in client.get_metric_history(number, "loss")), default=-1)
    else:
        number = client.create_run(experiment, tags={"wav.run": run.name}, run_name=run.name).info.run_id
        for section, values in run.settings.items():
            for key, value in values.items():
                client.log_param(number, f"{section}.{key}", cut(value, 500))

    def log(step: int, row: Row) -> None:
        if step > last:
            now = int(time.time() * 1000)
            client.log_batch(number, metrics=[metric(key, float(value), now, step) for key, value in row.items()])

    return Tracker(log, lambda: client.set_terminated(number))


#: WAV_TRACK -> (the package it needs, its tracker)
TRACKERS: Mapping[str, tuple[str, Callable[[RunFacts], Tracker]]] = {
    "tensorboard": ("tensorboard", tensorboard),
    "wandb": ("wandb", weights_and_biases),
    "mlflow": ("mlflow", mlflow),
}


def patient(name: str, tracker: Tracker) -> Tracker:
    """A tracker whose refusals cost no step and are told once."""
    told: list[Exception] = []

    def attempt(call: Callable[..., None], *row: Any) -> None:
        try:
            call(*row)
        except Exception as error:  # a tracker's server may do anything; the training is worth more
            if not told:
                LOG.warning("WAV_TRACK=%s: %s; rows are missing there, dvclive has them", name, cut(error))
            told.append(error)

    return Tracker(lambda step, row: attempt(tracker.log, step, row), lambda: attempt(tracker.close))


def open_tracker(name: str, run: RunFacts) -> Tracker | None:
    """The tracker that ``WAV_TRACK`` names, None for an empty name; ConfigError where it does not start."""
    if not name:
        return None
    package, make = TRACKERS[name]
    try:
        import_module(package)
        return patient(name, make(run))
    except ImportError as error:
        raise ConfigError(f"WAV_TRACK = {name}: {cut(error)}; pip install 'wav[{name}]', or unset it") from None
    except Exception as error:  # each has errors of its own
        remedy = "correct its variables, or unset it"
        raise ConfigError(f"WAV_TRACK = {name}: does not start ({cut(error)}); {remedy}") from None
