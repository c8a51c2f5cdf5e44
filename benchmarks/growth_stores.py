"""How opening the stores and drawing batches grow with the number of episodes: seconds and memory.

Simulated stores: a manifest as ingest writes it and sparse files of zeros, so no pixel is made and no disk is filled.
Each size runs in a process of its own, whose peak memory is what the operating system says it was (files that are
mapped and read count, too, but not of statistics, which read everything: there it is what the process holds itself):

    python benchmarks/growth_stores.py --json benchmarks/results/growth-stores.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from counting import machine, measured_alone, watched, write_result
from fitting import fit_exponent

from wav.config import DataSettings
from wav.data import latents as latent_store
from wav.data.conventions import Conventions
from wav.data.latents import LatentStore
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import FORMAT, VERSION, EpisodeStore, field, shard_folder
from wav.data.streams import StreamSampler
from wav.data.table import FILE, EpisodeInfo, TableWriter
from wav.data.windows import BatchSampler, WindowDataset
from wav.io.files import FileRecord, file_digest, manifest_data, write_json

DATA = DataSettings(image_height=16, image_width=16, views=("agentview",))
ROWS = {"image": (1, 1, 1, 1), "clip": (1, 1, 1, 1, 1)}
FRAMES, SHARD_EPISODES, BATCH, STREAMS = 20, 1000, 256, 8
COSTS = ("open_seconds", "open_mib", "windows_seconds", "windows_mib", "first_batch_seconds", "batch_milliseconds")
COSTS += ("streams_first_seconds", "streams_milliseconds", "statistics_seconds")


def sparse(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> FileRecord:
    """An array file of zeros that takes no disk."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fields = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, fields)
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return FileRecord(name, path.stat().st_size, "0" * 64)


def simulate(folder: Path, episodes: int) -> None:
    """An episode store and its latents below ``folder``."""
    records: list[FileRecord] = []
    latents: list[FileRecord] = []
    shards, table = [], TableWriter()
    for shard, start in enumerate(range(0, episodes, SHARD_EPISODES)):
        count = min(SHARD_EPISODES, episodes - start)
        for index in range(start, start + count):
            whole = f"tabletop/lift_red_cube/{index:07d}"
            texts = ("lift_red_cube", "lift the red cube", "simulated", "direct")
            table.add(EpisodeInfo(whole, *texts, shard, FRAMES, index, 0, True, False, False))
        rows, name = count * FRAMES, shard_folder(shard)
        shards.append({"key": "", "rows": rows})
        for file, row in (("images.agentview", (16, 16, 3)), ("state", (8,)), ("actions", (7,))):
            dtype = np.uint8 if file.startswith("images.") else "f4"
            records.append(sparse(folder / "episodes", f"{name}/{file}.npy", (rows, *row), dtype))
        for kind, row in ROWS.items():
            latents.append(sparse(folder / "latents", f"{name}/{kind}.npy", (rows, *row), "f4"))
    table.write(folder / "episodes")
    path = folder / "episodes" / FILE
    records.append(FileRecord(FILE, path.stat().st_size, file_digest(path)))
    statistics = {
        name: compute_statistics(np.random.default_rng(0).normal(size=(50, size)).astype(np.float32), "quantile")
        for name, size in (("action", 7), ("state", 8))
    }
    Statistics(statistics).save(folder / "episodes" / "statistics.json")
    write_json(folder / "episodes" / "quarantine.json", [])
    content = {"conventions": Conventions.for_simulator(DATA).to_json(), "texts": table.texts}
    write_json(folder / "episodes" / "manifest.json", manifest_data(FORMAT, VERSION, records, content))
    latents.append(sparse(folder / "latents", "text.npy", (2, DATA.text_tokens, 4), "f4"))
    latents.append(sparse(folder / "latents", "text_mask.npy", (2, DATA.text_tokens), np.bool_))
    content = {
        "episodes": "",
        "codec": "",
        "text": "",
        "text_tokens": DATA.text_tokens,
        "instructions": ["", "lift the red cube"],
        "shards": shards,
        "views": list(DATA.views),
        "stride": DATA.frame_stride,
        "future_frames": DATA.future_frames,
        "psnr": {},
        **ROWS,
    }
    write_json(
        folder / "latents" / "manifest.json", manifest_data(latent_store.FORMAT, latent_store.VERSION, latents, content)
    )


def peak_mib() -> float:
    """Largest memory of this process so far (getrusage's would count what its parent had before)."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 2**10


def measure(folder: Path) -> dict[str, float]:
    """Open the stores, make the training windows and draw batches."""
    before, began = peak_mib(), time.process_time()
    episodes = EpisodeStore.open(folder / "episodes")
    opened, mib = time.process_time(), peak_mib()
    windows = WindowDataset(episodes, LatentStore.open(folder / "latents"), None, DATA, "train", 0.05)
    made, windows_mib = time.process_time(), peak_mib()
    sampler = BatchSampler(len(windows), BATCH, seed=0)
    sampler.indices(0)
    first = time.process_time()
    for step in range(1, 101):
        sampler.indices(step)
    steps = time.process_time()
    streams = StreamSampler(windows.shards, BATCH, seed=0, streams=STREAMS if len(windows.shards) >= STREAMS else 1)
    streams.indices(0)
    first_mixed = time.process_time()
    for step in range(1, 101):
        streams.indices(step)
    mixed = time.process_time()
    peak, rows = peak_mib(), [field(episodes.episodes, n, episodes.path.joinpath, (None,)) for n in ("labels", "state")]
    counted = watched(lambda: [compute_statistics(part, "quantile") for part in rows])
    return {
        "open_seconds": opened - began,
        "open_mib": mib - before,
        "windows_seconds": made - opened,
        "windows_mib": windows_mib - mib,
        "first_batch_seconds": first - made,
        "batch_milliseconds": (steps - first) * 10,
        "streams_first_seconds": first_mixed - steps,
        "streams_milliseconds": (mixed - first_mixed) * 10,
        "peak_mib": peak,
        "statistics_seconds": counted["seconds"],
        "statistics_mib": counted["mib"],
        "manifest_mib": sum((folder / "episodes" / name).stat().st_size for name in ("manifest.json", FILE)) / 2**20,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--episodes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    before, points = machine(), []
    for episodes in arguments.episodes:
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder), episodes)
            points.append({"episodes": episodes, **measured_alone(__file__, folder)})
        print(json.dumps(points[-1]), flush=True)
    x = [point["episodes"] for point in points]
    fits = {}
    for cost in COSTS if len(x) > 1 else ():
        exponent, fit = fit_exponent(x, [max(point[cost], 1e-6) for point in points])
        fits[cost] = {"exponent": round(exponent, 2), "r_squared": round(fit, 3)}
    print(json.dumps(fits))
    write_result(arguments.json, {"machine": before, "frames": FRAMES, "batch": BATCH, "points": points, "fits": fits})


if __name__ == "__main__":
    main()
