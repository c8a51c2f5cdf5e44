"""Video features and videos written out with the transformer's own passes, and rollouts over several chunks."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.stage_folders import DATA, MODEL, PLANNER
from wav.codec import PCACodec
from wav.data.conventions import Conventions
from wav.data.statistics import Statistics, compute_statistics
from wav.flow_matching import inference_sigmas
from wav.inference.torch import TorchPlannerModel
from wav.model import WAVTransformer, build_model
from wav.planning.types import Levels, RowKey, SeededNoise
from wav.policy.policy import Observation, Policy

CHANNELS, WIDTH, CHUNKS = 6, 16, 3
MEMORY = 3


def pictures(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 32, 32, 3), np.uint8)


def make_policy(value_expert: bool = True) -> Policy:
    data = DATA.model_copy(update={"memory_frames": MEMORY})
    model = build_model(MODEL.model_copy(update={"value_expert": value_expert}), data, CHANNELS, WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # nothing hides behind a zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    random = np.random.default_rng(1)
    keys = {"action": (7, "quantile"), "state": (8, "quantile"), "value": (10, "zscore_symlog")}
    statistics = Statistics({k: compute_statistics(random.normal(size=(99, n)), mode) for k, (n, mode) in keys.items()})
    return Policy(
        model,
        PCACodec.fit(pictures(0, 40), pictures(1, 20, 5), patch=16, temporal=4, channels=CHANNELS),
        None,
        statistics,
        Conventions.for_simulator(data, {}),
        data,
        PLANNER,
        batch_size=2,
        device="cpu",
        prompts={"lift": (random.normal(size=(8, WIDTH)).astype(np.float32), np.arange(8) < 5)},
    )


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


@pytest.fixture(scope="module")
def observation() -> Observation:
    images = dict(zip(DATA.views, pictures(2, 2), strict=True))
    return Observation(images, np.random.default_rng(3).normal(size=8).astype(np.float32), "lift")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(sigma: float, rows: int, future: int) -> Tensor:
    """Timesteps (rows, F): memory frames at 0, future frames at the level."""
    return torch.tensor([[0.0] * MEMORY + [sigma * 1000] * future] * rows)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_features_after_denoising_the_video(policy: Policy, steps: int) -> None:
    """One step: a pass on pure noise at t = 1000. More: Euler steps first, features at the last level above zero."""
    adapter: TorchPlannerModel = policy.model
    model: WAVTransformer = adapter.model
    shape, candidates = adapter.shapes.video, 2
    memory, text = draw(1, 1, 2, CHANNELS, MEMORY, 2, 2), draw(2, 1, 8, WIDTH)
    assert adapter.shapes.value is not None
    noise, values = draw(3, 1, candidates, *shape), draw(4, 1, candidates, 1, *adapter.shapes.value)
    actions = draw(5, 1, *adapter.shapes.action)
    context = adapter.begin(memory, text, None, None)
    schedule = tuple(inference_sigmas(steps).tolist()[:-1])
    found = adapter.denoise_value(adapter.video_features(context, noise, schedule), values, 1)
    first = adapter.video_features(context, noise[:, :1], schedule)
    acted = adapter.denoise_action(context, first, values[:, 0, 0], actions, 1)
    sigmas = inference_sigmas(steps).tolist()
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    with torch.no_grad():
        for m in range(candidates):
            future = noise[:, m]
            for now, after in pairwise(sigmas[:-1]):
                t = levels(now, 1, shape[2])
                velocity = model.video(torch.cat([memory, future], 3), t, text, need_head=True).velocity
                future = future + (after - now) * velocity[:, :, :, MEMORY:]
            t = levels(sigmas[-2], 1, shape[2])
            features = model.video(torch.cat([memory, future], 3), t, text, need_head=False).features
            value = values[:, m, 0]
            output = model.value(value, torch.tensor([1000.0]), features)  # one Euler step, from 1 to 0
            torch.testing.assert_close(found[:, m, 0], value - output.velocity, atol=1e-5, rtol=1e-5)
            if m == 0:
                velocity = model.action(actions, torch.tensor([1000.0]), features, output.features)
                torch.testing.assert_close(acted, actions - velocity, atol=1e-5, rtol=1e-5)


def test_more_video_steps_give_another_plan(policy: Policy, observation: Observation) -> None:
    actions = []
    for schedule in ((1.0,), (1.0, 0.5), (1.0, 0.5)):
        policy.reset("row", "episode", 0)
        policy.levels = Levels(schedule)
        actions.append(policy.act([observation], ["row"]).actions)
    assert not np.array_equal(actions[0], actions[1])
    np.testing.assert_array_equal(actions[1], actions[2])


@pytest.mark.parametrize("value_expert", [True, False])
def test_videos_are_rolled_out_chunk_by_chunk(value_expert: bool, observation: Observation) -> None:
    """A plain rollout: a chunk's memory is the observed frame, then the last frame of each chunk before it."""
    policy = make_policy(value_expert)
    model, shape = policy.model.model, policy.model.shapes.video
    current = np.stack([observation.images[view] for view in DATA.views])
    text, mask = (torch.from_numpy(part)[None] for part in policy._prompts["lift"])
    seen, wanted = [current] * MEMORY, [current[:, None]]
    with torch.no_grad():
        for chunk in range(CHUNKS):
            latents = np.stack([policy.codec.encode_frames(frames) for frames in seen[-MEMORY:]], axis=2)
            memory = torch.from_numpy(latents)[None]
            future = SeededNoise([RowKey(4, "dream", chunk)])("generate.video", shape)
            for now, after in pairwise(inference_sigmas(PLANNER.denoise_steps).tolist()):
                t = levels(now, 1, shape[2])
                velocity = model.video(torch.cat([memory, future], 3), t, text, mask, need_head=True).velocity
                future = future + (after - now) * velocity[:, :, :, MEMORY:]
            wanted.append(policy.codec.decode_clips(future[0].numpy()))
            seen.append(wanted[-1][:, -1])
    found = policy.generate_video(observation, CHUNKS, seed=4, episode="dream")
    assert found.shape == (2, 1 + CHUNKS * DATA.future_frames, 32, 32, 3)
    assert found.dtype == np.uint8
    expected = np.concatenate(wanted, axis=1)
    assert (np.abs(found.astype(int) - expected) <= 1).all()
    assert not np.array_equal(expected[:, -5:], expected[:, -10:-5])


def test_a_rollout_forgets_nothing_it_should_keep(policy: Policy, observation: Observation) -> None:
    """Another first frame changes every later chunk, and acting rows are left alone."""
    policy.reset("row", "episode", 0)
    before = policy.act([observation], ["row"]).actions
    policy.reset("row", "episode", 0)
    video = policy.generate_video(observation, CHUNKS)
    np.testing.assert_array_equal(policy.act([observation], ["row"]).actions, before)
    images = {view: 255 - image for view, image in observation.images.items()}
    other: Any = policy.generate_video(dataclasses.replace(observation, images=images), CHUNKS)
    for chunk in range(CHUNKS):
        frames = slice(1 + chunk * DATA.future_frames, 1 + (chunk + 1) * DATA.future_frames)
        assert not np.array_equal(video[:, frames], other[:, frames])


def test_an_instruction_is_encoded_once() -> None:
    policy, encoded = make_policy(), []

    class Encoder:
        def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            encoded.extend(texts)
            return np.ones((len(texts), 8, WIDTH), np.float32), np.ones((len(texts), 8), bool)

    policy.text_encoder, policy._prompts = Encoder(), {}  # type: ignore[assignment]
    for episode in range(2):
        policy.reset("row", f"episode-{episode}", 0)
        for call, text in enumerate(("lift", "drop", "lift")):
            images = dict(zip(DATA.views, pictures(call, 2), strict=True))
            policy.act([Observation(images, np.zeros(8, np.float32), text)], ["row"], variant="unplanned")
    assert encoded == ["lift", "drop"]
