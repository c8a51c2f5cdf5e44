"""ingest with a recorder that needs no simulator."""

import json

import numpy as np
import pytest

from wav.config import DataSettings, IngestSettings
from wav.data.episode import Episode
from wav.data.sources import open_source
from wav.data.sources.scripted import ScriptedSource
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError, SimulationError
from wav.ingest import ingest
from wav.shards import in_order

DATA = DataSettings(image_height=16, image_width=16, tasks=("lift_red_cube", "lift_green_cube"))
SETTINGS = IngestSettings(episodes_per_task=4, noise=0.1, detour=0.25, seed=3)


def record(suite, task, init_index, data, noise, detour, seed, style) -> Episode:
    """An episode that is a pure function of the arguments; indices select misfortunes."""
    assert (suite, noise, detour, seed) == ("tabletop", 0.1, 0.25, 3)
    rng = np.random.default_rng([init_index, len(task)])
    length = 3 if init_index == 1001 else 10
    return Episode(
        episode_id=f"{suite}/{task}/{init_index}",
        task=task,
        instruction=task,
        images={v: rng.integers(0, 255, (length, 16, 16, 3), np.uint8) for v in data.views},
        state=rng.normal(size=(length, 8)).astype(np.float32),
        joints=None,
        actions=rng.normal(size=(length, 7)).astype(np.float32),
        expert_actions=None,
        success=init_index != 1002,
        init_index=init_index,
        seed=seed,
        source="fake",
        style=style,
    )


def shuffled(order_seed):
    """A mapper that finishes jobs in a random order and hands errors back."""

    def run(function, jobs, workers):
        for index in np.random.default_rng(order_seed).permutation(len(jobs)):
            try:
                yield int(index), function(*jobs[index])
            except Exception as error:
                yield int(index), error

    return run


def run_ingest(out, settings=SETTINGS, recorder=record, order=0, callback=None):
    source = ScriptedSource(DATA, settings, recorder, shuffled(order))
    return ingest(DATA, settings, out, workers=2, callback=callback, source=source)


def test_rejected_demonstrations_are_reported_and_replaced(tmp_path):
    calls = []
    report = run_ingest(tmp_path / "e", callback=lambda *a: calls.append(a))
    store = EpisodeStore.open(tmp_path / "e")
    assert [(i.task, i.init_index) for i in store.episodes] == [
        *[("lift_red_cube", i) for i in (1000, 1003)],
        *[("lift_green_cube", i) for i in (1000, 1003)],
        *[("lift_red_cube", i) for i in (1004, 1005)],
        *[("lift_green_cube", i) for i in (1004, 1005)],
    ]
    assert report.per_task == {"lift_red_cube": 4, "lift_green_cube": 4}
    assert (report.episodes, report.rejected, report.frames, report.digest) == (8, 4, 80, store.digest)
    quarantine = json.loads((tmp_path / "e" / "quarantine.json").read_text())
    assert [row["episode"][-4:] for row in quarantine] == ["1001", "1002"] * 2
    assert "fewer than ingest.min_length = 8" in quarantine[0]["reason"]
    assert "did not reach the task's goal" in quarantine[1]["reason"]
    assert calls[0] == (1, 8, 1)
    assert calls[-1] == (12, 12, 8)
    assert store.conventions.suite == "tabletop"
    assert store.conventions.views == DATA.views


def test_store_does_not_depend_on_the_order_of_completion(tmp_path):
    digests = {run_ingest(tmp_path / str(order), order=order).digest for order in range(3)}
    assert len(digests) == 1
    other = run_ingest(tmp_path / "other", SETTINGS.model_copy(update={"first_index": 2000})).digest
    assert other not in digests


def failing(message, error=DataError, indices=range(1002, 10_000)):
    def recorder(suite, task, init_index, *rest):
        if init_index in indices:
            raise error(message)
        return record(suite, task, init_index, *rest)

    return recorder


def test_too_few_successes_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"'lift_red_cube' gave 1 of 4 episodes in 8 tries .*: no grasp.*ingest\.noise"):
        run_ingest(tmp_path / "e", recorder=failing("no grasp"))
    assert list(tmp_path.iterdir()) == []
    fewer = SETTINGS.model_copy(update={"episodes_per_task": 1})  # as the error advises
    assert run_ingest(tmp_path / "e", fewer, recorder=failing("no grasp")).rejected == 0


def test_single_simulator_failure_is_a_rejection(tmp_path):
    report = run_ingest(tmp_path / "e", recorder=failing("stalled", SimulationError, [1003]))
    assert report.rejected == 6
    assert any("SimulationError: stalled" in r.reason for r in EpisodeStore.open(tmp_path / "e").rejected)


def test_no_working_simulator_stops_at_once(tmp_path):
    with pytest.raises(SimulationError, match="no renderer"):
        run_ingest(tmp_path / "e", recorder=failing("no renderer", SimulationError, range(10_000)))
    with pytest.raises(ZeroDivisionError):
        run_ingest(tmp_path / "e", recorder=failing("a bug", ZeroDivisionError, [1003]))
    assert list(tmp_path.iterdir()) == []


def test_order_is_restored_and_loss_is_noticed():
    results = [(2, "c"), (0, "a"), (1, "b")]
    assert list(in_order(results, 3)) == [(0, "a"), (1, "b"), (2, "c")]
    with pytest.raises(SimulationError, match="1 of 4 never came back"):
        list(in_order(results, 4))


def test_sources_by_name():
    assert isinstance(open_source(DATA, SETTINGS), ScriptedSource)
    with pytest.raises(ValueError, match=r"source = 'rlds': unknown; use one of scripted, libero_hdf5, lerobot"):
        IngestSettings(source="rlds")
    for source in ("lerobot", "libero_hdf5"):
        with pytest.raises(ConfigError, match=r"ingest\.path = '': no such"):
            open_source(DATA, SETTINGS.model_copy(update={"source": source}))
    with pytest.raises(ConfigError, match="did you mean 'lift_red_cube'"):
        open_source(DATA.model_copy(update={"tasks": ("lift_red_cub",)}), SETTINGS)


def test_demonstrations_recorded_elsewhere_are_the_same_and_recorded_once(tmp_path, monkeypatch):
    def elsewhere(limit, ran):
        def run(function, jobs, workers):
            for number, outcome in enumerate(shuffled(0)(function, jobs, workers)):
                if number == limit:
                    raise KeyboardInterrupt
                ran.append(outcome)
                yield outcome

        return run

    here, out = run_ingest(tmp_path / "here"), tmp_path / "there"
    first, second = [], []
    source = ScriptedSource(DATA, SETTINGS, record)
    with pytest.raises(KeyboardInterrupt):
        ingest(DATA, SETTINGS, out, source=source, run=elsewhere(5, first))
    assert ingest(DATA, SETTINGS, out, source=source, run=elsewhere(99, second)).digest == here.digest
    assert len(first) == 5
    assert len(second) == 12 - 6  # of twelve tries; the sixth was recorded and not taken any more
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there"}
