"""Does the return prefer the direct style to slower ones, and over how many steps must rewards be summed until it does.

No model takes part: the demonstrations of a workspace are labelled over several horizons, and every return of a direct
window is compared with that of the most similar state of a slower style
(:func:`wav.evaluation.instruments.futures.direct_ahead`). Below one half, whoever searches for higher returns dawdles.
Past an episode's end labels hold its last reward, with what the last motion cost; ``at_rest`` holds it without::

    python -m benchmarks.studies.horizon benchmarks/results/horizon.json . workspaces/libero-cpu
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.counting import machine
from wav.config import load_settings
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.evaluation.instruments.futures import direct_ahead
from wav.io.files import write_json
from wav.rewards.label import returns

HORIZONS = (15, 30, 45, 60, 90, 120)
WINDOWS = 1000  #: direct windows that are compared, at most


def compared(workspace: Path) -> dict[str, Any]:
    """Shares of like states in which the direct style's return is higher, by horizon and style."""
    settings, data = load_settings(workspace / "params.yaml"), workspace / "data"
    store = EpisodeStore.open(data / "episodes")
    latents, rewards = LatentStore.open(data / "latents", store), RewardStore.open(data / "rewards", store)
    each = [np.asarray(values[:, :-1], np.float64) for values in map(rewards.episode, range(len(store)))]
    gamma = settings.label_rewards.gamma

    def shares(at_rest: bool) -> dict[str, dict[str, float]]:
        found = {}
        for horizon in HORIZONS:
            # costs are negative, and all are of motion
            held = [(np.maximum(terms[-1], 0) if at_rest else terms[-1]).sum() for terms in each]
            past = [np.append(terms.sum(1), np.full(horizon, rest)) for terms, rest in zip(each, held, strict=True)]
            summed = [returns(reward, gamma, horizon)[:-horizon] for reward in past]
            found[str(horizon)] = direct_ahead(store, latents, np.concatenate(summed)[:, None], WINDOWS)
        return found

    styles = np.array([info.style for info in store.episodes])
    frames = np.array([info.length for info in store.episodes])
    return {
        "suite": settings.data.suite,
        "tasks": list(settings.data.tasks),
        "episodes": {name: int((styles == name).sum()) for name in np.unique(styles)},
        "steps": {name: float(frames[styles == name].mean() - 1) for name in np.unique(styles)},
        "share_of_windows": {name: float(frames[styles == name].sum() / frames.sum()) for name in np.unique(styles)},
        "direct_ahead": shares(at_rest=False),
        "at_rest": shares(at_rest=True),
    }


def main() -> None:
    """Compare, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="file to write")
    parser.add_argument("workspaces", nargs="+", type=Path, help="with data/episodes, data/rewards and data/latents")
    chosen = parser.parse_args()
    found = [compared(workspace) for workspace in chosen.workspaces]
    result = {"command": "python -m benchmarks.studies.horizon", "machine": machine(), "workspaces": found}
    write_json(chosen.json, result)


if __name__ == "__main__":
    main()
