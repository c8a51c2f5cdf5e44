"""Parallel, resumable, flat: what holds for every dataset on disk."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.data.sources.datasets import TASKS, changed, libero_file
from wav.data.sources import open_source, staging
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.errors import DataError
from wav.ingest import ingest
from wav.shards import grouped, staging_folder

pytestmark = pytest.mark.simulator

DEMO = 12 * 2 * 32 * 32 * 3


@pytest.fixture
def small_jobs(monkeypatch):
    """One demonstration per job."""
    original = grouped
    monkeypatch.setattr("wav.data.sources.staging.grouped", lambda sizes: original(sizes, DEMO))


class StoppedError(Exception):
    pass


def stop_after(jobs):
    seen = []

    def callback(*numbers):
        seen.append(numbers)
        if len(seen) == jobs:
            raise StoppedError

    return callback


def contents(store: EpisodeStore) -> list[tuple]:
    return [
        (e.episode_id, e.actions.tobytes(), e.images["wrist"].tobytes()) for e in (store[i] for i in range(len(store)))
    ]


def test_grouped():
    assert [list(r) for r in grouped([3, 3, 3, 9, 1], 6)] == [[0, 1], [2], [3], [4]]
    assert list(grouped([], 6)) == []


def test_store_does_not_depend_on_the_number_of_processes(data, hdf5_settings, tmp_path, small_jobs):
    one = ingest(data, hdf5_settings, tmp_path / "one", workers=1)
    two = ingest(data, hdf5_settings, tmp_path / "two", workers=2)
    assert (one.digest, one.episodes, one.per_task) == (two.digest, 6, dict.fromkeys(sorted(TASKS), 3))
    assert [path.name for path in staging_folder(tmp_path / "two").iterdir()] == ["store.json"]
    EpisodeStore.open(tmp_path / "two").verify()


def test_jobs_of_a_dataset_run_where_a_mapper_takes_them(data, hdf5_settings, tmp_path, small_jobs):
    taken = []

    def elsewhere(function, jobs, processes):
        for number, job in reversed(list(enumerate(jobs))):
            taken.append(number)
            yield number, function(*job)

    here = ingest(data, hdf5_settings, tmp_path / "here", workers=1)
    there = ingest(data, hdf5_settings, tmp_path / "there", workers=1, run=elsewhere)
    assert len(taken) == 6
    assert there.digest == here.digest


def test_interrupted_ingest_continues(data, hdf5_settings, tmp_path, small_jobs, monkeypatch):
    whole = ingest(data, hdf5_settings, tmp_path / "whole", workers=1)
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        ingest(data, hdf5_settings, out, workers=1, callback=stop_after(4))
    assert not out.exists()
    assert len(list(staging_folder(out).iterdir())) == 4
    read = []
    original = staging.stage
    monkeypatch.setattr(staging, "stage", lambda *job: (read.append(job[2]), original(*job)))
    (staging_folder(out) / ".x.tmp-1").mkdir()
    numbers = []
    report = ingest(data, hdf5_settings, out, workers=1, callback=lambda *n: numbers.append(n))
    assert len(read) == 2
    assert report.digest == whole.digest
    assert numbers[-1] == (6, 6, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.staging", ".whole.staging", "libero", "out", "whole"]


def test_only_what_changed_is_read_again(data, libero, hdf5_settings, tmp_path, small_jobs, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        ingest(data, hdf5_settings, out, workers=1, callback=stop_after(6))
    folder = staging_folder(out)
    libero_file(libero / f"{TASKS[0]}_demo.hdf5", demos=2, steps=13)
    kept = next(path for path in folder.iterdir() if _task(path / "store") == TASKS[1])
    with open(next(kept.rglob("actions.npy")), "r+b") as file:
        file.truncate(40)
    read = []
    original = staging.stage
    monkeypatch.setattr(staging, "stage", lambda *job: (read.append(job[1][1]), original(*job)))
    report = ingest(data, hdf5_settings, out, workers=1)
    assert len(read) == 3  # two demonstrations of the changed file, one damaged stage
    assert report.per_task == {TASKS[0]: 2, TASKS[1]: 3}
    assert contents(EpisodeStore.open(out)) == contents(_fresh(data, hdf5_settings, tmp_path / "fresh"))


def test_a_dataset_that_grew_is_read_in_part(data, libero, hdf5_settings, tmp_path, small_jobs, monkeypatch):
    """What the store holds already is neither read nor written again, unless it is another store."""
    out, task = tmp_path / "out", "lift_more"
    ingest(data, hdf5_settings, out, workers=1)
    before = {path: path.stat().st_ino for path in out.glob("shard-*/*")}
    libero_file(libero / f"{task}_demo.hdf5", demos=2, steps=13)
    read = []
    original = staging.stage
    monkeypatch.setattr(staging, "stage", lambda *job: (read.append(job[1][1]), original(*job)))
    report = ingest(data, hdf5_settings, out, workers=1)
    assert (len(read), report.episodes) == (2, 8)
    inodes = {path.stat().st_ino for path in out.glob("shard-*/*")}
    assert inodes > set(before.values())
    assert report.digest == _fresh(data, hdf5_settings, tmp_path / "fresh").digest
    read.clear()
    with EpisodeStoreWriter(out, EpisodeStore.open(tmp_path / "fresh").conventions) as writer:
        writer.add(EpisodeStore.open(tmp_path / "fresh")[0])
    ingest(data, hdf5_settings, out, workers=1)
    assert len(read) == 8


def _task(store: Path) -> str:
    return EpisodeStore.open(store).episodes[0].task


def _fresh(data, settings, out) -> EpisodeStore:
    ingest(data, settings, out, workers=1)
    return EpisodeStore.open(out)


def test_other_settings_share_nothing(data, hdf5_settings):
    keys = [job.key for job in open_source(data, hdf5_settings).jobs()]
    other = [job.key for job in open_source(data, changed(hdf5_settings, drop_noops=True)).jobs()]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(other)


def test_process_that_dies_is_one_clear_error(data, hdf5_settings, tmp_path, small_jobs):
    class Bad(type(open_source(data, hdf5_settings))):
        def jobs(self):
            jobs = super().jobs()
            return [jobs[0], staging.Job(die, (), "bad.hdf5: demo_1", 1, 1, "0" * 64)]

    source = Bad(data, hdf5_settings)
    with pytest.raises(DataError, match=r"bad\.hdf5: demo_1: the process reading it died .*finished parts are kept"):
        ingest(data, hdf5_settings, tmp_path / "out", workers=2, source=source)


def die():
    import os

    os._exit(9)
    yield


def test_memory_does_not_grow_with_the_dataset(data, tmp_path, hdf5_settings, small_jobs):
    def peak(demos):
        folder = tmp_path / str(demos)
        folder.mkdir()
        libero_file(folder / "lift_it_demo.hdf5", demos=demos, steps=60)
        settings = hdf5_settings.model_copy(update={"path": str(folder)})
        tracemalloc.start()
        # JSON encoders leave small cycles behind, which Python collects at its leisure
        ingest(data, settings, tmp_path / f"out-{demos}", workers=1, callback=lambda *_: gc.collect() and None)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(2)
    few, many = peak(3), peak(12)
    assert many - few < 0.25 * 9 * 60 * 2 * 32 * 32 * 3, (few, many)


def test_stores_of_other_conventions_are_not_adopted(data, hdf5_settings, tmp_path):
    ingest(data, hdf5_settings, tmp_path / "one", workers=1)
    store = EpisodeStore.open(tmp_path / "one")
    changed = type(store.conventions)(**{**store.conventions.__dict__, "control_hz": 10})
    with (
        pytest.raises(DataError, match="its conventions differ"),
        EpisodeStoreWriter(tmp_path / "x", changed) as writer,
    ):
        writer.adopt(store)
    with EpisodeStoreWriter(tmp_path / "x", store.conventions) as writer:
        writer.add(store[5])
        writer.quarantine("a", "b", "c")
        with pytest.raises(DataError, match="in the store already"):
            writer.adopt(store)
        writer.quarantine("d", "e", "f")
    other = EpisodeStore.open(tmp_path / "x")
    assert [info.episode_id for info in other.episodes] == [store.episodes[5].episode_id]
    assert np.array_equal(other[0].state, store[5].state)
