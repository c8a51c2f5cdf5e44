"""Trackers beside dvclive, offline; each is skipped, with the reason, where its package is not installed."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from wav.errors import ConfigError
from wav.training.record import Recorder
from wav.training.tracking import TRACKERS, RunFacts, Tracker, open_tracker, patient

ROWS = [(step, {"loss": 1.0 / step, "validation/loss": 2.0 / step}) for step in (2, 4, 6)]


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFacts:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return RunFacts("pretrain_video-0123abcd", tmp_path / "tracking", {"train": {"steps": 6, "learning_rate": 1e-3}})


def opened(name: str, facts: RunFacts) -> Tracker:
    pytest.importorskip(TRACKERS[name][0], reason=f"{name} is not installed: pip install 'wav[{name}]'")
    tracker = open_tracker(name, facts)
    assert tracker is not None
    return tracker


def broken_off_and_gone_on(name: str, facts: RunFacts) -> None:
    """Two rows, a break, and a restart that brings these rows again and one more."""
    for rows in (ROWS[:2], ROWS):
        tracker = opened(name, facts)
        for step, row in rows:
            tracker.log(step, row)
        tracker.close()


def test_tensorboard(facts: RunFacts) -> None:
    broken_off_and_gone_on("tensorboard", facts)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(facts.folder / facts.name))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "validation/loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(row["loss"])) for step, row in ROWS
    ]


def test_mlflow(facts: RunFacts) -> None:
    broken_off_and_gone_on("mlflow", facts)
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("wav")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (facts.name, "FINISHED")
    assert run.data.params == {"train.steps": "6", "train.learning_rate": "0.001"}
    for name in ("loss", "validation/loss"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(entry.step, entry.value) for entry in history] == [(step, row[name]) for step, row in ROWS]


def test_wandb(facts: RunFacts) -> None:
    tracker = opened("wandb", facts)
    for step, row in ROWS:
        tracker.log(step, row)
    tracker.close()
    (file,) = facts.folder.glob("wandb/offline-run-*/*.wandb")
    assert facts.name in file.name
    content = file.read_bytes()
    for text in (b"validation/loss", b"learning_rate", b"pretrain_video-0123abcd"):
        assert text in content


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_before_anything_is_trained(
    name: str, facts: RunFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, TRACKERS[name][0], None)
    with pytest.raises(ConfigError, match=rf"WAV_TRACK = {name}: .*pip install 'wav\[{name}\]'"):
        open_tracker(name, facts)


def test_the_recorder_hands_every_row_on(tmp_path: Path) -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    closed: list[bool] = []
    recorder = Recorder(tmp_path / "live", True, Tracker(lambda *row: rows.append(row), lambda: closed.append(True)))
    recorder.restore(ROWS[:2])
    recorder.add(*ROWS[2])
    recorder.close()
    assert (rows, closed) == (ROWS, [True])


def test_what_a_tracker_refuses_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: int, row: dict[str, float]) -> None:
        raise OSError("server is away")

    tracker = patient("wandb", Tracker(refuse, lambda: None))
    with caplog.at_level(logging.WARNING, logger="wav.training"):
        for step, row in ROWS:
            tracker.log(step, row)
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "WAV_TRACK=wandb: server is away; rows are missing there, dvclive has them"
    ]
