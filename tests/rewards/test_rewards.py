"""Rewards: Table 2 against an independent scalar implementation, SSIM against scikit-image, returns, store."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from wav.config import LabelRewardsSettings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.errors import DataError
from wav.plots import spearman
from wav.rewards.label import label_store, returns, value_channels
from wav.rewards.ssim import ssim
from wav.rewards.terms import TERMS, channels, episode_rewards, mse


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's own table, whatever terms were added to it."""
    monkeypatch.setattr("wav.rewards.terms.TERMS", TERMS[:4])


H, W, T = 16, 24, 14
SIMILARITIES = ("wrist_mse", "wrist_ssim", "top_mse", "top_ssim", "proximity")
MOTIONS = ("state_velocity", "state_acceleration", "action_velocity", "action_acceleration")
NINE = (*SIMILARITIES, *MOTIONS)


def reach(index: int = 0, length: int = T, joints: bool = True, noise: float = 0.0) -> Episode:
    """An episode that approaches its final picture and pose steadily."""
    rng = np.random.default_rng(index)
    start, goal = (rng.uniform(0, 255, (H, W, 3)) for _ in range(2))
    progress = np.linspace(0, 1, length)[:, None, None, None]
    frames = np.clip(start * (1 - progress) + goal * progress + rng.normal(0, 3, (length, H, W, 3)), 0, 255)
    pose = np.linspace(0, 1, length)[:, None] * rng.uniform(-1, 1, 8) + rng.normal(0, noise, (length, 8))
    state = pose.astype(np.float32)
    actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32) * 0.1
    return Episode(
        episode_id=f"reach/{index}",
        task="reach",
        instruction="reach the goal",
        images={"agentview": frames.astype(np.uint8), "wrist": frames[:, ::-1].astype(np.uint8).copy()},
        state=state,
        joints=state + 0.25 if joints else None,
        actions=actions,
        expert_actions=None,
        success=True,
        init_index=1000 + index,
        seed=index,
        source="test",
    )


def bimanual(length: int = 9) -> Episode:
    rng = np.random.default_rng(5)
    images = {name: rng.integers(0, 256, (length, H, W, 3), np.uint8) for name in ("top", "left_wrist", "right_wrist")}
    arrays = [rng.normal(size=(length, n)).astype(np.float32) for n in (14, 14, 14)]
    state, joints, actions = arrays
    return Episode("pour/0", "pour", "pour the water", images, state, joints, actions, source="test")


# --- the same mathematics, written again: plain loops, the window built in two dimensions ---------------------------


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    grid = np.arange(11) - 5
    window = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                a = x[i : i + 11, j : j + 11, channel].astype(float)
                b = y[i : i + 11, j : j + 11, channel].astype(float)
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


def slow_motion(rows: list[list[float]], t: int) -> tuple[float, float]:
    def at(s: int) -> list[float]:
        return rows[max(s, 0)]

    velocity = sum(abs(a - b) for a, b in zip(at(t), at(t - 1), strict=True))
    acceleration = sum(abs(a - 2 * b + c) for a, b, c in zip(at(t), at(t - 1), at(t - 2), strict=True))
    return velocity, acceleration


def slow_terms(wrist, top, state, actions, t: int) -> list[float]:
    """Unweighted terms of one arm at step t, in the order of NINE."""
    result = []
    for frames in (wrist, top):
        difference = frames[t].astype(float) - frames[-1].astype(float)
        result += [math.exp(-0.01 * float((difference**2).mean())), math.exp(slow_ssim(frames[t], frames[-1]) - 1)]
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(state[t], state[-1], strict=True)))
    return [*result, math.exp(-distance), *slow_motion(state, t), *slow_motion(actions, t)]


# ----------------------------------------------------------------------------------------------------------------------


def skimage_ssim(image: np.ndarray, reference: np.ndarray) -> float:
    options = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5}
    return float(structural_similarity(image, reference, channel_axis=-1, data_range=255, **options))


@pytest.mark.parametrize("size", [(11, 11), (16, 24), (33, 20), (64, 43)])
def test_ssim_matches_scikit_image_and_the_definition(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 256, (*size, 3), np.uint8)
    noise = rng.normal(0, 1, (5, *size, 3)) * np.array([0, 3, 15, 40, 200])[:, None, None, None]
    images = np.clip(reference + noise, 0, 255).astype(np.uint8)
    found = ssim(images, reference)
    for image, value in zip(images, found, strict=True):
        assert value == pytest.approx(skimage_ssim(image, reference), abs=1e-6)
    assert found[0] == pytest.approx(1)
    assert found[2] == pytest.approx(slow_ssim(images[2], reference), abs=1e-6)
    assert (np.diff(found) < 0).all()


def test_ssim_holds_where_float32_is_weakest() -> None:
    """Flat bright areas beside black ones: the variances are small differences of large squares."""
    reference = np.full((40, 48, 3), 250, np.uint8)
    reference[:20] = 3
    rng = np.random.default_rng(3)
    images = np.clip(reference + rng.normal(0, 1, (6, 40, 48, 3)) * np.arange(6)[:, None, None, None], 0, 255)
    images = np.concatenate([images, 255 - images]).astype(np.uint8)
    for image, value in zip(images, ssim(images, reference), strict=True):
        assert value == pytest.approx(skimage_ssim(image, reference), abs=1e-4)


def test_a_frame_is_compared_alone() -> None:
    frames = reach().images["wrist"]
    for measure in (ssim, mse):
        whole = measure(frames, frames[-1])
        alone = np.concatenate([measure(frames[t : t + 1], frames[-1]) for t in range(T)])
        np.testing.assert_array_equal(alone, whole)


def test_mse_is_the_mean_squared_difference() -> None:
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (40, 33, 20, 3), np.uint8)
    expected = ((images.astype(int) - images[3].astype(int)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(mse(images, images[3]), expected, rtol=1e-12)
    extreme = mse(np.zeros((1, 512, 512, 3), np.uint8), np.full((512, 512, 3), 255, np.uint8))
    assert extreme[0] == pytest.approx(255**2, rel=1e-5)


def test_images_below_the_window_are_refused() -> None:
    with pytest.raises(DataError, match="image_height"):
        ssim(np.zeros((1, 10, 30, 3), np.uint8), np.zeros((10, 30, 3), np.uint8))
    with pytest.raises(DataError, match="uint8"):
        ssim(np.zeros((1, 16, 16, 3), np.float32), np.zeros((16, 16, 3), np.uint8))


def test_nine_terms_match_the_scalar_implementation() -> None:
    episode = reach(noise=0.05)
    found = episode_rewards(episode, LabelRewardsSettings())
    assert found.names == NINE
    np.testing.assert_allclose(found.weights, np.array([1, 1, 1, 1, 1, -1, -1, -0.1, -0.1]) / 9, rtol=1e-6)
    for t in (0, 1, 2, 7, T - 1):
        expected = slow_terms(
            episode.images["wrist"], episode.images["agentview"], episode.joints.tolist(), episode.actions.tolist(), t
        )
        np.testing.assert_allclose(found.terms[t], expected, rtol=2e-5, atol=1e-6)
        assert found.reward[t] == pytest.approx(float(np.dot(expected, found.weights)), abs=1e-5)
    assert (found.terms[0, 5:] == 0).all()
    np.testing.assert_allclose(found.terms[-1, :5], 1, atol=1e-6)


def test_sixteen_terms_of_two_arms() -> None:
    episode = bimanual()
    found = episode_rewards(episode, LabelRewardsSettings(arms=2, weight="1/16"))
    assert found.terms.shape == (9, 16)
    expected = {}
    for side, columns in (("left", slice(0, 7)), ("right", slice(7, 14))):
        rows = slow_terms(
            episode.images[f"{side}_wrist"],
            episode.images["top"],
            episode.joints[:, columns].tolist(),
            episode.actions[:, columns].tolist(),
            4,
        )
        for name, value in zip(NINE, rows, strict=True):
            expected[name if name.startswith("top") else f"{side}_{name}"] = value
    for name, value, weight in zip(found.names, found.terms[4], found.weights, strict=True):
        assert value == pytest.approx(expected[name], rel=2e-5, abs=1e-6)
        share = 0.1 if "action" in name else 1
        assert weight == pytest.approx((-share if name.endswith(("velocity", "acceleration")) else 1) / 16)
    assert sorted(found.names) == sorted(expected)


def test_without_joints_the_axis_angle_is_unwrapped() -> None:
    episode = reach(joints=False)
    state = episode.state.copy()
    angle = np.linspace(np.pi - 0.1, np.pi + 0.1, T)
    state[:, 3:6] = 0
    smooth = state.copy()
    smooth[:, 3] = angle
    state[:, 3] = np.where(angle > np.pi, angle - 2 * np.pi, angle)  # the sign flip of a downward gripper
    flipped, unwrapped = (
        episode_rewards(Episode(**{**episode.__dict__, "state": s}), LabelRewardsSettings()).terms
        for s in (state, smooth)
    )
    np.testing.assert_allclose(flipped, unwrapped, atol=1e-5)
    assert flipped[:, 5].max() < 1


def test_a_constant_episode_has_all_similarity_and_no_motion() -> None:
    for episode, settings in (
        (reach(), LabelRewardsSettings()),
        (bimanual(), LabelRewardsSettings(arms=2, weight="1/16")),
    ):
        still = {
            name: np.repeat(getattr(episode, name)[3:4], episode.length, axis=0)
            for name in ("state", "joints", "actions")
        }
        images = {view: np.repeat(frames[3:4], episode.length, axis=0) for view, frames in episode.images.items()}
        found = episode_rewards(replace(episode, images=images, **still), settings)
        motion = np.array([name.endswith(("velocity", "acceleration")) for name in found.names])
        np.testing.assert_allclose(found.terms[:, ~motion], 1, atol=1e-6)
        assert (found.terms[:, motion] == 0).all()
        reward = (5 if settings.arms == 1 else 8) * (1 / 9 if settings.arms == 1 else 1 / 16)
        np.testing.assert_allclose(found.reward, reward, atol=1e-6)
        values = value_channels(found, settings, 15)[:, -1]
        np.testing.assert_allclose(values, reward * (1 - 0.99**15) / (1 - 0.99), rtol=1e-5)


def test_an_episode_of_one_step_is_its_own_goal() -> None:
    episode = reach()
    first = {name: getattr(episode, name)[:1] for name in ("state", "joints", "actions")}
    images = {view: frames[:1] for view, frames in episode.images.items()}
    found = episode_rewards(replace(episode, images=images, **first), LabelRewardsSettings())
    np.testing.assert_allclose(found.terms, [[1, 1, 1, 1, 1, 0, 0, 0, 0]], atol=1e-6)
    assert value_channels(found, LabelRewardsSettings(), 15).shape == (1, 10)
    assert value_channels(found, LabelRewardsSettings(to_end=True), 15)[0, 9] == pytest.approx(5 / 9)


def test_a_missing_camera_is_named() -> None:
    episode, settings = reach(), LabelRewardsSettings()
    with pytest.raises(
        DataError, match=r"data\.views = .*needs 2 wrist camera\(s\), found wrist .*label_rewards\.arms"
    ):
        episode_rewards(episode, LabelRewardsSettings(arms=2))
    with pytest.raises(DataError, match=r"needs 1 wrist camera\(s\), found none"):
        episode_rewards(episode, settings, ("agentview",))
    with pytest.raises(DataError, match=r"needs 1 third-person camera\(s\), found none"):
        episode_rewards(episode, settings, ("wrist",))
    with pytest.raises(DataError, match=r"found agentview, sideview"):
        episode_rewards(episode, settings, ("agentview", "sideview", "wrist"))
    only = replace(episode, images={"agentview": episode.images["agentview"]})
    with pytest.raises(DataError, match=r"episode reach/0: camera 'wrist' is missing, it has agentview"):
        episode_rewards(only, settings, ("agentview", "wrist"))


@pytest.mark.parametrize("gamma", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("horizon", [1, 2, 15])
def test_returns_of_a_geometric_reward_have_a_closed_form(gamma: float, horizon: int) -> None:
    """r_t = q^t, held at q^(T-1): v_t sums (gamma q)^i up to the last frame and gamma^i from there on."""
    q, length = 1.1, 12

    def series(ratio: float, terms: int) -> float:
        return terms if ratio == 1 else (1 - ratio**terms) / (1 - ratio)

    expected = []
    for t in range(length):
        moving = min(horizon, length - t)
        held = gamma**moving * series(gamma, horizon - moving) * q ** (length - 1)
        expected.append(q**t * series(gamma * q, moving) + held)
    reward = q ** np.arange(length)
    np.testing.assert_allclose(returns(reward, gamma, horizon), expected, rtol=1e-6)
    to_end = [q**t * series(gamma * q, length - t) for t in range(length)]
    np.testing.assert_allclose(returns(reward, gamma, None), to_end, rtol=1e-6)


def test_returns_by_hand() -> None:
    reward = np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(returns(reward, 0.5, 1), reward)
    np.testing.assert_allclose(returns(reward, 0.5, 3), [1 + 1 + 1, 2 + 2 + 1, 4 + 2 + 1])  # the last reward is held
    np.testing.assert_allclose(returns(reward, 0.5, None), [1 + 1 + 1, 2 + 2, 4])
    np.testing.assert_allclose(returns(reward, 1.0, 10), [1 + 2 + 8 * 4, 2 + 9 * 4, 40])
    with pytest.raises(DataError, match="horizon"):
        returns(reward, 0.5, 0)


def test_the_return_rises_toward_success_and_the_one_to_the_end_falls() -> None:
    for index in range(3):
        terms = episode_rewards(reach(index, length=40), LabelRewardsSettings())
        windowed = value_channels(terms, LabelRewardsSettings(), 15)[:, -1]
        to_end = value_channels(terms, LabelRewardsSettings(to_end=True), 15)[:, -1]
        assert spearman(windowed) > 0.8
        assert spearman(to_end) < 0


def test_value_channels_are_weighted_terms_and_the_return() -> None:
    settings = LabelRewardsSettings(gamma=0.9, horizon=4)
    terms = episode_rewards(reach(), settings)
    values = value_channels(terms, settings, 15)
    assert values.shape == (T, 10)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[:, :9].sum(1), terms.reward, atol=1e-6)
    np.testing.assert_allclose(values[:, 9], returns(terms.reward, 0.9, 4))


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    return make_store(tmp_path / "episodes", (14, 9, 20))


def make_store(path: Path, lengths: tuple[int, ...]) -> EpisodeStore:
    conventions = Conventions(
        "test", ("agentview", "wrist"), H, W, "fast", "none", "-1 open, +1 close", "eef", 20, "osc_pose_delta", {}
    )
    with EpisodeStoreWriter(path, conventions) as writer:
        for index, length in enumerate(lengths):
            writer.add(reach(index, length))
    return EpisodeStore.open(path)


def test_channels_follow_from_the_table() -> None:
    assert [channels(arms) for arms in (1, 2)] == [10, 17]


def test_label_store(tmp_path: Path, store: EpisodeStore) -> None:
    seen: list[tuple[int, int]] = []
    rewards = label_store(
        store, LabelRewardsSettings(), 6, tmp_path / "rewards", lambda done, total: seen.append((done, total))
    )
    assert seen == [(14, 43), (23, 43), (43, 43)]
    assert rewards.names == NINE
    assert rewards.values.shape == (43, 10)
    expected = value_channels(episode_rewards(store[1], LabelRewardsSettings()), LabelRewardsSettings(), 6)
    np.testing.assert_array_equal(rewards.episode(1), expected)
    normal = rewards.statistics.normalize_values(rewards.values[:])
    np.testing.assert_allclose(rewards.statistics.denormalize_values(normal), rewards.values[:], atol=1e-4)
    rewards.verify()
    again = RewardStore.open(tmp_path / "rewards", store)
    assert again.digest == rewards.digest
    assert label_store(store, LabelRewardsSettings(gamma=0.9), 6, tmp_path / "other").digest != rewards.digest


def test_a_reward_store_refuses_other_episodes_and_damage(tmp_path: Path, store: EpisodeStore) -> None:
    label_store(store, LabelRewardsSettings(), 6, tmp_path / "rewards")
    other = make_store(tmp_path / "episodes2", (14, 9))
    with pytest.raises(DataError, match="made from episodes"):
        RewardStore.open(tmp_path / "rewards", other)
    values = tmp_path / "rewards" / "shard-00000" / "values.npy"
    values.write_bytes(values.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"values\.npy.*truncated"):
        RewardStore.open(tmp_path / "rewards")


def test_nothing_is_left_when_labelling_fails(tmp_path: Path, store: EpisodeStore) -> None:
    with pytest.raises(DataError):
        label_store(store, LabelRewardsSettings(arms=2), 6, tmp_path / "rewards")
    assert not (tmp_path / "rewards").exists()
