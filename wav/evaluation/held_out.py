"""What the model predicts along an expert episode that training never saw, beside what really happened.

The policy is called at every ``execute_steps``-th step of a held-out demonstration, as it would be while acting, but
the expert's actions are what happened next. Written: ``values.json`` and pictures of predicted and real frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.codec.base import psnr
from wav.config import DataSettings
from wav.data.episode import Episode
from wav.data.names import own_task
from wav.data.store import EpisodeStore
from wav.data.windows import split_episodes
from wav.errors import DataError
from wav.evaluation import pictures
from wav.evaluation.evaluate import EvaluationSettings
from wav.io.files import write_json
from wav.policy.policy import Policy
from wav.sim.env import Observation

if TYPE_CHECKING:
    from wav.data.reward_store import RewardStore

_ROW = "held-out"
_PICTURED = 3  #: calls, at even distances


def held_out_values(
    policy: Policy,
    store: EpisodeStore,
    rewards: RewardStore | None,
    settings: EvaluationSettings,
    out: Path,
    index: int | None = None,
) -> dict[str, Any]:
    """Walk one stored episode and write ``out/values.json`` and ``out/predictions/*-held-out-*.png``.

    Without ``index`` it is an episode that every training stage held out (for a validation share above 0); ``rewards``
    is None where there is no value expert.

    Returns:
        ``steps`` and, per call, ``predicted_value``, ``real_value`` (returns), and ``psnr`` of the predicted frames
        beside ``psnr_copy`` (the current frame repeated): a predictor that says less than the copy has learned nothing.

    Raises:
        DataError: ``index`` is not in the store.
    """
    if index is None:
        index = held_out_index(store)
    if not 0 <= index < len(store):
        raise DataError(f"held-out episode {index}: the store holds episodes 0..{len(store) - 1}")
    data, episode = settings.data, store[index]
    for old in (out / "predictions").glob(f"*-{_ROW}-*.png"):
        old.unlink()
    steps = list(range(0, episode.length, settings.eval_libero.execute_steps))
    pictured = set(pictures.evenly(len(steps), _PICTURED))
    policy.reset(_ROW, f"held-out/{index}", settings.eval_libero.seed)
    predicted: list[float] = []
    found: dict[str, list[float]] = {"psnr": [], "psnr_copy": []}
    for call, step in enumerate(steps):
        output = policy.act(
            [observed(episode, step, data.views)],
            [_ROW],
            variant="unplanned",
            with_value=rewards is not None,
            with_future=True,
        )
        if output.returns is not None:
            predicted.append(float(output.returns[0][0]))
        real = _future(episode, step, data.views, data.frame_stride, data.future_frames)
        assert output.future is not None
        decoded = policy.decode_future(output.future[0])
        current = np.stack([episode.images[view][step] for view in data.views])[:, None]
        for name, frames in (("psnr", decoded), ("psnr_copy", np.broadcast_to(current, real.shape))):
            found[name].append(min(99.0, psnr(frames, real)))
        if call in pictured:
            pictures.write_prediction(_picture(data, episode, out, f"step{step:03d}"), real, decoded)
    _imagine(policy, settings, episode, out)
    result: dict[str, Any] = {
        "suite": data.suite,
        "task": episode.task,
        "episode": episode.episode_id,
        "steps": steps,
        "predicted_value": predicted,
        "real_value": [] if rewards is None else [float(v) for v in rewards.episode(index)[steps, -1]],
        **found,
    }
    write_json(out / "values.json", result)
    return result


def _imagine(policy: Policy, settings: EvaluationSettings, episode: Episode, out: Path) -> None:
    """Picture ``eval_libero.video_chunks`` chunks rolled out from the episode's first frame, each from the last."""
    data, chunks = settings.data, settings.eval_libero.video_chunks
    first = observed(episode, 0, data.views)
    imagined = policy.generate_video(first, chunks, seed=settings.eval_libero.seed, episode=_ROW)[:, 1:]
    real = _future(episode, 0, data.views, data.frame_stride, imagined.shape[1])
    pictures.write_prediction(_picture(data, episode, out, "imagined"), real, imagined)


def _picture(data: DataSettings, episode: Episode, out: Path, what: str) -> Path:
    suite, task = own_task(data.suite, episode.task)
    return out / "predictions" / f"{suite}-{_ROW}-{task}-{what}.png"


def held_out_share(store: EpisodeStore) -> float:
    """The validation share that holds out one episode of each task, as any training does that holds out as many."""
    tasks = len({info.task for info in store.episodes})
    return min(tasks, len(store) - 1) / len(store)


def held_out_index(store: EpisodeStore) -> int:
    """The first successful episode among those that any validation share above 0 holds out, else the first of them."""
    held = [int(index) for index in split_episodes(store, "validation", 1e-9)]
    return next((i for i in held if store.episodes[i].success), held[0])


def observed(episode: Episode, step: int, views: tuple[str, ...]) -> Observation:
    """What the policy would have seen at ``step``."""
    images = {view: np.asarray(episode.images[view][step]) for view in views}
    return Observation(images, np.asarray(episode.state[step]), episode.instruction)


def _future(episode: Episode, step: int, views: tuple[str, ...], stride: int, count: int) -> NDArray[np.uint8]:
    """The frames (V, F, H, W, 3) that followed, the last one repeated past the end as in training."""
    at = np.minimum(step + stride * (1 + np.arange(count)), episode.length - 1)
    return np.stack([np.asarray(episode.images[view][at]) for view in views])
