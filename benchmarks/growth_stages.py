"""How the data stages grow with the number of short episodes: processor time and memory of writing, labels and latents.

Generated episodes with small frames. Each size runs in a process of its own; memory is what the process holds itself,
without pages of mapped files, which the kernel takes back when it wants::

    python benchmarks/growth_stages.py --json benchmarks/results/growth-stages.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from counting import machine, measured_alone, watched, write_result
from fitting import fit_exponent

from wav.config import DataSettings, EncodeSettings, LabelRewardsSettings
from wav.data.conventions import Conventions
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.episode import Episode
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.rewards.label import label_store

STEPS, SIZE = 10, 16
DATA = DataSettings(image_height=SIZE, image_width=SIZE, future_frames=5, frame_stride=1, action_chunk=4, text_tokens=8)
ENCODE = EncodeSettings(patch=8, channels=12, text_dim=16)
STAGES = ("write", "label_rewards", "encode")


def episode(index: int) -> Episode:
    """Noise of the right shapes; a thousand different pictures, so that making them costs little."""
    rng = np.random.default_rng(index % 1000)
    images = {view: rng.integers(0, 256, (STEPS, SIZE, SIZE, 3), np.uint8) for view in DATA.views}
    state, actions = (rng.uniform(-1, 1, (STEPS, size)).astype(np.float32) for size in (8, 7))
    whole = (f"lift/{index:07d}", "lift", "lift it", images, state, None, actions, None, True, index, 0, "generated")
    return Episode(*whole)


def measure(count: int) -> dict[str, dict[str, float]]:
    """Write so many episodes, label and encode them."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)

        def write() -> None:
            with EpisodeStoreWriter(root / "episodes", Conventions.for_simulator(DATA)) as writer:
                for index in range(count):
                    writer.add(episode(index))

        found = {"write": watched(write)}
        store = EpisodeStore.open(root / "episodes")
        found["label_rewards"] = watched(
            lambda: label_store(store, LabelRewardsSettings(), DATA.action_chunk, root / "rewards")
        )
        parts = fit_codec(store, DATA, ENCODE), build_text_encoder(ENCODE, DATA, store.instructions, root / "text")
        found["encode"] = watched(lambda: encode_store(store, *parts, DATA, root / "latents"))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--episodes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    before, points = machine(), []
    for count in arguments.episodes:
        points.append({"episodes": count, **measured_alone(__file__, str(count))})
        print(json.dumps(points[-1]), flush=True)
    fits = {}
    for stage in STAGES if len(points) > 1 else ():
        for cost in ("seconds", "mib"):
            exponent, fit = fit_exponent([p["episodes"] for p in points], [p[stage][cost] for p in points])
            fits[f"{stage}_{cost}"] = {"exponent": round(exponent, 2), "r_squared": round(fit, 3)}
    print(json.dumps(fits))
    sizes = {"steps": STEPS, "frame": SIZE, "views": len(DATA.views)}
    write_result(arguments.json, {"machine": before, **sizes, "points": points, "fits": fits})


if __name__ == "__main__":
    main()
