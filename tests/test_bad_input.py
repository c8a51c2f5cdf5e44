"""Five mistakes a user makes with models: each is one clear error, a sentence with field, value and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.stage_folders import DATA, PLANNER, make_stages
from tests.model.conftest import small
from wav.config import parse_settings
from wav.data.statistics import Statistics, compute_statistics
from wav.errors import CheckpointError, ConfigError, WavError
from wav.model.loading import init_from, load_model
from wav.policy.export import policy_from_stages

THREE = {"views": ["top", "left_wrist", "right_wrist"]}


def message_of(call: Callable[[], Any], kind: type[WavError]) -> str:
    """The error's text: one line that ends with what to do."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert ";" in text, "no remedy"
    return text


@pytest.mark.parametrize(
    ("sections", "words", "remedy"),
    [
        (
            {"data": THREE, "model": {"max_views": 2}},
            ("data.views", "3 views", "model.max_views = 2", "raise"),
            {"model": {"max_views": 3}},
        ),
        (
            {"data": {"future_frames": 7}},
            ("data.future_frames = 7", "1 + k * encode.temporal (4)", "try 9"),
            {"data": {"future_frames": 9}},
        ),
        (
            {"data": {"image_height": 72}},
            ("data.image_height = 72", "multiple of encode.patch = 16"),
            {"data": {"image_height": 80}},
        ),
        (
            {"data": {"image_height": 240, "future_frames": 9}, "encode": {"codec": "ltx", "patch": 32, "temporal": 8}},
            ("data.image_height = 240", "multiple of encode.patch = 32"),
            {"data": {"image_height": 256}},
        ),
        (
            {"eval_libero": {"execute_steps": 20}},
            ("execute_steps = 20", "data.action_chunk = 15"),
            {"eval_libero": {"execute_steps": 15}},
        ),
        (
            {"planner": {"video_samples": 3}},
            ("video_elites = 4", "video_samples = 3", "lower video_elites"),
            {"planner": {"video_elites": 3}},
        ),
        (
            {"planner": {"value_elites": 33}},
            ("value_elites = 33", "video_samples * value_samples = 32", "raise"),
            {"planner": {"value_samples": 5}},
        ),
        (
            {"data": {"suites": ["libero_goal", "libero_10"], "tasks": []}, "ingest": {"source": "aloha_hdf5"}},
            ("aloha_hdf5 does not tell which suite", "set ingest.source to one of scripted, libero_hdf5, lerobot"),
            {"ingest": {"source": "lerobot"}},
        ),
    ],
)
def test_parameters_that_do_not_fit(
    sections: dict[str, Any], words: tuple[str, ...], remedy: dict[str, dict[str, Any]]
) -> None:
    """What the sentence advises is taken."""
    with pytest.raises(ConfigError) as caught:
        parse_settings(sections, "params.yaml")
    text = str(caught.value)
    assert text.startswith("params.yaml: ")
    assert "\n" not in text
    assert all(word in text for word in words), text
    parse_settings({name: {**sections.get(name, {}), **remedy.get(name, {})} for name in {*sections, *remedy}}, "")


def test_more_views_than_the_model_embeds() -> None:
    model = small(max_views=2)
    latents = torch.zeros(1, 3, 6, 2, 2, 2)
    text = message_of(lambda: model.video(latents, torch.zeros(1), torch.zeros(1, 2, 7)), ConfigError)
    assert "views = 3: the model embeds 2" in text


def test_a_checkpoint_of_another_size(tmp_path: Path) -> None:
    small(layers=3).save_pretrained(tmp_path)
    assert "num_layers = 3, this model has 4" in message_of(lambda: init_from(small(), tmp_path), CheckpointError)
    (tmp_path / "config.json").unlink()
    text = message_of(lambda: init_from(small(), tmp_path), CheckpointError)
    assert "missing (action_blocks.3." in text
    small(head_dim=16).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    text = message_of(lambda: init_from(small(), tmp_path), CheckpointError)
    assert "of another shape" in text
    assert "for (" in text
    small(head_dim=16).save_config(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"num_layers": 4', '"num_layers": 3')
    )
    assert "unexpected" in message_of(lambda: load_model(tmp_path), CheckpointError)


def test_statistics_of_another_dataset(tmp_path: Path) -> None:
    stages = make_stages(tmp_path)
    generator = torch.Generator().manual_seed(1)
    rows = {name: torch.randn(50, size, generator=generator).numpy() for name, size in (("action", 7), ("state", 8))}
    other = Statistics({name: compute_statistics(x, "quantile", name) for name, x in rows.items()})

    other.save(stages.joint / "episodes_statistics.json")

    def load() -> Any:
        return policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, device="cpu")

    assert other.digest[:12] in message_of(load, CheckpointError)
