"""What the model imagines beside what happened (the paper's Fig. 8, 9), and futures that were chosen and rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from wav import plots
from wav.config import Settings
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.data.windows import split_episodes
from wav.evaluation.held_out import held_out_share, held_out_values, observed
from wav.evaluation.pictures import evenly
from wav.io.files import write_bytes
from wav.planning.scores import phi
from wav.planning.types import Gaussian, RowKey, SeededNoise
from wav.policy.policy import Policy

EPISODES = 4


def held_out(store: EpisodeStore) -> list[int]:
    """Indices of the episodes that no training stage saw, one of each task at least."""
    return [int(index) for index in split_episodes(store, "validation", held_out_share(store))]


def truth(policy: Policy, store: EpisodeStore, rewards: RewardStore, settings: Settings, out: Path) -> list[Any]:
    """Predicted return and frames along held-out demonstrations beside the real ones, as JSON, plot and pictures.

    ``out/truth/EPISODE/`` gets the pictures of imagined below real frames, ``out/plots/value-truth.png`` the returns.
    """
    held = [i for i in held_out(store) if store.episodes[i].success]
    found = []
    for index in [held[i] for i in evenly(len(held), EPISODES)]:
        row = held_out_values(policy, store, rewards, settings, out / "truth" / str(index), index)
        rank = spearmanr(row["predicted_value"], row["real_value"]).statistic
        found.append(
            row | {"index": index, "style": store.episodes[index].style, "spearman": float(np.nan_to_num(rank))}
        )
    lines = {}
    for row in found:
        label = f"{row['task']} {row['index']}, {row['style']}"
        lines |= {f"{label}, predicted": row["predicted_value"], f"{label}, real": row["real_value"]}
    picture = plots.curves(lines, title="Return along held-out demonstrations", xlabel="policy call", ylabel="return")
    (out / "plots").mkdir(parents=True, exist_ok=True)
    write_bytes(out / "plots" / "value-truth.png", picture)
    return found


def chosen_and_rejected(policy: Policy, store: EpisodeStore, out: Path, episodes: int = 2) -> None:
    """Imagined futures of the best, the middle and the worst candidate at a held-out demonstration's first state.

    One row each in ``out/futures-I.png``, the real future of the demonstration below them; the first view is shown.
    """
    settings, view = policy.planner.model_copy(update={"iterations": 1}), policy.data.views[0]
    planner, shapes = policy.make_planner(settings), policy.model.shapes
    for number, index in enumerate(held_out(store)[:episodes]):
        episode, stride, frames = store[index], policy.data.frame_stride, policy.data.future_frames
        noise = SeededNoise([RowKey(0, f"futures/{index}", 0)], policy.model.device)
        with torch.inference_mode():
            context = policy.context([[observed(episode, 0, policy.data.views)]])
            draws = noise("act.video", shapes.video), noise("act.value", shapes.value or ())
            (search,) = planner.search(context, noise, *(Gaussian.standard(z) for z in draws))
            scores = phi(search.scores, settings)[0]
            order = scores.argsort(descending=True).tolist()
            rows, names = [], []
            for name, m in zip(
                ("chosen", "middle", "rejected"), (order[0], order[len(order) // 2], order[-1]), strict=True
            ):
                future = policy.model.denoise_video(context, search.z_video[:, m], settings.denoise_steps)
                rows.append(list(policy.decode_future(future[0].float().cpu().numpy())[0]))
                names.append(f"{name}\n{float(scores[m]):.3f}")
        at = np.minimum(stride * (1 + np.arange(frames)), episode.length - 1)
        rows.append([np.asarray(episode.images[view][t]) for t in at])
        title = f"{episode.instruction}: imagined, scored by {settings.score}"
        strip = plots.image_strip(rows, [f"step {t}" for t in at], title, [*names, "real"])
        write_bytes(out / f"futures-{number + 1}.png", strip)
