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
from typing import Any, Protocol

from wav.errors import ConfigError, cut
from wav.training.step import Row

LOG = logging.getLogger("wav.training")
PROJECT = "wav"


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run."""

    name: str
    """``STAGE-KEY``: the same after a restart."""
    folder: Path
    """For the files of trackers that write some."""
    settings: Mapping[str, Any]
    """Sections of the parameters."""


class Tracker(Protocol):
    """Takes rows of metrics."""

    def log(self, step: int, row: Row) -> None:
        """Record metrics of ``step``; a step that is there already is left as it is."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoard:
    """Event files; written anew after a restart, whose rows come again."""

    def __init__(self, run: RunFacts) -> None:
        folder = run.folder / run.name
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def log(self, step: int, row: Row) -> None:
        """See :class:`Tracker`."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, resumed by its id."""

    def __init__(self, run: RunFacts) -> None:
        wandb = import_module("wandb")
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run.name,
            name=run.name,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
        )

    def log(self, step: int, row: Row) -> None:
        """See :class:`Tracker`; wandb knows of a resumed run at which step it was."""
        if step >= self._run.step:
            self._run.log(dict(row), step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, found again by its name; the store is ``MLFLOW_TRACKING_URI``'s."""

    def __init__(self, run: RunFacts) -> None:
        mlflow = import_module("mlflow")
        self._entities = import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tagged = self._client.search_runs([experiment], f"tags.`wav.run` = '{run.name}'", max_results=1)
        if tagged:
            self._id = tagged[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"wav.run": run.name}
            self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
            for section, values in run.settings.items():
                for key, value in values.items():
                    self._client.log_param(self._id, f"{section}.{key}", cut(value, 500))
        history = self._client.get_metric_history(self._id, "loss") if tagged else []
        self._last = max((entry.step for entry in history), default=-1)

    def log(self, step: int, row: Row) -> None:
        """See :class:`Tracker`."""
        if step > self._last:
            now = int(time.time() * 1000)
            metrics = [self._entities.Metric(name, float(value), now, step) for name, value in row.items()]
            self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._client.set_terminated(self._id)


#: WAV_TRACK -> (the package it needs, its tracker)
TRACKERS: Mapping[str, tuple[str, Callable[[RunFacts], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "mlflow": ("mlflow", MLflow),
}


class _Patient:
    """A tracker whose refusals are told once."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._told = name, tracker, False

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a tracker's server may do anything; the training is worth more
            if not self._told:
                LOG.warning("WAV_TRACK=%s: %s; rows are missing there, dvclive has them", self._name, cut(error))
            self._told = True

    def log(self, step: int, row: Row) -> None:
        """See :class:`Tracker`."""
        self._try(lambda: self._tracker.log(step, row))

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._try(self._tracker.close)


def open_tracker(name: str, run: RunFacts) -> Tracker | None:
    """The tracker that ``WAV_TRACK`` names; None for an empty name.

    Raises:
        ConfigError: its package is missing, or it does not start.
    """
    if not name:
        return None
    package, make = TRACKERS[name]
    try:
        import_module(package)
        return _Patient(name, make(run))
    except ImportError as error:
        raise ConfigError(f"WAV_TRACK = {name}: {cut(error)}; pip install 'wav[{name}]', or unset it") from None
    except Exception as error:  # each has errors of its own
        remedy = "correct its variables, or unset it"
        raise ConfigError(f"WAV_TRACK = {name}: does not start ({cut(error)}); {remedy}") from None
