"""Schedules, batches, averages, uploads, and the recorder."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wav.config import TrainSettings
from wav.errors import CheckpointError, ConfigError, StorageError
from wav.io.storage import open_store
from wav.io.storage.commit import Retention, commits, seal
from wav.training.checkpoint import Uploader
from wav.training.ema import Ema
from wav.training.engine import plan_batch
from wav.training.record import Recorder
from wav.training.step import learning_rate, mean_row


def test_learning_rate() -> None:
    cosine = TrainSettings(steps=110, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(cosine, 0) == pytest.approx(0.1)
    assert learning_rate(cosine, 9) == learning_rate(cosine, 10) == 1.0
    assert learning_rate(cosine, 60) == pytest.approx(0.5)
    assert 0 < learning_rate(cosine, 109) < 0.001
    constant = TrainSettings(steps=110, warmup_steps=0, learning_rate=0.3, schedule="constant")
    assert {learning_rate(constant, step) for step in range(110)} == {0.3}


def test_batches() -> None:
    plan = plan_batch(TrainSettings(batch_size=32, micro_batch_size=4), 2)
    assert (plan.micro, plan.accumulation) == (4, 4)
    assert plan_batch(TrainSettings(batch_size=32), 2).micro == 16
    with pytest.raises(ConfigError, match="batch_size = 33"):
        plan_batch(TrainSettings(batch_size=33), 2)
    with pytest.raises(ConfigError, match="micro_batch_size = 5"):
        plan_batch(TrainSettings(batch_size=32, micro_batch_size=5), 1)


def test_average() -> None:
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    ema = Ema(module, 0.5, 0, 1)
    assert ema.names() == {"weight"}
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    ema.update(step=100)
    assert torch.allclose(ema.full("weight"), before + 0.5)
    with ema.swapped():
        assert torch.allclose(module.weight, before + 0.5)
    assert torch.allclose(module.weight, before + 1)
    with pytest.raises(CheckpointError, match="other parameters"):
        ema.load([{"weight": torch.zeros(5)}])


@pytest.mark.parametrize(("step", "follows"), [(1, 9 / 11), (1400, 9 / 1410), (1790, 0.005), (10**6, 0.005)])
def test_a_young_average_follows_faster(step: int, follows: float) -> None:
    """What params.yaml says of ``ema_decay``: 0.995 holds from step 1,790 on."""
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, 0.995, 0, 1)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    ema.update(step)
    torch.testing.assert_close(ema.full("weight"), before + follows)


def test_average_shards_cover_every_weight() -> None:
    module = nn.Linear(7, 3)
    shards = [Ema(module, 0.5, rank, 4).state_dict() for rank in range(4)]
    whole = torch.cat([shard["weight"] for shard in shards])[:21].view(3, 7)
    assert torch.equal(whole, module.weight)


def test_means_of_losses_are_exact() -> None:
    assert mean_row([{"loss": 1.0, "loss_video": 3.0}, {"loss": 2.0}]) == {"loss": 1.5, "loss_video": 3.0}


def test_recorder_restores_each_step_once(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "live", True)
    for step in (2, 4, 6):
        first.add(step, {"loss": float(step)})
    rows = first.rows[:2]
    second = Recorder(tmp_path / "live", True)
    second.restore(rows)
    second.add(6, {"loss": 60.0, "validation/loss": 1.0})
    second.close()
    lines = (tmp_path / "live" / "plots" / "metrics" / "loss.tsv").read_text().split()
    assert lines == ["step", "loss", "2", "2.0", "4", "4.0", "6", "60.0"]
    assert (tmp_path / "live" / "plots" / "metrics" / "validation" / "loss.tsv").is_file()
    assert second.latest("loss") == 60.0
    assert second.latest("other") is None


class Slow:
    """A store whose uploads wait for a gate and fail while ``down``."""

    def __init__(self, store: Any) -> None:
        self._store, self.gate, self.down = store, threading.Event(), False
        self.uploads: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_file(self, path: Path, key: str) -> Any:
        self.uploads.append(path.parent.name)
        self.gate.wait(10)
        if self.down:
            raise StorageError("the server is down")
        return self._store.put_file(path, key)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step))
    seal(path, {"step": step})
    return path


def test_uploads_skip_what_newer_ones_replace(tmp_path: Path) -> None:
    store = Slow(open_store((tmp_path / "store").as_uri()))
    uploader = Uploader(store, "run", Retention(2))
    folders = [checkpoint(tmp_path, step) for step in range(4)]
    for folder in folders:
        uploader.submit(folder)
    assert uploader.holds(folders[3])
    store.gate.set()
    uploader.wait()
    done = commits(store, "run")
    assert done[-1] == "run/step-3"
    assert len(done) <= 2


def test_a_slow_store_gets_the_newest_first_and_then_what_retention_keeps(tmp_path: Path) -> None:
    """Multiples of two are kept for good: none may be missing in the store because a newer one overtook it."""
    store = Slow(open_store((tmp_path / "store").as_uri()))
    uploader = Uploader(store, "run", Retention(last=1, every=2))
    for step in range(6):
        uploader.submit(checkpoint(tmp_path, step))
        while step == 0 and not store.uploads:
            threading.Event().wait(0.01)
    assert uploader.holds(tmp_path / "step-0"), "on its way"
    assert uploader.holds(tmp_path / "step-5"), "next"
    for step in (1, 3):  # what pruning removes meanwhile
        assert not uploader.holds(tmp_path / f"step-{step}")
        shutil.rmtree(tmp_path / f"step-{step}")
    store.gate.set()
    uploader.wait()
    assert store.uploads == ["step-0", "step-5", "step-4", "step-2"]
    assert commits(store, "run") == [f"run/step-{step}" for step in (0, 2, 4, 5)]


def test_a_failed_upload_is_an_error_only_if_it_is_the_last(tmp_path: Path) -> None:
    store = Slow(open_store((tmp_path / "store").as_uri()))
    store.gate.set()
    uploader = Uploader(store, "run", Retention(2))
    store.down = True
    uploader.submit(checkpoint(tmp_path, 0))
    with pytest.raises(StorageError, match="server is down"):
        uploader.wait()
    store.down = False
    uploader.submit(checkpoint(tmp_path, 1))
    uploader.wait()
    assert commits(store, "run") == ["run/step-1"]
