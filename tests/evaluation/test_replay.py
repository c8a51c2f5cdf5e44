"""Replay of stored demonstrations, and the comparison of first frames: both must notice what they are for."""

import dataclasses
import json

import numpy as np
import pytest

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import Conventions
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.errors import ConfigError, DataError, SimulationError
from wav.evaluation import first_frames
from wav.evaluation.extras.replay import replay
from wav.evaluation.first_frames import check_first_frames, rendered_frames
from wav.evaluation.verdict import replay_verdict, report_path
from wav.sim.demonstrations import record_demonstration
from wav.sim.env import Observation
from wav.sim.replay import ReplayStart, replay_episode, state_errors
from wav.sim.workers import SimReply

pytestmark = pytest.mark.simulator

DATA = DataSettings(image_height=32, image_width=32, tasks=("lift_red_cube",))
INGEST = IngestSettings(detour=0.5, seed=3)


@pytest.fixture(scope="module")
def demonstrations():
    return [
        record_demonstration("tabletop", "lift_red_cube", index, DATA, INGEST.noise, INGEST.detour, INGEST.seed)
        for index in (1000, 1001)
    ]


def write(folder, episodes, **changes):
    conventions = dataclasses.replace(Conventions.for_simulator(DATA), **changes)
    with EpisodeStoreWriter(folder, conventions) as writer:
        for episode in episodes:
            writer.add(episode)
    return EpisodeStore.open(folder)


def test_replay_finds_a_wrong_gripper_and_evaluation_then_refuses(demonstrations, tmp_path, monkeypatch):
    good = write(tmp_path / "good", demonstrations)
    report = replay(good, DATA, INGEST, workers=1)
    assert (report.successes, report.episodes, report.passed) == (2, 2, True)
    assert report.worst["position_error"] < 1e-6
    assert report.worst["rotation_error"] < 1e-5
    assert json.loads(report_path(good.path).read_text())["digest"] == good.digest
    assert not list(good.path.glob("*replay*"))  # the store itself is another stage's output
    replay_verdict(good)

    def flipped(episode):
        return dataclasses.replace(episode, actions=(episode.actions * (1, 1, 1, 1, 1, 1, -1)).astype(np.float32))

    bad = write(tmp_path / "bad", [flipped(episode) for episode in demonstrations])
    replay_verdict(bad)  # not replayed yet
    report = replay(bad, DATA, INGEST, workers=1)
    assert not report.passed
    assert report.worst["gripper_error"] > 0.01
    assert "FAILED" in report.line
    with pytest.raises(ConfigError, match=r"only 0% .* WAV_ALLOW_FAILED_REPLAY=1"):
        replay_verdict(bad)
    monkeypatch.setenv("WAV_ALLOW_FAILED_REPLAY", "1")
    replay_verdict(bad)
    monkeypatch.delenv("WAV_ALLOW_FAILED_REPLAY")
    other = write(tmp_path / "bad", demonstrations)  # the verdict was on another content
    replay_verdict(other)


def test_the_last_action_is_executed_as_well(demonstrations):
    """Datasets end with the action that succeeds; only scripted demonstrations end with a hold after it."""
    episode = demonstrations[0]
    seed = episode.seed
    start = ReplayStart(episode.episode_id, episode.task, episode.init_index, seed, INGEST.detour, INGEST.seed)
    whole = replay_episode(DATA, start, episode.actions, episode.state)
    cut = replay_episode(DATA, start, episode.actions[:-1], episode.state[:-1])
    assert (whole.success, whole.steps) == (True, len(episode.actions))
    assert (cut.success, cut.steps) == (True, len(episode.actions) - 1)
    assert not replay_episode(DATA, start, episode.actions[:-2], episode.state[:-2]).success
    assert max(whole.position_error, cut.position_error) < 1e-6


def test_a_recovery_is_replayed_from_its_missed_grasp(tmp_path):
    episode = record_demonstration("tabletop", "lift_red_cube", 1012, DATA, 0.1, 0.5, INGEST.seed, "recover")
    report = replay(write(tmp_path / "recover", [episode]), DATA, INGEST, workers=1)
    assert (report.passed, report.episodes) == (True, 1)
    assert report.worst["position_error"] < 1e-6


def test_episodes_without_a_known_beginning_are_named(demonstrations, tmp_path):
    video = [dataclasses.replace(episode, source="lerobot:v3.0") for episode in demonstrations]
    with pytest.raises(DataError, match="no simulator state to start from"):
        replay(write(tmp_path / "a", video), DATA, INGEST, workers=1)
    with pytest.raises(DataError, match=r"another ingest\.seed than 4"):
        replay(write(tmp_path / "b", demonstrations), DATA, IngestSettings(seed=4), workers=1)


def test_a_few_replayed_demonstrations_are_no_verdict(demonstrations, tmp_path):
    names = [dataclasses.replace(demonstrations[1], episode_id=str(n), source="lerobot:v3.0") for n in range(2)]
    with pytest.raises(DataError, match="2 of 3 demonstrations could not be replayed, too many for a verdict"):
        replay(store := write(tmp_path / "a", [demonstrations[0], *names]), DATA, INGEST, workers=1)
    assert not report_path(store.path).exists()
    report = replay(write(tmp_path / "b", [demonstrations[0], names[0]]), DATA, INGEST, workers=1)
    assert (report.passed, report.episodes, len(report.not_replayed)) == (True, 1, 1)


def test_state_errors_see_through_the_antipode():
    one = np.zeros((2, 8), np.float32)
    two = one.copy()
    one[:, 3], two[:, 3] = np.pi - 0.01, -np.pi - 0.01  # the same rotation
    two[1, :3], two[1, 7] = (0.003, 0.004, 0), 0.02
    position, rotation, gripper = state_errors(one, two)
    np.testing.assert_allclose(position, [0, 0.005], atol=1e-7)
    np.testing.assert_allclose(rotation, 0, atol=1e-3)
    np.testing.assert_allclose(gripper, [0, 0.02], atol=1e-7)


class FakePool:
    """Answers a reset with one frame."""

    slots = 1

    def __init__(self, images):
        self.images = images

    def submit_reset(self, slot, task, index, record=False):
        assert (slot, index) == (0, 0)

    def wait(self):
        return [(0, SimReply(Observation(self.images, np.zeros(8, np.float32), "x"), False, 0, [], {}))]


def test_a_simulator_that_dies_at_the_first_frame_is_replaced():
    image = {"agentview": np.zeros((4, 4, 3), np.uint8)}

    class Dying(FakePool):
        def __init__(self, deaths):
            super().__init__(image)
            self.deaths = deaths

        def wait(self):
            self.deaths -= 1
            return super().wait() if self.deaths < 0 else [(0, SimReply(None, False, 0, [], {}, "it died; its log"))]

    assert rendered_frames(Dying(2), ["a"])["a"].keys() == image.keys()
    with pytest.raises(SimulationError, match=r"a, initial state 0: no first frame \(it died; its log\) in 3 tries"):
        rendered_frames(Dying(3), ["a"])


def test_rotated_and_swapped_pictures_are_refused(demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr(first_frames, "EPISODES", 2)
    first = {view: demonstrations[0].images[view][0] for view in DATA.views}
    pool = FakePool(first)
    as_recorded = write(tmp_path / "good", demonstrations)
    found = check_first_frames(pool, as_recorded, DATA, tmp_path)
    assert [view.view for view in found] == ["agentview", "wrist"]
    assert not (tmp_path / "first_frames.png").exists()

    def changed(change):
        return [dataclasses.replace(e, images=change(e.images)) for e in demonstrations]

    rotated = changed(lambda images: {v: np.ascontiguousarray(i[:, ::-1, ::-1]) for v, i in images.items()})
    with pytest.raises(ConfigError, match=r"'agentview'.*rotated by 180 degrees.*image_rotation"):
        check_first_frames(pool, write(tmp_path / "rotated", rotated), DATA, tmp_path)
    assert (tmp_path / "first_frames.png").stat().st_size > 0
    swapped = changed(lambda images: {"agentview": images["wrist"], "wrist": images["agentview"]})
    with pytest.raises(ConfigError, match=r"of camera 'wrist'"):
        check_first_frames(pool, write(tmp_path / "swapped", swapped), DATA, tmp_path)
    renamed = [dataclasses.replace(e, task="slug", instruction=f" {e.instruction.upper()}") for e in rotated]
    with pytest.raises(ConfigError, match="rotated by 180 degrees"):  # LeRobot knows tasks by their instruction
        check_first_frames(pool, write(tmp_path / "renamed", renamed), DATA, tmp_path)
    other = DATA.model_copy(update={"tasks": ("put_can_in_bin",)})
    assert check_first_frames(pool, as_recorded, other, tmp_path) == []
