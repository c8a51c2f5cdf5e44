"""Section ``coupling``: what value and action samples are shown of the truth, at which levels, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.training.micro import SIZE, inputs_of, objective_of, random_batch, small_model
from wav.config import CouplingSettings
from wav.flow_matching import mix
from wav.training.draws import SeededRandom, coupled_levels

BOTH = CouplingSettings(
    mode="both", future_levels=(0.4, 0.6), value_levels=(0.05, 0.2), pure_noise=0.0, video_schedule=(1.0, 0.5)
)


def test_levels_lie_in_their_range_but_for_the_share_of_pure_noise() -> None:
    levels = coupled_levels(4000, (0.35, 0.65), 0.15, SeededRandom(0, 0), "future_level")
    pure = levels == 1
    assert 0.12 < pure.float().mean() < 0.18
    assert levels[~pure].min() >= 0.35
    assert levels[~pure].max() <= 0.65
    assert levels[~pure].std() > 0.07


def test_none_draws_what_it_drew_before_there_was_coupling() -> None:
    batch = random_batch()
    none, both = (inputs_of(batch, "train_joint", coupling=c).draws for c in (CouplingSettings(), BOTH))
    for name in vars(none):
        if name not in ("video_level", "condition_level"):
            assert torch.equal(getattr(none, name), getattr(both, name)), name
    assert (none.condition_level == 1).all()


@pytest.mark.parametrize(("mode", "future", "value"), [("future", 1, 0), ("value", 0, 1), ("both", 1, 1)])
def test_each_mode_couples_what_its_name_says(mode: str, future: int, value: int) -> None:
    inputs = inputs_of(random_batch(), "train_joint", coupling=BOTH.model_copy(update={"mode": mode}))
    seen = inputs.draws.video_level[: SIZE - inputs.roles.video]
    assert (seen < 1).all() if future else (seen == 1).all()
    read = inputs.draws.condition_level
    assert (read < 1).all() if value else (read == 1).all()
    assert (inputs_of(random_batch(), "train_value", coupling=BOTH).draws.video_level < 1).all()


def test_the_action_sees_the_true_future_and_the_true_values() -> None:
    """Changing either changes the action loss when coupled, and does not as the paper trains."""
    batch = random_batch()
    other = replace(batch, future=batch.future.flip(0), values=batch.values.flip(0))
    model = objective_of("train_joint", small_model()).model
    for coupling, moves in ((CouplingSettings(), False), (BOTH, True)):
        objective = objective_of("train_joint", model, coupling, action_probability=1.0)
        inputs = inputs_of(batch, "train_joint", coupling=coupling, action_probability=1.0)
        with torch.no_grad():
            one, two = (objective(replace(inputs, batch=b))[1]["loss_action"] for b in (batch, other))
        assert (one != two) == moves


def test_the_video_expert_is_given_the_noised_future_at_its_timestep() -> None:
    batch = random_batch()
    objective = objective_of("train_value", small_model(), BOTH)
    inputs = inputs_of(batch, "train_value", coupling=BOTH)
    latents, timestep = objective.noised_video(inputs)
    frames = objective.memory_frames
    wanted = mix(batch.future, inputs.draws.video_noise, inputs.draws.video_level)
    torch.testing.assert_close(latents[:, :, :, frames:], wanted)
    torch.testing.assert_close(timestep[:, -1], inputs.draws.video_level * 1000)
    assert (timestep[:, :frames] == 0).all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"video_schedule": (1.0, 0.5)}, "mode = none"),
        ({"mode": "both", "video_schedule": (1.0, 0.9)}, "features are read at 0.9"),
        ({"mode": "both", "video_schedule": (1.0, 0.4, 0.5)}, "must begin at 1.0 and fall"),
        ({"mode": "both", "video_schedule": (0.5,)}, "must begin at 1.0 and fall"),
        ({"mode": "both", "future_levels": (0.6, 0.4)}, "the lower level comes first"),
        ({"mode": "value", "value_level": 0.5}, "value_level = 0.5"),
        ({"mode": "future", "pure_noise": 0.0}, "never shows features of pure noise"),
        ({"mode": "value", "pure_noise": 1.0}, "nothing of mode = value"),
    ],
)
def test_a_schedule_that_training_does_not_show_is_refused(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CouplingSettings(**fields)
