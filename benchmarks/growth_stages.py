"""How the data stages grow with the number of short episodes: processor time and memory of ingest, labels and latents.

Generated episodes with small frames, through the stages' own work: a dataset is read in jobs, staged and linked into a
store; each of its shards is labelled and encoded. Then a thousand more episodes come (``more``), with the codec kept.
Each size runs in a process of its own; memory is what the process holds itself, without pages of mapped files, which
the kernel takes back when it wants::

    python benchmarks/growth_stages.py --json benchmarks/results/growth-stages.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from counting import machine, measured_alone, watched, write_result
from fitting import fit_exponent

from wav.config import DataSettings, EncodeSettings, IngestSettings, LabelRewardsSettings
from wav.data.conventions import Conventions
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.episode import Episode
from wav.data.sources.staging import DatasetSource, Job
from wav.data.store import EpisodeStore
from wav.ingest import ingest
from wav.rewards.label import label_store
from wav.shards import grouped

STEPS, SIZE, MORE = 10, 16, 1_000
DATA = DataSettings(image_height=SIZE, image_width=SIZE, future_frames=5, frame_stride=1, action_chunk=4, text_tokens=8)
ENCODE = EncodeSettings(patch=8, channels=12, text_dim=16)
STAGES = ("ingest", "label_rewards", "encode")


def episode(index: int) -> Episode:
    """Noise of the right shapes."""
    rng = np.random.default_rng(index)
    images = {view: rng.integers(0, 256, (STEPS, SIZE, SIZE, 3), np.uint8) for view in DATA.views}
    state, actions = (rng.uniform(-1, 1, (STEPS, size)).astype(np.float32) for size in (8, 7))
    whole = (f"lift/{index:07d}", "lift", "lift it", images, state, None, actions, None, True, index, 0, "generated")
    return Episode(*whole)


def read(start: int, stop: int) -> Iterator[Episode]:
    """A job of the dataset."""
    yield from map(episode, range(start, stop))


class Generated(DatasetSource):
    """A dataset that came in parts of so many episodes."""

    def __init__(self, *parts: int) -> None:
        super().__init__(DATA, IngestSettings())
        self.parts = parts

    def conventions(self) -> Conventions:
        """The simulator's."""
        return Conventions.for_simulator(DATA)

    def jobs(self) -> list[Job]:
        """128 MiB of pixels each, as the readers' own; a part has its own jobs, as a file has."""
        size, found, first = STEPS * SIZE * SIZE * 3 * len(DATA.views), [], 0
        for part in self.parts:
            for group in grouped([size] * part):
                span = (first + group.start, first + group.stop)
                what: dict[str, Any] = {"label": str(span), "files": [], "identity": span, "episodes": len(group)}
                found.append(self.job(read, span, size * len(group), **what))
            first += part
        return found

    def describe(self) -> dict[str, Any]:
        """Nothing of interest."""
        return {}


def measure(count: int) -> dict[str, Any]:
    """Ingest so many episodes, label and encode them; then the same with ``MORE`` more."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        parts: list[Any] = []

        def read_all(*come: int) -> None:
            ingest(DATA, IngestSettings(), root / "episodes", workers=1, source=Generated(*come))

        def label() -> None:
            store = EpisodeStore.open(root / "episodes")
            label_store(store, LabelRewardsSettings(), DATA.action_chunk, root / "rewards")

        def encode() -> None:
            store = EpisodeStore.open(root / "episodes")
            if not parts:
                parts.append(fit_codec(store, DATA, ENCODE))
                parts.append(build_text_encoder(ENCODE, DATA, store.instructions, root / "text"))
            encode_store(store, *parts, DATA, root / "latents")

        works = (lambda: read_all(count), label, encode)
        found: dict[str, Any] = {stage: watched(work) for stage, work in zip(STAGES, works, strict=True)}
        shards = len(EpisodeStore.open(root / "episodes").shard_rows)
        works = (lambda: read_all(count, MORE), label, encode)
        more = {stage: watched(work) for stage, work in zip(STAGES, works, strict=True)}
    return {"shards": shards, **found, "more": more}


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
    sizes = {"steps": STEPS, "frame": SIZE, "views": len(DATA.views), "more": MORE}
    before, points = machine(), []
    for count in arguments.episodes:
        points.append({"episodes": count, **measured_alone(__file__, str(count))})
        print(json.dumps(points[-1]), flush=True)
        fits = {}
        for stage in STAGES if len(points) > 1 else ():
            for cost in ("seconds", "mib"):
                exponent, fit = fit_exponent([p["episodes"] for p in points], [p[stage][cost] for p in points])
                fits[f"{stage}_{cost}"] = {"exponent": round(exponent, 2), "r_squared": round(fit, 3)}
        write_result(arguments.json, {"machine": before, **sizes, "points": points, "fits": fits})
    print(json.dumps(fits))


if __name__ == "__main__":
    main()
