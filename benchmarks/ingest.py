"""Data before training: reading, labelling and encoding a dataset, and gathering training samples from what they made.

Plain is what a trainer does that keeps no store: each sample's frames decoded from the videos when it is needed, each
image's reward terms and each window's latents computed alone. Ours reads, labels and encodes every episode once, in
batches, and gathers samples from memory-mapped arrays. Growth: seconds and peak memory of each stage against the number
of episodes, in processes of their own. The dataset is a generated one in LeRobot's format (v3.0, mp4)::

    python -m benchmarks.ingest --json benchmarks/results/ingest-cpu.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.counting import machine, write_result
from benchmarks.fitting import fit_exponent
from tests.data.sources.datasets import lerobot_dataset, libero_episodes
from wav.config import DataSettings, EncodeSettings, IngestSettings, LabelRewardsSettings
from wav.data.encode import build_text_encoder, codec_of, encode_store, fit_codec
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.sources.options import LeRobotOptions
from wav.data.store import EpisodeStore
from wav.data.windows import BatchSampler, WindowDataset
from wav.ingest import ingest
from wav.rewards.label import label_store
from wav.rewards.ssim import ssim
from wav.rewards.terms import mse

COUNTS = (32, 128, 512, 1024)
STAGES = ("ingest", "label_rewards", "encode")
KEYS = ("observation.images.image", "observation.images.image2")
FPS = 20
DATA = DataSettings(suite="libero_object", tasks=(), image_height=32, image_width=32, action_chunk=8, render="full")
ENCODE = EncodeSettings(channels=16, fit_frames=200)


def cpu_seconds() -> float:
    """CPU time of this process and of those it waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


class OwnMemory:
    """Largest memory of this process that is not pages of mapped files, which the kernel takes back when it wants."""

    def __enter__(self) -> OwnMemory:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            own = next(line for line in lines if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, 1024 * int(own.split()[1]))
            if self._done.wait(0.02):
                return


def stage(name: str, root: Path) -> dict[str, Any]:
    """Run one stage on a folder that holds ``dataset`` and what earlier stages made; seconds and peak memory."""
    before = cpu_seconds()
    with OwnMemory() as memory:
        run_stage(name, root)
    episodes = len(EpisodeStore.open(root / "episodes"))
    return {"episodes": episodes, "seconds": cpu_seconds() - before, "bytes": memory.bytes}


def run_stage(name: str, root: Path) -> None:
    """The stage itself, in this process."""
    if name == "ingest":
        settings = IngestSettings(
            source="lerobot",
            path=str(root / "dataset"),
            min_length=4,
            lerobot=LeRobotOptions(image_rotation="180"),
            episodes_per_task=max(COUNTS),
        )
        ingest(DATA, settings, root / "episodes", workers=1)
    elif name == "label_rewards":
        label_store(EpisodeStore.open(root / "episodes"), LabelRewardsSettings(), DATA.action_chunk, root / "rewards")
    else:
        episodes = EpisodeStore.open(root / "episodes")
        text = build_text_encoder(ENCODE, DATA, episodes.instructions, root / "encoder")
        encode_store(episodes, fit_codec(episodes, DATA, ENCODE), text, DATA, root / "latents")


def growth(folder: Path, counts: list[int], steps: int) -> dict[str, Any]:
    """Every stage against the number of episodes, each in a process of its own."""
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in STAGES}
    for count in counts:
        root = folder / str(count)
        lerobot_dataset(root / "dataset", libero_episodes(count, steps), "v3.0", FPS)
        for name in STAGES:
            command = [sys.executable, "-m", "benchmarks.ingest", "--stage", name, "--folder", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            points[name].append(json.loads(done.stdout.splitlines()[-1]))
            if points[name][-1]["episodes"] != count:
                raise RuntimeError(f"{name}: {points[name][-1]['episodes']} of {count} episodes came through")
    found: dict[str, Any] = {}
    for name, row in points.items():
        found[name] = {"points": row, "frames_per_second": counts[-1] * steps / row[-1]["seconds"]}
        for cost in ("seconds", "bytes"):
            exponent, fit = fit_exponent(counts, [p[cost] for p in row])
            found[name][cost] = {"exponent": exponent, "r2": fit}
        spread = (counts[-1] - counts[0]) * steps
        found[name]["seconds_per_frame"] = (row[-1]["seconds"] - row[0]["seconds"]) / spread
    return found


class Decoded:
    """Frames of the dataset's videos, decoded when asked for."""

    def __init__(self, dataset: Path) -> None:
        self.files = [dataset / "videos" / key / "chunk-000" / "file-000.mp4" for key in KEYS]

    def at(self, rows: list[int]) -> np.ndarray:
        """(views, n, H, W, 3) uint8 of frames counted over the whole file."""
        views = []
        for file in self.files:
            with av.open(str(file)) as container:
                stream = container.streams.video[0]
                container.seek(int(min(rows) / FPS / stream.time_base), stream=stream)
                found: dict[int, np.ndarray] = {}
                for frame in container.decode(stream):
                    number = round(float(frame.pts * stream.time_base) * FPS)
                    if number in rows:
                        found[number] = frame.to_ndarray(format="rgb24")
                    if number >= max(rows):
                        break
            views.append(np.stack([found[row] for row in rows]))
        return np.stack(views)


def best(run: Any, rounds: int = 3) -> tuple[float, Any]:
    """Best CPU seconds of a call, and its result."""
    seconds, result = float("inf"), None
    for _ in range(rounds):
        before = cpu_seconds()
        result = run()
        seconds = min(seconds, cpu_seconds() - before)
    return max(seconds, 1e-4), result


def compare(root: Path, batch: int) -> dict[str, Any]:
    """Plain beside ours: gathering samples, labelling, encoding; largest difference of the results."""
    episodes = EpisodeStore.open(root / "episodes")
    latents, rewards = LatentStore.open(root / "latents", episodes), RewardStore.open(root / "rewards", episodes)
    windows = WindowDataset(episodes, latents, rewards, DATA, "train", 0.0)
    sampler, decoded, codec = BatchSampler(len(windows), batch, 0), Decoded(root / "dataset"), codec_of(latents)
    offsets = episodes.offsets

    def clip_rows(row: int) -> list[int]:
        last = int(offsets[np.searchsorted(offsets, row, side="right")]) - 1
        return [min(row + DATA.frame_stride * i, last) for i in range(1, DATA.future_frames + 1)]

    ours = windows.at(sampler, 0)
    rows = [int(offsets[e] + s) for e, s in zip(ours.episode.tolist(), ours.step.tolist(), strict=True)]

    def plain_samples() -> np.ndarray:
        future = [codec.encode_clips(decoded.at(clip_rows(row))) for row in rows]
        for row in rows:
            codec.encode_frames(decoded.at([row])[:, 0])  # the memory's newest frame; the earlier ones are not counted
        return np.stack(future)

    gather, _ = best(lambda: windows.at(sampler, 0))
    decode, future = best(plain_samples, 1)
    frames = np.asarray(episodes[0].images[episodes.conventions.views[0]])
    goal = frames[-1]
    labelled, terms = best(lambda: np.stack([ssim(frames, goal), mse(frames, goal)]))
    alone, same = best(lambda: np.stack([[_only(ssim(f[None], goal)), _only(mse(f[None], goal))] for f in frames]).T)
    together, many = best(lambda: codec.encode_frames(frames))
    singly, single = best(lambda: np.concatenate([codec.encode_frames(frame[None]) for frame in frames]))

    def row_of(plain: float, fast: float, off: float, what: str) -> dict[str, Any]:
        return {"plain_seconds": plain, "ours_seconds": fast, "ratio": plain / fast, "max_abs_diff": off, "what": what}

    return {
        "samples": row_of(
            decode, gather, float(np.abs(future - ours.future.numpy()).max()), f"{batch} training samples"
        ),
        "labelling": row_of(alone, labelled, float(np.abs(terms - same).max()), f"{len(frames)} images"),
        "encoding": row_of(singly, together, float(np.abs(many - single).max()), f"{len(frames)} frames of one view"),
    }


def _only(values: np.ndarray) -> float:
    """The number of an array of one."""
    return float(values[0])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of episodes")
    parser.add_argument("--steps", type=int, default=24, help="steps of an episode")
    parser.add_argument("--batch", type=int, default=8, help="training samples that are gathered")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone and print its cost (used by itself)")
    parser.add_argument("--folder", type=Path, help="where --stage works")
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(stage(arguments.stage, arguments.folder)))
        return
    begun, before = time.perf_counter(), machine()
    with tempfile.TemporaryDirectory() as name:
        grown = growth(Path(name), arguments.counts, arguments.steps)
        compared = compare(Path(name) / str(arguments.counts[-1]), arguments.batch)
    for part, row in compared.items():
        print(
            f"{part:10} plain {row['plain_seconds']:.4f} s, ours {row['ours_seconds']:.4f} s for {row['what']}: "
            f"ratio {row['ratio']:.1f}, largest difference {row['max_abs_diff']:.1e}"
        )
    for part, row in grown.items():
        points = ", ".join(f"{p['episodes']}: {p['seconds']:.2f} s {p['bytes'] / 2**20:.0f} MiB" for p in row["points"])
        seconds, memory = row["seconds"]["exponent"], row["bytes"]["exponent"]
        print(
            f"{part:14} time ~ episodes^{seconds:.2f}, memory ~ episodes^{memory:.3f}; "
            f"{1e3 * row['seconds_per_frame']:.2f} ms a frame ({points})"
        )
    result: dict[str, Any] = {
        "ratio": min(row["ratio"] for row in compared.values()),
        "max_abs_diff": max(row["max_abs_diff"] for row in compared.values()),
        "plain_seconds": sum(row["plain_seconds"] for row in compared.values()),
        "ours_seconds": sum(row["ours_seconds"] for row in compared.values()),
        "compared": compared,
        "growth": grown,
        "sizes": {
            "episodes": list(arguments.counts),
            "steps": arguments.steps,
            "image": [DATA.image_height, DATA.image_width],
        },
        "threads": 1,
        "machine": before,
        "wall_seconds": time.perf_counter() - begun,
    }
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
