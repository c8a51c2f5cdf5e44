"""Whether shuffling by shards trains as shuffling over all windows does: losses of the video stage at tiny size.

The worst order of a store: every shard is one episode, and the episodes of a task stand together. Planted latents,
whose future the task decides, so that a model that sees one task at a time forgets the others. Each way of shuffling
starts from the same weights; ``one shard at a time`` shows that the measure would see harm::

    python -m benchmarks.shuffling --json benchmarks/results/shuffling.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.counting import machine, write_result
from tests.training.conftest import settings
from tests.training.golden_losses import Latents
from wav.data import streams
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.store import EpisodeStore
from wav.data.streams import StreamSampler
from wav.data.windows import BatchSampler, WindowDataset
from wav.data.writer import EpisodeStoreWriter
from wav.model import build_model
from wav.training.engine import World, plan_batch
from wav.training.objectives import build_objective
from wav.training.prefetch import Source, validation_inputs

TASKS, EPISODES, LENGTH, CHANNELS, CAPTION = 16, 8, 24, 6, 16
TRAIN = {"batch_size": 32, "caption_dropout": 0.0, "validation_share": 0.125}
CONFIG = settings(pretrain_video=TRAIN)
#: name -> (streams, shards whose windows are mixed)
WAYS = {"all windows": (0, 0), "8 streams": (8, 8), "one shard at a time": (1, 1)}


def make_store(folder: Path) -> EpisodeStore:
    """Episodes without pictures, task by task, each a shard."""
    data, zeros = CONFIG.data, np.zeros((LENGTH, 32, 32, 3), np.uint8)
    with EpisodeStoreWriter(folder, Conventions.for_simulator(data, {}), shard_bytes=1) as writer:
        for number in range(TASKS * EPISODES):
            rng, task = np.random.default_rng(number), f"task_{number // EPISODES:02d}"
            state, actions = (rng.normal(size=(LENGTH, size)).astype(np.float32) for size in (8, 7))
            images = dict.fromkeys(data.views, zeros)
            whole = (f"{task}/{number}", task, task, images, state, None, actions.clip(-1, 1), None)
            writer.add(Episode(*whole, True, number, 0, "planted"))
    return EpisodeStore.open(folder)


def plant(store: EpisodeStore) -> Latents:
    """Latents of every frame and of the clips after it."""
    texts, rng = ("", *store.instructions), np.random.default_rng(0)
    shape = (len(CONFIG.data.views), CHANNELS, 2, 2)
    planes = rng.normal(size=(TASKS, 2, *shape)).astype(np.float32)
    speeds = rng.uniform(0.1, 0.6, TASKS)

    def frame(task: int, phase: float) -> NDArray[np.float32]:
        return np.asarray(np.cos(phase) * planes[task, 0] + np.sin(phase) * planes[task, 1], np.float32)

    image, clip = [], []
    for number in range(len(store)):
        task, begin = number // EPISODES, rng.uniform(0, 6.28)
        for step in range(LENGTH):
            image.append(frame(task, begin + speeds[task] * step))
            later = [frame(task, begin + speeds[task] * min(step + ahead, LENGTH - 1)) for ahead in (2, 8)]
            clip.append(np.stack(later, axis=2))
    text = rng.normal(size=(len(texts), CONFIG.data.text_tokens, CAPTION)).astype(np.float32)
    return Latents(np.stack(image), np.stack(clip), text, np.ones(text.shape[:2], bool), texts)


def train(splits: list[WindowDataset], way: tuple[int, int], steps: int, every: int, seed: int) -> list[float]:
    """Held-out losses, every so many steps."""
    settings, data = CONFIG.pretrain_video, CONFIG.data
    model = build_model(CONFIG.model, data, CHANNELS, CAPTION, seed=seed)
    objective = build_objective(settings, model, data.memory_frames, data.action_dim)
    places = (settings.batch_size, seed)
    sampler = BatchSampler(len(splits[0]), *places)
    if way[0]:
        streams.MIXED = way[1]
        sampler = StreamSampler(splits[0].shards, *places, streams=way[0])
    plan = plan_batch(settings, 1)
    source = Source(splits[0], sampler, objective, plan, World(0, 1, torch.device("cpu")))
    held_out = validation_inputs(splits[1], objective, plan, torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3)
    curve = []
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                curve.append(float(np.mean([float(objective(inputs)[0]) for inputs in held_out])))
        for inputs in source.step(step):
            objective(inputs)[0].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return curve


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    curves: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "episodes")
        latents = plant(store)
        splits = [
            WindowDataset(store, latents, None, CONFIG.data, split, CONFIG.pretrain_video.validation_share)  # type: ignore[arg-type]
            for split in ("train", "validation")
        ]
        for name, way in WAYS.items():
            runs = [train(splits, way, arguments.steps, arguments.every, seed) for seed in range(arguments.seeds)]
            curves[name] = {"runs": runs, "last_mean": float(np.mean(runs, axis=0)[-1])}
            print(json.dumps({name: np.round(np.mean(runs, axis=0), 4).tolist()}), flush=True)
    spread = float(np.std([run[-1] for run in curves["all windows"]["runs"]], ddof=1)) if arguments.seeds > 1 else None
    size = {"tasks": TASKS, "episodes": TASKS * EPISODES, "shards": TASKS * EPISODES, "steps_of_an_episode": LENGTH}
    more = {"batch": CONFIG.pretrain_video.batch_size, "every": arguments.every, "spread_over_seeds": spread}
    write_result(arguments.json, {"machine": machine(), **size, **more, "held_out_loss": curves})


if __name__ == "__main__":
    main()
