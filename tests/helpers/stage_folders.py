"""The folders that the stages before evaluation leave, made small and untrained, with their real writers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wav.codec import PCACodec
from wav.config import DataSettings, EvalLiberoSettings, LabelRewardsSettings, ModelSettings, PlannerSettings, Settings
from wav.data.conventions import Conventions
from wav.data.encode import encode_store
from wav.data.episode import Episode
from wav.data.statistics import Statistics
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.io.files import canonical_digest, file_records, write_json
from wav.model import build_model
from wav.policy.export import export_policy, policy_from_stages
from wav.rewards.label import label_store
from wav.sim.registry import task_specs
from wav.text import TextEncoder, build_small

DATA = DataSettings(
    image_height=32, image_width=32, memory_frames=2, future_frames=5, frame_stride=1, action_chunk=6, text_tokens=8
)
MODEL = ModelSettings(
    layers=2, heads=2, head_dim=12, value_heads=2, value_head_dim=8, action_heads=2, action_head_dim=12
)
PLANNER = PlannerSettings(
    iterations=1, video_samples=2, value_samples=2, video_elites=1, value_elites=2, denoise_steps=2
)
SETTINGS = Settings(data=DATA, model=MODEL, planner=PLANNER, eval_libero=EvalLiberoSettings(execute_steps=4))
CHANNELS, WIDTH = 6, 16


@dataclass(frozen=True)
class Stages:
    """Outputs of ingest, label_rewards, encode and train_joint."""

    episodes: Path
    rewards: Path
    latents: Path
    joint: Path


def random_episode(number: int, length: int = 18, data: DataSettings = DATA) -> Episode:
    """Noise, but of the right shapes and units."""
    random = np.random.default_rng(number)
    spec = list(task_specs(data.suite).values())[number % 2]
    images = {v: random.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8) for v in data.views}
    state = random.normal(size=(length, 8)).astype(np.float32)
    actions = random.uniform(-1, 1, (length, 7)).astype(np.float32)
    return Episode(
        f"e{number}", spec.name, spec.instruction, images, state, None, actions, None, True, 1000 + number, 0, "test"
    )


def make_stages(folder: Path, value_expert: bool = True, data: DataSettings = DATA) -> Stages:
    """Write all four folders under ``folder``; without value expert, as training leaves them then."""
    stages = Stages(folder / "episodes", folder / "rewards", folder / "latents", folder / "joint")
    with EpisodeStoreWriter(stages.episodes, Conventions.for_simulator(data)) as writer:
        for number in range(4):
            writer.add(random_episode(number, data=data))
    store = EpisodeStore.open(stages.episodes)
    rewards = label_store(store, LabelRewardsSettings(), data.action_chunk, stages.rewards)
    frames = np.concatenate([store[i].images[view] for i in range(4) for view in data.views])
    codec = PCACodec.fit(frames, frames[:70].reshape(14, 5, 32, 32, 3), patch=16, temporal=4, channels=CHANNELS)
    text = build_small(folder / "t5", [spec.instruction for spec in task_specs(data.suite).values()], dim=WIDTH)
    latents = encode_store(store, codec, TextEncoder.from_pretrained(text, data.text_tokens), data, stages.latents)
    stages.joint.mkdir()
    model = MODEL.model_copy(update={"value_expert": value_expert})
    build_model(model, data, CHANNELS, WIDTH).save_pretrained(stages.joint / "model")
    store.statistics.save(stages.joint / "episodes_statistics.json")
    values = rewards.statistics if value_expert else Statistics({})
    values.save(stages.joint / "rewards_statistics.json")
    write_json(stages.joint / "conventions.json", store.conventions.to_json())
    checkpoint = {
        "format": 1,
        "stage": "train_joint",
        "key": "k",
        "steps": 3,
        "model_digest": canonical_digest({r.path: r.sha256 for r in file_records(stages.joint / "model")}),
        "latents": latents.digest,
        "statistics": {"episodes": store.statistics.digest} | ({"rewards": values.digest} if value_expert else {}),
        "inputs": {},
    }
    write_json(stages.joint / "checkpoint.json", checkpoint)
    return stages


def make_export(folder: Path, batch_size: int) -> Path:
    """The policy of :func:`make_stages`, exported without an evaluation; all of it below ``folder``."""
    stages = make_stages(folder)
    policy = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=batch_size, device="cpu")
    return export_policy(*policy, folder / "export", settings=SETTINGS, metrics=None)
