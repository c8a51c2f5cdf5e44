"""Expert episodes from the simulator: returns rise toward success, and the stage's plots show it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from flows import label_rewards
from tests.evaluation.fakes import settings
from wav.config import DataSettings, Settings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.evaluation.report import build_report
from wav.plots import spearman
from wav.rewards.label import label_store, value_channels
from wav.rewards.terms import episode_rewards
from wav.sim.demonstrations import record_demonstration

pytestmark = pytest.mark.simulator

DATA = DataSettings(image_height=32, image_width=32)
SETTINGS = Settings(data=DATA)


@pytest.fixture(scope="module")
def demonstrations() -> list[Episode]:
    """One clean and one noisy demonstration with a detour."""
    return [
        record_demonstration("tabletop", "lift_red_cube", 1000, DATA, noise=0.0, detour=0.0, seed=0),
        record_demonstration("tabletop", "lift_green_cube", 1001, DATA, noise=0.15, detour=1.0, seed=0),
    ]


def test_returns_rise_on_expert_episodes(demonstrations: list[Episode]) -> None:
    for episode in demonstrations:
        assert episode.success
        terms = episode_rewards(episode, SETTINGS.label_rewards)
        values = value_channels(terms, SETTINGS.label_rewards, DATA.action_chunk)[:, -1]
        assert spearman(values) > 0.5, episode.task
        third = len(values) // 3
        assert values[-third:].mean() > values[:third].mean()


@pytest.fixture
def workspace(tmp_path: Path, demonstrations: list[Episode]) -> Iterator[Path]:
    with EpisodeStoreWriter(tmp_path / "data/episodes", Conventions.for_simulator(DATA)) as writer:
        for episode in demonstrations:
            writer.add(episode)
    episodes = EpisodeStore.open(tmp_path / "data/episodes")
    label_store(episodes, SETTINGS.label_rewards, DATA.action_chunk, tmp_path / "data/rewards")
    return tmp_path


def test_the_stage_plots_returns_over_time(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: dict[str, bytes] = {}
    monkeypatch.setattr(label_rewards, "publish_images", lambda key, images, title: published.update(images))
    monkeypatch.setattr(label_rewards, "publish_numbers", lambda *arguments: None)
    run = SimpleNamespace(settings=SETTINGS.for_stage("label_rewards"), path=workspace.joinpath)
    label_rewards.plot.fn(run)
    folder = workspace / "reports/label_rewards/pictures"
    names = {"returns", "terms-lift_red_cube", "terms-lift_green_cube"}
    assert {path.stem for path in folder.glob("*.png")} == set(published) == names
    picture = plt.imread(folder / "returns.png")
    assert np.asarray(picture).std() > 0.01
    page = build_report(workspace, settings()).read_text()
    assert page.count("data:image/png;base64") == 3
    assert "returns" in page
