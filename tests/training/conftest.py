"""A tiny real workspace: six random episodes, encoded and labelled, and runs of the loop in forked children."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wav.config import Settings
from wav.data.conventions import Conventions
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.episode import Episode
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.rewards.label import label_store
from wav.training import RENDEZVOUS
from wav.training.spec import TrainPaths, TrainSpec, make_spec

TRAIN = {
    "steps": 6,
    "batch_size": 4,
    "warmup_steps": 2,
    "checkpoint_every": 3,
    "log_every": 2,
    "ema_decay": 0.9,
    "validation_share": 0.2,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {
        "image_height": 32,
        "image_width": 32,
        "memory_frames": 2,
        "memory_horizon": 8,
        "future_frames": 5,
        "frame_stride": 2,
        "action_chunk": 4,
        "text_tokens": 16,
    },
    "model": {
        "layers": 2,
        "heads": 2,
        "head_dim": 12,
        "value_heads": 2,
        "value_head_dim": 8,
        "action_heads": 2,
        "action_head_dim": 8,
    },
    "encode": {"patch": 16, "channels": 6, "fit_frames": 50, "coordinates": False, "text_dim": 16},
    "eval_libero": {"execute_steps": 2},
    "pretrain_video": {**TRAIN, "caption_dropout": 0.5},
    "train_value": {**TRAIN, "value_draws": 2},
    "train_joint": {**TRAIN, "action_draws": 2, "value_draws": 2, "action_probability": 0.5},
}


def settings(**changes: dict[str, Any]) -> Settings:
    """Tiny settings with some sections' parameters changed."""
    return Settings.model_validate({name: {**raw, **changes.get(name, {})} for name, raw in SECTIONS.items()})


def episode(index: int, data: Any) -> Episode:
    rng = np.random.default_rng(index)
    length = 10 + index
    task = data.tasks[index % 2]
    images = {v: rng.integers(0, 256, (length, data.image_height, data.image_width, 3), np.uint8) for v in data.views}
    return Episode(
        episode_id=f"{task}/{index}",
        task=task,
        instruction=task.replace("_", " "),
        images=images,
        state=np.cumsum(rng.normal(size=(length, 8)), 0).astype(np.float32),
        joints=rng.normal(size=(length, 8)).astype(np.float32),
        actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        expert_actions=None,
        success=True,
        init_index=1000 + index,
        seed=index,
        source="test",
    )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with episodes/, latents/ and rewards/."""
    folder, config = tmp_path_factory.mktemp("workspace"), settings()
    with EpisodeStoreWriter(folder / "episodes", Conventions.for_simulator(config.data, {})) as writer:
        for index in range(6):
            writer.add(episode(index, config.data))
    episodes = EpisodeStore.open(folder / "episodes")
    codec = fit_codec(episodes, config.data, config.encode)
    text = build_text_encoder(config.encode, config.data, episodes.instructions, folder / "t5")
    encode_store(episodes, codec, text, config.data, folder / "latents")
    label_store(episodes, config.label_rewards, config.data.action_chunk, folder / "rewards")
    return folder


def specs(workspace: Path, folder: Path) -> Callable[..., TrainSpec]:
    """See :func:`spec_of`; the runs' folders lie in ``folder``."""

    def make(stage: str = "pretrain_video", init: Path | None = None, name: str = "a", **changes: Any) -> TrainSpec:
        root = folder / name
        paths = TrainPaths(
            episodes=workspace / "episodes",
            latents=workspace / "latents",
            output=root / "models" / stage,
            cache=root / "cache",
            rewards=None if stage == "pretrain_video" else workspace / "rewards",
            init=init,
        )
        store = (root / "store").as_uri()
        return make_spec(stage, settings(**changes), paths, store=store, device="cpu", threads=1)

    return make


@pytest.fixture
def spec_of(workspace: Path, tmp_path: Path) -> Callable[..., TrainSpec]:
    """``spec_of(stage, init=None, name="a", **sections)``: a run with its own folders under ``name``."""
    return specs(workspace, tmp_path)


def _child(spec: TrainSpec, output: Path, rank: int, ranks: int, prepare: Callable[[], None] | None) -> None:
    import sys

    import torch

    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, RENDEZVOUS: output.with_suffix(".meet")}
    os.environ.update({name: str(value) for name, value in place.items()})
    path = output.with_suffix(f".{rank}.json")
    path.write_text(spec.to_json())
    with output.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        from wav.training.loop import main

        if prepare is not None:
            prepare()
        sys.argv = ["loop", str(path)]
        try:
            status = main()
        except Exception:
            traceback.print_exc()
            status = 70
        raise SystemExit(status)


class Run:
    """A run in forked children, one per rank; ``log`` is what they print together."""

    def __init__(self, children: list[Any], log: Path) -> None:
        self.children, self.log, self.pid = children, log, children[0].pid

    def is_alive(self) -> bool:
        return all(child.is_alive() for child in self.children)

    @property
    def exitcode(self) -> int | None:
        codes: list[int | None] = [child.exitcode for child in self.children]
        return next((code for code in codes if code), codes[0])

    def join(self, seconds: float | None = None) -> None:
        """Wait for rank 0; the others end when one has failed."""
        self.children[0].join(seconds)
        for child in self.children[1:]:
            if self.children[0].exitcode:
                child.kill()
            child.join(seconds)

    def terminate(self) -> None:
        for child in self.children:
            child.terminate()

    def kill(self) -> None:
        for child in self.children:
            child.kill()
        for child in self.children:
            child.join()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """``start(spec, prepare=None)``: a run of ``spec.train.ranks`` forked children (imports are paid once).

    ``prepare`` is called in each child before it trains.
    """
    import deepspeed
    import deepspeed.checkpoint.ds_to_universal  # noqa: F401
    import dvc.repo  # noqa: F401
    import dvclive  # noqa: F401

    import wav.training.loop  # noqa: F401

    runs: list[Run] = []

    def begin(spec: TrainSpec, prepare: Callable[[], None] | None = None) -> Run:
        log = tmp_path / f"log-{len(runs)}.txt"
        log.touch()
        ranks = spec.train.ranks
        context = multiprocessing.get_context("fork")
        children: list[Any] = [
            context.Process(target=_child, args=(spec, log, rank, ranks, prepare)) for rank in range(ranks)
        ]
        for child in children:
            child.start()
        runs.append(Run(children, log))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
