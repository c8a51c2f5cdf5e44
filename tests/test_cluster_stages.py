"""Stages whose work runs on a local Dask cluster make what they make in one process, to the byte."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation import tiny
from tests.evaluation.test_determinism import records
from wav.cluster import Cluster, open_cluster
from wav.config import DataSettings, EncodeSettings, IngestSettings, LabelRewardsSettings
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.store import EpisodeStore
from wav.evaluation.shares import Elsewhere
from wav.ingest import ingest
from wav.rewards.label import label_store

pytestmark = [pytest.mark.long, pytest.mark.simulator]
DATA = DataSettings(image_height=32, image_width=32, tasks=("lift_red_cube", "lift_green_cube"))
ENCODE = EncodeSettings(patch=8, channels=12, text_dim=16)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("distributed", reason="distributed is not installed")
    with open_cluster("local", workers=2) as opened:
        yield opened


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_demonstrations_labels_and_latents(cluster: Cluster, tmp_path: Path) -> None:
    settings = IngestSettings(episodes_per_task=1)
    here = ingest(DATA, settings, tmp_path / "episodes", workers=1)
    there = ingest(DATA, settings, tmp_path / "there", run=cluster.mapper(in_child=True))
    assert here.digest == there.digest
    store = EpisodeStore.open(tmp_path / "episodes")
    parts = fit_codec(store, DATA, ENCODE), build_text_encoder(ENCODE, DATA, store.instructions, tmp_path / "text")
    for name, run in (("here", None), ("elsewhere", cluster.mapper())):
        label_store(store, LabelRewardsSettings(), DATA.action_chunk, tmp_path / name / "rewards", run=run)
        encode_store(store, *parts, DATA, tmp_path / name / "latents", run=run)
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "here")


def test_episodes_of_an_evaluation(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wav.evaluation.shares.SHARE_BATCHES", 2)
    elsewhere = Elsewhere(cluster.mapper(), functools.partial(tiny.policy, "tabletop"))
    with tiny.open_pool("tabletop", 2, 3) as pool:
        tiny.run("tabletop", tmp_path / "here", pool)
        metrics = tiny.run("tabletop", tmp_path / "there", pool, elsewhere=elsewhere)
    assert records(tmp_path / "there") == records(tmp_path / "here")
    assert metrics["timing"]["episodes_run"] == len(records(tmp_path / "here"))
