"""The report: self-contained, honest about what is missing, and right about what is there."""

import base64
import html.parser
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from tests.evaluation.fakes import DATA, FakePolicy, FakePool, settings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.errors import DataError
from wav.evaluation.evaluate import evaluate
from wav.evaluation.held_out import held_out_values
from wav.evaluation.pictures import write_png
from wav.evaluation.report import build_report
from wav.evaluation.tables import metrics_table
from wav.io.files import write_json


class Sources(html.parser.HTMLParser):
    """Every address the page would load, every tag that is left open, and the visible text."""

    def __init__(self):
        super().__init__()
        self.sources, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    page = Sources()
    page.feed(path.read_text())
    assert page.open == []
    return page, " ".join(" ".join(page.text).split())


def store(path, episodes=6, length=20):
    with EpisodeStoreWriter(path, Conventions.for_simulator(DATA)) as writer:
        for i in range(episodes):
            task = DATA.tasks[i % 2]
            level = np.linspace(10, 240, length).astype(np.uint8)
            images = {view: np.tile(level[:, None, None, None], (1, 16, 16, 3)) for view in DATA.views}
            state = np.zeros((length, 8), np.float32)
            state[:, 0] = np.linspace(0, 1, length)
            actions = np.zeros((length, 7), np.float32)
            writer.add(
                Episode(
                    f"e{i}", task, task.replace("_", " "), images, state, None, actions, None, True, 1000 + i, 0, "t"
                )
            )
    return EpisodeStore.open(path)


LIMITS = {"lift_red_cube": 12, "lift_green_cube": 8}


class Rewards:
    def episode(self, index):
        return np.stack([np.zeros(20), np.arange(20) / 10], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    out = folder / "reports" / "eval"
    evaluate(settings(), FakePolicy(), out, pool=FakePool(3), checkpoint="abcdef0123456789", limits=LIMITS)
    held_out_values(FakePolicy(), store(folder / "episodes"), Rewards(), settings(), out)
    metrics = folder / "models" / "joint" / "plots" / "metrics"
    (metrics / "validation").mkdir(parents=True)
    lines = "".join(f"{step}\t{1 / (step + 1)}\n" for step in range(100))
    (metrics / "loss.tsv").write_text("step\tloss\n" + lines)
    (metrics / "validation" / "loss.tsv").write_text("timestamp\tstep\tvalidation/loss\n1\t0\t2.0\n2\t50\t1.5\n")
    write_json(folder / "models" / "joint" / "metrics.json", {"steps": 100, "loss": 0.0123456, "stage": "train_joint"})
    write_png(folder / "reports" / "label_rewards" / "pictures" / "terms.png", np.zeros((4, 4, 3), np.uint8))
    facts = {"stage": "ingest", "seconds": 125.4, "peak_memory_gib": 1.25}
    (folder / "reports" / "stages").mkdir()
    write_json(folder / "reports" / "stages" / "ingest.json", facts)
    return folder


def test_page_is_self_contained_and_complete(workspace):
    path = build_report(workspace, settings())
    assert path == workspace / "reports" / "index.html"
    page, text = parse(path)
    assert all(s.startswith(("data:", "#")) for s in page.sources)
    assert not re.search(r"https?://", path.read_text())
    kinds = {s.split(";")[0] for s in page.sources if s.startswith("data:")}
    assert kinds == {"data:video/mp4", "data:image/png", "data:image/svg+xml"}
    for source in page.sources:
        if source.startswith("data:image/svg+xml;base64,"):
            xml.etree.ElementTree.fromstring(base64.b64decode(source.split(",")[1]))
    metrics = json.loads((workspace / "reports" / "eval" / "metrics.json").read_text())
    rate = metrics["planned"]
    assert (
        f"{100 * rate['success_rate']:.0f}% of 6 [{100 * rate['wilson_low']:.0f}, {100 * rate['wilson_high']:.0f}]"
        in text
    )
    assert "all, within 8 to 12 steps" in text
    assert "within 8 to 12 steps planned \N{MINUS SIGN} unplanned" in text
    assert "2 min 5 s" in text
    assert "1.25 GiB" in text
    assert "0.01235" in text
    assert "held-out" in text
    assert text.count("tabletop") > 10
    assert "which is not LIBERO" in text


def test_page_names_what_is_missing(workspace):
    text = parse(build_report(workspace, settings()))[1]
    assert "Not produced: codec pictures: stage encode left none" in text
    assert "Not produced: training curves of pretrain_video" in text
    assert "training curves of train_joint" not in text


def test_empty_workspace_gives_a_page_that_says_so(tmp_path):
    text = parse(build_report(tmp_path, settings()))[1]
    assert "World-Value-Action on tabletop" in text
    for part in ("closed-loop results", "value along a held-out episode", "timings", "training curves of train_value"):
        assert f"Not produced: {part}" in text
    assert [p.name for p in (tmp_path / "reports").iterdir()] == ["index.html"]


def test_equal_data_gives_an_equal_page(workspace):
    first = build_report(workspace, settings()).read_text()
    assert build_report(workspace, settings()).read_text() == first


def test_what_instruments_found_is_told_without_any_episode_too(tmp_path):
    use = {"action": {"video": 0.4, "value": 0.45, "action": 0.3}}
    metrics = {"suite": "real", "not_applicable": {"planned": "it has no simulator"}, "use": use}
    (tmp_path / "reports" / "eval").mkdir(parents=True)
    write_json(tmp_path / "reports" / "eval" / "metrics.json", metrics)
    for text in (parse(build_report(tmp_path))[1], metrics_table(metrics)):
        assert "it has no simulator" in text
        assert "40% by the video noise, 45% by the value noise, 30% by the action noise" in text


def test_text_from_data_cannot_become_markup(workspace, tmp_path):
    metrics = json.loads((workspace / "reports" / "eval" / "metrics.json").read_text())
    metrics["suite"] = "<script>alert(1)</script>"
    (tmp_path / "reports" / "eval").mkdir(parents=True)
    write_json(tmp_path / "reports" / "eval" / "metrics.json", metrics)
    assert "<script>" not in build_report(tmp_path).read_text()


def test_held_out_values_align_with_the_episode(tmp_path):
    policy = FakePolicy()
    found = held_out_values(policy, store(tmp_path / "episodes"), Rewards(), settings(), tmp_path / "eval", index=2)
    assert found["steps"] == [0, 4, 8, 12, 16]
    assert found["real_value"] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])
    assert found["predicted_value"] == [1.0] * 5
    assert found["task"] == DATA.tasks[0]
    level = np.linspace(10, 240, 20).astype(np.uint8).astype(float)
    mse = np.mean((level[1:6] - 100) ** 2)
    assert found["psnr"][0] == pytest.approx(10 * np.log10(255**2 / mse))
    copied = np.mean((level[1:6] - level[0]) ** 2)
    assert found["psnr_copy"][0] == pytest.approx(10 * np.log10(255**2 / copied))
    assert found["psnr_copy"][-1] > found["psnr_copy"][0]  # frames past the end repeat the last
    assert [c for c, _, _ in policy.calls] == ["unplanned"] * 5
    assert len(list((tmp_path / "eval" / "predictions").glob("tabletop-held-out-lift_red_cube-step*.png"))) == 3
    assert (tmp_path / "eval" / "predictions" / "tabletop-held-out-lift_red_cube-imagined.png").exists()
    with pytest.raises(DataError, match=r"holds episodes 0\.\.5"):
        held_out_values(policy, EpisodeStore.open(tmp_path / "episodes"), None, settings(), tmp_path / "eval", index=6)


def test_held_out_episode_is_never_a_training_one(tmp_path):
    from wav.data.windows import split_episodes
    from wav.evaluation.held_out import held_out_index

    episodes = store(tmp_path / "episodes", episodes=10)
    index = held_out_index(episodes)
    for share in (0.05, 0.1, 0.3):
        assert index in split_episodes(episodes, "validation", share)
        assert index not in split_episodes(episodes, "train", share)
