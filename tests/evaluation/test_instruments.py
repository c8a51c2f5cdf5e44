"""Use of the noises: planted policies whose actions follow one noise alone are seen through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.tiny import policy as make_policy
from tests.evaluation.tiny import settings
from wav.config import LabelRewardsSettings
from wav.evaluation import instruments
from wav.evaluation.instruments import candidates, noise_use, ranking, realised_return
from wav.policy.policy import Policy
from wav.sim.env import Observation
from wav.sim.futures import Branch, Segment
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


def branch_of(history: list[Observation], step: int = 0) -> Branch:
    """A state whose episode ends as it began; nobody restores it here."""
    state: Any = None
    return Branch("lift_red_cube", 0, step, tuple(history), state, history[-1])


def test_candidates_are_the_planners_own(policy: Policy, histories: list[list[Observation]]) -> None:
    """The best candidate of an unsmoothed search of one iteration is what the planner acts on as the winner."""
    count = policy.planner.video_samples
    actions, scores = candidates(policy, branch_of(histories[0]), count)
    assert actions.shape == (count, policy.data.action_chunk, 7)
    assert scores.shape == (count, policy.planner.value_samples)
    assert len(np.unique(scores)) == scores.size
    again, _ = candidates(policy, branch_of(histories[0]), count)
    np.testing.assert_array_equal(actions, again)
    assert not np.array_equal(actions[0], actions[1])


@pytest.mark.parametrize("sign", [1, -1])
def test_ranking_tells_a_score_that_is_right_from_one_that_is_wrong(
    policy: Policy, histories: list[list[Observation]], monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    """Candidate m's chunk moves the pictures away from the goal by m; the score says so, or the opposite."""
    branches = [branch_of(history, step) for step, history in enumerate(histories)]
    M = 6

    def planted(policy: Policy, branch: Branch, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        actions = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None], (count, 4, 7)) / 100
        return actions.copy(), -sign * np.arange(count, dtype=float)[:, None].repeat(2, 1)

    def executed(jobs: list[tuple[Branch, np.ndarray]]) -> list[list[Segment]]:
        return [[moved(branch, chunk) for chunk in chunks] for branch, chunks in jobs]

    def moved(branch: Branch, chunk: np.ndarray) -> Segment:
        now, by = branch.seen[-1], round(100 * float(chunk[0, 0]))
        images = {
            view: np.clip(image.astype(int) + 10 * by, 0, 255).astype(np.uint8) for view, image in now.images.items()
        }
        seen = (now, *(Observation(images, now.state, now.instruction) for _ in chunk))
        return Segment(seen, False)

    monkeypatch.setattr(instruments, "candidates", planted)
    found = ranking(policy, branches, executed, LabelRewardsSettings(), M)
    assert found["states"] == 3
    assert found["spearman"] == pytest.approx(sign)
    assert (found["regret"] == 0) == (sign == 1)
    assert found["beats_median"] == (1.0 if sign == 1 else 0.0)
    assert [(row["M"], row["N"]) for row in found["searches"]] == [(2, 1), (4, 1)]
    assert all((row["gain"] > 0) == (sign == 1) for row in found["searches"])
    assert found["searches"][0]["false_choices"] == (0.0 if sign == 1 else 1.0)


def test_a_chunk_that_stays_at_the_goal_returns_the_most(policy: Policy, histories: list[list[Observation]]) -> None:
    branch, settings = branch_of(histories[0]), LabelRewardsSettings(gamma=0.5)
    still = np.zeros((3, 7), np.float32)
    stayed = Segment((branch.final,) * 4, True)
    value = realised_return(branch, stayed, still, settings, policy.data.views)
    assert value == pytest.approx(5 / 9 * (1 + 0.5 + 0.25))  # four similarities and proximity are 1, nothing moves
