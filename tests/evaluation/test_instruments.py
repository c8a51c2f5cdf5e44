"""Instruments: planted policies, scores and data are seen through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.tiny import policy as make_policy
from tests.evaluation.tiny import settings
from wav.config import LabelRewardsSettings
from wav.data.table import EpisodeInfo, EpisodeTable, TableWriter
from wav.data.windows import WindowBatch, split_episodes
from wav.evaluation.held_out import held_out_share
from wav.evaluation.instruments import ranking as ranks
from wav.evaluation.instruments.executed import realised_return
from wav.evaluation.instruments.futures import direct_ahead, futures_apart
from wav.evaluation.instruments.oracle import oracle
from wav.evaluation.instruments.ranking import Candidates, candidates, ranking, searches
from wav.evaluation.instruments.swap import swaps
from wav.evaluation.instruments.use import noise_use
from wav.evaluation.tables import findings
from wav.planning.types import Levels
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
    """They are those of a search of one iteration, and the same however many are decoded at once."""
    branch, count = branch_of(histories[2]), policy.planner.video_samples
    found = candidates(policy, branch, count)
    assert found.actions.shape == (count, policy.data.action_chunk, 7)
    assert found.values.shape[:3] == (1, count, policy.planner.value_samples)
    scores = ranks.scores(policy, [found], policy.planner.value_samples)
    assert len(np.unique(scores)) == count
    assert not np.array_equal(ranks.scores(policy, [found], 1), scores)
    policy.batch_size = 1
    np.testing.assert_allclose(candidates(policy, branch, count).actions, found.actions, atol=1e-5)
    assert not np.array_equal(found.actions[0], found.actions[1])
    policy.planner = policy.planner.model_copy(update={"value_samples": 1, "value_elites": 1})
    alone = candidates(policy, branch, count)  # the first video's first value is the same draw; both act on it
    np.testing.assert_allclose(alone.actions[0], found.actions[0], atol=1e-5)
    np.testing.assert_allclose(alone.values[0, 0], found.values[0, 0, :1], atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_ranking_tells_a_score_that_is_right_from_one_that_is_wrong(
    policy: Policy, histories: list[list[Observation]], monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    """Candidate m's chunk moves the pictures away from the goal by m; the score says so, or the opposite."""
    branches = [branch_of(history, step) for step, history in enumerate(histories)]
    M = 6

    def planted(policy: Policy, branch: Branch, count: int, seed: int = 0) -> Candidates:
        actions = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None], (count, 4, 7)) / 100
        return Candidates(actions.copy(), -sign * torch.arange(float(count)).view(1, count, 1, 1, 1))

    def judged(policy: Policy, found: list[Candidates], samples: int) -> np.ndarray:
        return np.stack([one.values[0, :, 0, 0, 0].numpy() for one in found]) * (1 if samples == 1 else -1)

    def executed(jobs: list[tuple[Branch, np.ndarray]]) -> list[np.ndarray]:
        return [np.array([returned(branch, chunk) for chunk in chunks]) for branch, chunks in jobs]

    def returned(branch: Branch, chunk: np.ndarray) -> float:
        return realised_return(branch, moved(branch, chunk), chunk, LabelRewardsSettings(), policy.data.views)

    def moved(branch: Branch, chunk: np.ndarray) -> Segment:
        now, by = branch.seen[-1], round(100 * float(chunk[0, 0]))
        images = {
            view: np.clip(image.astype(int) + 10 * by, 0, 255).astype(np.uint8) for view, image in now.images.items()
        }
        seen = (now, *(Observation(images, now.state, now.instruction) for _ in chunk))
        return Segment(seen, False)

    monkeypatch.setattr(ranks, "candidates", planted)
    monkeypatch.setattr(ranks, "scores", judged)
    found = ranking(policy, branches, executed, M)
    assert found["states"] == 3
    assert found["spearman"] == pytest.approx(sign)
    assert found["by_video"] == pytest.approx(-sign)  # planted the other way round
    assert (found["regret"] == 0) == (sign == 1)
    assert found["beats_median"] == (1.0 if sign == 1 else 0.0)
    assert [(row["M"], row["N"]) for row in found["searches"]] == [(2, 1), (4, 1), (2, 2), (4, 2)]
    assert all((row["gain"] > 0) == (sign == (1 if row["N"] == 1 else -1)) for row in found["searches"])
    assert found["searches"][0]["false_choices"] == (0.0 if sign == 1 else 1.0)


def test_searching_harder_is_judged_on_every_group_of_candidates() -> None:
    """Two states of four candidates: of the pairs (0, 1), (2, 3) the score is wrong about one in four."""
    realised = np.array([[0.0, 1.0, 2.0, 3.0], [3.0, 1.0, 0.0, 5.0]])
    scores = np.array([[0.0, 1.0, 9.0, 2.0], [4.0, 1.0, 0.0, 3.0]])
    pairs, fours = searches(realised, scores, 3)
    assert pairs == {"M": 2, "N": 3, "gain": pytest.approx((0.5 - 0.5 + 1 + 2.5) / 4), "false_choices": 0.25}
    assert fours == {"M": 4, "N": 3, "gain": pytest.approx((0.5 + 0.75) / 2), "false_choices": 0.0}


def test_the_papers_form_follows_no_imagination(policy: Policy, histories: list[list[Observation]]) -> None:
    """Untrained, so any weights: what is not read cannot be followed, what is read at all shows."""
    instructions = [task.instruction for task in select_tasks("tabletop", policy.data.tasks)]
    others = dict(zip(instructions, reversed(instructions), strict=True))
    found = swaps(policy, histories, others)
    assert found == dict.fromkeys(("instruction", "episode"), dict.fromkeys(("future", "values", "both"), 0.0))
    policy.levels = Levels((1.0, 0.5), 0.1)
    coupled = swaps(policy, histories, {})
    assert set(coupled) == {"episode"}
    assert all(share != 0 for share in coupled["episode"].values())


@pytest.mark.parametrize("follows", ["future", "values"])
def test_swap_tells_what_the_action_follows(
    policy: Policy, histories: list[list[Observation]], monkeypatch: pytest.MonkeyPatch, follows: str
) -> None:
    plant(policy, monkeypatch, follows)
    policy.levels = Levels((1.0, 0.01), 0.01)
    shares = swaps(policy, histories, {})["episode"]
    expected = {"future": 0.0, "values": 0.0, follows: 1.0, "both": 1.0}
    assert shares == pytest.approx(expected, abs=0.02)


def plant(policy: Policy, monkeypatch: pytest.MonkeyPatch, follows: str) -> None:
    """Features and values are the future's first numbers, one a step; the action repeats those that it ``follows``."""

    def features(context: Any, noise: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
        return noise.flatten(1)[:, : policy.data.action_chunk]

    def values(features: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
        return noise * 0 + features[:, None, None, :, None]

    def act(context: Any, features: Any, value: Any, noise: Any, steps: int, level: float = 1.0) -> torch.Tensor:
        return noise * 0 + (features if follows == "future" else value.mean(2))[..., None]

    monkeypatch.setattr(policy.model, "video_features", features)
    monkeypatch.setattr(policy.model, "denoise_value", values)
    monkeypatch.setattr(policy.model, "denoise_action", act)


def windows(policy: Policy, count: int = 5) -> WindowBatch:
    """Random windows whose actions and values are their future's first numbers."""
    shapes, width = policy.model.shapes, policy.data.action_dim
    views, channels, _, *grid = shapes.video
    assert shapes.value is not None
    future = torch.randn(count, *shapes.video, generator=torch.Generator().manual_seed(0))
    told = future.flatten(1)[:, : policy.data.action_chunk, None]
    return WindowBatch(
        memory=torch.zeros(count, views, channels, policy.data.memory_frames, *grid),
        future=future,
        text=torch.zeros(count, 5, policy.model.model.config.caption_channels),
        text_mask=torch.ones(count, 5, dtype=torch.bool),
        state=torch.zeros(count, policy.data.state_dim),
        actions=told.expand(-1, -1, width + policy.data.state_dim),
        values=told.expand(-1, -1, shapes.value[1]),
        episode=torch.zeros(count),
        step=torch.arange(count),
    )


@pytest.mark.parametrize("follows", ["future", "values"])
def test_the_oracle_tells_what_the_truth_is_worth(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, follows: str
) -> None:
    plant(policy, monkeypatch, follows)
    policy.levels = Levels((1.0, 0.01), 0.01)
    errors = oracle(policy, windows(policy))
    assert errors["truth"] < 0.03
    assert errors[follows] < 0.03
    assert min(errors["imagined"], errors["none"]) > 0.5
    policy.levels = Levels()
    errors = oracle(policy, windows(policy))
    assert errors["truth"] == errors["imagined"] == errors["none"]


def demonstrations(styles: list[str], way: dict[str, float]) -> tuple[Any, Any]:
    """Stores of episodes of ten frames: the state is the step, and every future goes its style's way."""
    episodes = [SimpleNamespace(style=style, instruction="go") for style in styles]
    frames = 10 * len(episodes)
    image = np.tile(np.arange(10.0, dtype=np.float32), len(episodes)).reshape(frames, 1, 1, 1, 1)
    clip = np.repeat([way[style] for style in styles], 10).astype(np.float32).reshape(frames, 1, 1, 1, 1, 1)
    clip = clip + np.repeat(np.arange(len(episodes)) % 2, 10).reshape(clip.shape)  # what differs for no reason
    store = SimpleNamespace(episodes=episodes, frames=frames, offsets=np.arange(0, frames + 1, 10))
    return store, SimpleNamespace(image=image, clip=clip)


def test_futures_lie_as_far_apart_as_their_styles() -> None:
    found = futures_apart(*demonstrations(["direct", "slow"] * 4, {"direct": 3.0, "slow": -3.0}))
    assert found["other"] > found["same"]
    assert found["distance"] == pytest.approx(5.0)  # 6 apart, less the 1 that this style's episodes are off
    assert found["level"] == pytest.approx(5 / 7)
    alike = futures_apart(*demonstrations(["direct", "direct", "slow", "slow"], {"direct": 3.0, "slow": 3.0}))
    assert alike["distance"] < 1
    assert "little to choose" in "".join(findings({"futures": alike | {"read_at": 0.5}}))


def test_futures_of_unknown_styles_have_an_upper_bound() -> None:
    found = futures_apart(*demonstrations([""] * 4, {"": 0.0}))
    assert set(found) == {"same", "distance", "level"}
    assert 0 < found["distance"] <= 1
    assert futures_apart(*demonstrations([""], {"": 0.0})) == {}


@pytest.mark.parametrize("better", ["direct", "slow"])
def test_a_return_that_prefers_the_slower_way_is_seen_through(better: str) -> None:
    styles = ["direct", "slow", "direct", "recover"]
    store, latents = demonstrations(styles, dict.fromkeys(styles, 0.0))
    values = np.zeros((store.frames, 2))
    values[:, -1] = np.repeat([float(style == better) for style in styles], 10)
    found = direct_ahead(store, latents, values)
    assert found == {"slow": 1.0 if better == "direct" else 0.0}
    text = "".join(findings({"futures": {"distance": 9.0, "level": 0.8, "read_at": 0.5, "direct_ahead": found}}))
    assert ("prefers the slow ones" in text) == (better == "slow")
    assert direct_ahead(*demonstrations(["", ""], {"": 0.0}), values) == {}


class Store(list[str]):
    """Episodes of these tasks."""

    path = Path("store")

    @property
    def episodes(self) -> EpisodeTable:
        """The episode table."""
        writer = TableWriter()
        for i, task in enumerate(self):
            writer.add(EpisodeInfo(f"{task}/{i}", task, task, "test", "", 0, 1, i, 0, True, False, False))
        return writer.table


def test_one_episode_of_each_task_is_held_out() -> None:
    store: Any = Store(["lift"] * 5 + ["stack"] * 3)
    held = split_episodes(store, "validation", held_out_share(store))
    assert sorted(store[i] for i in held) == ["lift", "stack"]
    single: Any = Store(["lift", "stack"])
    assert len(split_episodes(single, "validation", held_out_share(single))) == 1


def test_findings_are_sentences() -> None:
    """Each instrument's numbers stand in one; nothing is said of what was not looked at."""
    found = {
        "use": {"action": {"video": 0.4, "value": 0.45, "action": 0.3}},
        "swap": {"instruction": {"future": 0.16, "values": 0.62, "both": 0.74}},
        "oracle": {"truth": 0.165, "future": 0.206, "values": 0.181, "imagined": 0.267, "none": 0.254},
        "futures": {"same": 34.1, "other": 44.5, "distance": 28.6, "level": 0.93, "read_at": 1.0},
    }
    text = "\n".join(findings(found))
    for part in ("40% by the video noise", "74% on its future and values", "0.165 on the true future and values"):
        assert part in text
    assert "D = 28.6" in text
    assert "tells nothing" in text
    assert list(findings({})) == []


def test_a_chunk_that_stays_at_the_goal_returns_the_most(policy: Policy, histories: list[list[Observation]]) -> None:
    branch, settings = branch_of(histories[0]), LabelRewardsSettings(gamma=0.5)
    still = np.zeros((3, 7), np.float32)
    stayed = Segment((branch.final,) * 4, True)
    value = realised_return(branch, stayed, still, settings, policy.data.views)
    assert value == pytest.approx(5 / 9 * (1 + 0.5 + 0.25))  # four similarities and proximity are 1, nothing moves
    longer = settings.model_copy(update={"horizon": 4})
    value = realised_return(branch, stayed, still, longer, policy.data.views)
    assert value == pytest.approx(5 / 9 * (1 + 0.5 + 0.25 + 0.125)), "it rests where the chunk ended"
    moving = np.array([[0.0] * 7, [0.0] * 7, [1.0] * 7], np.float32)
    short, long = (realised_return(branch, stayed, moving, s, policy.data.views) for s in (settings, longer))
    assert long - short == pytest.approx(5 / 9 * 0.125), "what the last action cost is paid once"
