"""Training windows: what they hold, past the end included, and that they depend on (seed, step) alone."""

import dataclasses
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch

from wav.data import windows
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import EpisodeStore
from wav.data.windows import BatchSampler, WindowDataset, sample_memory, scattered, split_episodes
from wav.data.writer import EpisodeStoreWriter
from wav.errors import ConfigError, DataError

V, C, F, H, W, L, CT, CV = 2, 3, 2, 2, 4, 5, 6, 10


@dataclass
class Latents:
    """Latents whose values name their row, view and channel."""

    image: np.ndarray
    clip: np.ndarray
    text: np.ndarray
    text_mask: np.ndarray
    instructions: tuple[str, ...]
    empty_text: int


@dataclass
class Rewards:
    values: np.ndarray
    statistics: Statistics


def make_latents(store) -> Latents:
    rng = np.random.default_rng(0)
    instructions = ("", *store.instructions)
    return Latents(
        image=rng.normal(size=(store.frames, V, C, H, W)).astype(np.float32),
        clip=rng.normal(size=(store.frames, V, C, F, H, W)).astype(np.float32),
        text=rng.normal(size=(len(instructions), L, CT)).astype(np.float32),
        text_mask=rng.random((len(instructions), L)) < 0.5,
        instructions=instructions,
        empty_text=0,
    )


@pytest.fixture
def parts(make_store):
    store = make_store((12, 9, 15, 8), shard_bytes=50_000)
    values = np.random.default_rng(1).normal(2, 3, (store.frames, CV)).astype(np.float32)
    rewards = Rewards(values, Statistics({"value": compute_statistics(values, "zscore_symlog")}))
    return store, make_latents(store), rewards


@pytest.fixture
def dataset(parts, data) -> WindowDataset:
    return WindowDataset(*parts, data, "train", 0.0)


def test_every_step_is_a_window(dataset, parts):
    store = parts[0]
    batch = dataset.batch(np.arange(len(dataset)), np.random.default_rng(0))
    assert len(dataset) == len(batch) == store.frames
    expected = [(e, t) for e in range(len(store)) for t in range(store[e].length)]
    assert list(zip(batch.episode.tolist(), batch.step.tolist(), strict=True)) == expected


def test_shapes_and_types(dataset, data):
    batch = dataset.batch(np.array([3, 0, 40]), np.random.default_rng(0))
    shapes = {name: tuple(value.shape) for name, value in vars(batch).items()}
    assert shapes == {
        "memory": (3, V, C, data.memory_frames, H, W),
        "future": (3, V, C, F, H, W),
        "text": (3, L, CT),
        "text_mask": (3, L),
        "state": (3, 8),
        "actions": (3, data.action_chunk, 15),
        "values": (3, data.action_chunk, CV),
        "episode": (3,),
        "step": (3,),
    }
    assert {v.dtype for k, v in vars(batch).items() if k not in ("text_mask", "episode", "step")} == {torch.float32}
    assert batch.text_mask.dtype == torch.bool
    assert batch.memory.is_contiguous()


def test_content_against_a_plain_loop(dataset, parts, data):
    """Recompute every window the slow way, from the episodes."""
    store, latents, rewards = parts
    draws = np.random.default_rng(3).random((len(dataset), data.memory_frames - 1))
    batch = dataset.batch(np.arange(len(dataset)), draws)
    memory_steps = sample_memory(batch.step.numpy(), data.memory_horizon, draws)
    for row, (e, t) in enumerate(zip(batch.episode.tolist(), batch.step.tolist(), strict=True)):
        episode, start = store[e], store.offsets[e]
        labels, statistics = episode.labels(), dataset.statistics
        for j, s in enumerate([*memory_steps[row], t]):
            assert max(0, t - data.memory_horizon) <= s <= t
            np.testing.assert_array_equal(batch.memory[row, :, :, j], latents.image[start + s])
        np.testing.assert_array_equal(batch.future[row], latents.clip[start + t])
        text = latents.instructions.index(episode.instruction)
        np.testing.assert_array_equal(batch.text[row], latents.text[text])
        np.testing.assert_array_equal(batch.text_mask[row], latents.text_mask[text])
        np.testing.assert_array_equal(batch.state[row], statistics.normalize_state(episode.state[t]))
        for j in range(data.action_chunk):
            s = min(t + j, episode.length - 1)
            action = labels[s] if t + j < episode.length else np.array([0] * 6 + [labels[-1, 6]], np.float32)
            wanted = [statistics.normalize_actions(action), statistics.normalize_state(episode.state[s])]
            np.testing.assert_allclose(batch.actions[row, j], np.concatenate(wanted), rtol=1e-6)
            expected = statistics.normalize_values(rewards.values[start + s])
            np.testing.assert_array_equal(batch.values[row, j], expected)


def test_past_the_end_the_robot_stops_and_holds(dataset, parts):
    """Spec section 7, item 14: zero motion (not the last delta again), gripper held."""
    last = np.flatnonzero(np.diff(np.append(dataset.places(np.arange(len(dataset)))[0], -1)))
    batch = dataset.batch(last, np.random.default_rng(0))
    actions = dataset.statistics.denormalize_actions(batch.actions[..., :7])
    assert actions[:, 1:, :6].abs().max() < 1e-6
    assert torch.allclose(actions[:, 1:, 6], actions[:, :1, 6].expand(-1, 5))
    assert actions[:, 0, :6].abs().max() > 0.1


def test_absolute_actions_repeat(tmp_path, conventions, make_episode, data):
    absolute = dataclasses.replace(conventions, action="joint_absolute")
    with EpisodeStoreWriter(tmp_path / "e", absolute) as writer:
        writer.add(make_episode(0))
    store = EpisodeStore.open(tmp_path / "e")
    dataset = WindowDataset(store, make_latents(store), None, data, "train", 0.0)
    batch = dataset.batch(np.array([11]), np.random.default_rng(0))
    assert batch.values is None
    assert (batch.actions == batch.actions[:, :1]).all()


@pytest.mark.parametrize(("population", "horizon"), [(0, 9), (1, 9), (2, 9), (5, 9), (20, 4)])
def test_memories_are_uniform_over_subsets(population, horizon):
    count, n = 3, 40_000
    step = np.full(n, population)
    memory = sample_memory(step, horizon, np.random.default_rng(0).random((n, count)))
    assert (np.diff(memory, axis=1) >= 0).all()
    size = min(population, horizon)
    allowed = range(population - size, population) if size else [0]
    assert set(memory.ravel()) == set(allowed)
    if size >= count:
        subsets, counts = np.unique(memory, axis=0, return_counts=True)
        assert {tuple(s) for s in subsets} == set(combinations(allowed, count))
        np.testing.assert_allclose(counts / n, 1 / len(subsets), atol=0.02)


def test_one_memory_frame(parts, data):
    dataset = WindowDataset(*parts, data.model_copy(update={"memory_frames": 1}), "train", 0.0)
    batch = dataset.at(BatchSampler(len(dataset), 4, seed=0), 0)
    rows = parts[0].offsets[batch.episode] + batch.step.numpy()
    np.testing.assert_array_equal(batch.memory[:, :, :, 0], parts[1].image[rows])


@pytest.mark.parametrize("batch_size", [4, 30])
def test_sampler_visits_every_window_once_per_epoch(batch_size):
    sampler = BatchSampler(10, batch_size, seed=1)
    steps = 30 // batch_size * 4 if batch_size == 30 else 10
    drawn = np.concatenate([sampler.indices(step) for step in range(steps)])
    for epoch in drawn[: len(drawn) // 10 * 10].reshape(-1, 10):
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(drawn[:10], drawn[10:20])


def test_batches_depend_on_seed_and_step_alone(dataset):
    def batches(seed, steps, ranks=1):
        samplers = [BatchSampler(len(dataset), 8, seed, rank, ranks) for rank in range(ranks)]
        return [torch.cat([dataset.at(s, step).memory for s in samplers]) for step in steps]

    forward = batches(0, range(12))
    assert all(torch.equal(a, b) for a, b in zip(forward[::-1], batches(0, range(11, -1, -1)), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(forward, batches(0, range(12), ranks=4), strict=True))
    assert not torch.equal(forward[0], batches(1, [0])[0])
    assert not torch.equal(forward[0], forward[1])


def test_split_holds_out_the_same_episodes_of_every_task(parts, data):
    store = parts[0]
    held = split_episodes(store, "validation", 0.5)
    assert len(held) == 2
    assert {store.episodes[i].task for i in held} == {"lift_red_cube", "lift_green_cube"}
    assert sorted([*held, *split_episodes(store, "train", 0.5)]) == [0, 1, 2, 3]
    assert len(split_episodes(store, "validation", 0.01)) == 1
    assert len(split_episodes(store, "validation", 0.0)) == 0
    train, validation = (WindowDataset(*parts, data, s, 0.5) for s in ("train", "validation"))
    assert len(train) + len(validation) == store.frames
    assert set(validation.batch(np.arange(len(validation)), np.random.default_rng(0)).episode.tolist()) == set(held)


def test_too_few_episodes_cannot_be_split(parts, data):
    store, latents, rewards = parts
    with pytest.raises(DataError, match=r"cannot be split with validation_share = 0\.9"):
        WindowDataset(store, latents, rewards, data, "train", 0.9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4, 0), DataError, "0 in this split"),
        ((9, 5, 0, 0, 2), ConfigError, "batch_size = 5: must be a positive multiple of the 2 ranks"),
    ],
)
def test_bad_samplers(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchSampler(*arguments)


def test_micro_batches_and_captions(dataset, parts):
    batch = dataset.batch(np.arange(6), np.random.default_rng(0))
    part = batch.rows(2, 5)
    assert len(part) == 3
    assert torch.equal(part.actions, batch.actions[2:5])
    assert torch.equal(batch.to("cpu").future, batch.future)
    np.testing.assert_array_equal(dataset.empty_text, parts[1].text[0])
    np.testing.assert_array_equal(dataset.empty_text_mask, parts[1].text_mask[0])


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65, 1000])
def test_scattered_is_a_permutation_that_the_generator_decides(n: int) -> None:
    orders = [scattered(np.arange(n), n, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(n))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert n < 10 or (orders[0] != orders[2]).any()
    if n == 1000:  # neighbours are sent apart: a third of n on average, as chance would
        assert 280 < np.abs(np.diff(orders[0])).mean() < 390


def test_large_sets_are_drawn_without_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "PERMUTED", 10)
    sampler = BatchSampler(12, 5, seed=1)
    drawn = np.concatenate([sampler.indices(step) for step in range(12)])
    for epoch in range(5):
        assert sorted(drawn[12 * epoch : 12 * epoch + 12]) == list(range(12))
    monkeypatch.undo()
    huge = BatchSampler(10**11, 64, seed=1).indices(10**6)
    assert len(set(huge.tolist())) == 64
    assert 0 <= huge.min() < huge.max() < 10**11
