"""Use of the noises: planted policies whose actions follow one noise alone are seen through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.tiny import policy as make_policy
from tests.evaluation.tiny import settings
from wav.evaluation.instruments import noise_use
from wav.policy.policy import Policy
from wav.sim.env import Observation
from wav.sim.registry import select_tasks


@pytest.fixture
def policy() -> Policy:
    return make_policy("tabletop")


@pytest.fixture
def histories(policy: Policy) -> list[list[Observation]]:
    """Three states: one seen for the first time, two after further calls."""
    data, rng = settings("tabletop").data, np.random.default_rng(0)
    size = (data.image_height, data.image_width, 3)
    text = select_tasks("tabletop", data.tasks)[0].instruction

    def seen() -> Observation:
        images = {view: rng.integers(0, 256, size, np.uint8) for view in data.views}
        return Observation(images, rng.normal(size=data.state_dim).astype(np.float32), text)

    return [[seen() for _ in range(count)] for count in (1, 2, 5)]


@pytest.mark.parametrize(
    ("follows", "planted"),
    [
        (
            "value",
            lambda context, features, value, noise, steps, level=1.0: noise * 0 + value.sum((1, 2))[:, None, None],
        ),
        ("action", lambda context, features, value, noise, steps, level=1.0: noise),
    ],
)
def test_a_policy_that_follows_one_noise_is_seen_through(
    policy: Policy,
    histories: list[list[Observation]],
    monkeypatch: pytest.MonkeyPatch,
    follows: str,
    planted: Callable[..., Any],
) -> None:
    monkeypatch.setattr(policy.model, "denoise_action", planted)
    shares = noise_use(policy, histories, draws=3)["action"]
    assert shares.pop(follows) == pytest.approx(1, abs=0.35)  # three draws each of other numbers
    assert set(shares.values()) == {0.0}


def test_the_return_does_not_follow_the_actions_noise(policy: Policy, histories: list[list[Observation]]) -> None:
    found = noise_use(policy, histories, draws=3)
    assert set(found) == {"action", "return"}
    assert found["return"]["action"] == 0.0
    assert found["return"]["value"] > 0


def test_looking_changes_no_row_and_a_history_is_what_acting_saw(
    policy: Policy, histories: list[list[Observation]]
) -> None:
    """The handle of a history equals that of a row that was acted on at every call."""
    policy.reset("row", "episode", 0)
    kept: list[Any] = []
    begin = policy.model.begin

    def keep(*parts: torch.Tensor) -> Any:
        kept.append([part.clone() for part in parts])
        return begin(*parts)

    policy.model.begin = keep  # type: ignore[method-assign]
    for observation in histories[2]:
        policy.act([observation], ["row"], variant="unplanned")
    policy.context([histories[2]])
    for acted, looked in zip(kept[-2], kept[-1], strict=True):
        torch.testing.assert_close(acted[:1], looked)
