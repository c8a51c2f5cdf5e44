"""Stage ``ingest``: demonstrations from a source into ``data/episodes/``, with statistics and a quarantine report."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from prefect import flow

from flows.artifacts import Progress, pictured, publish_images, publish_numbers, publish_table
from flows.common import StageRun, finish, main, start, step
from wav import plots
from wav.data.store import EpisodeStore
from wav.ingest import ingest as ingest_episodes
from wav.io.files import write_bytes, write_json

STRIP_FRAMES = 8


@step("collect demonstrations")
def collect(run: StageRun) -> None:
    """Run the source into the episode store, with progress."""
    with Progress("demonstrations", run.logger) as progress, run.cluster() as cluster:

        def callback(done: int, total: int, accepted: int) -> None:
            progress(done, total, f"{accepted} accepted")

        ingest_episodes(
            run.settings.data,
            run.settings.ingest,
            run.path("data/episodes"),
            workers=run.runtime.workers,
            callback=callback,
            run=cluster and cluster.mapper(in_child=True),
        )


@step("describe episodes")
def describe(run: StageRun) -> None:
    """Numbers, the quarantine list and one strip of frames for each of the tasks, up to a limit."""
    store, folder = EpisodeStore.open(run.path("data/episodes")), run.path("reports/ingest")
    metrics = {
        "episodes": len(store.episodes),
        "frames": store.frames,
        "rejected": len(store.rejected),
        "success_rate": round(float(np.mean([info.success for info in store.episodes])), 4),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for task_name, index in pictured(store).items():
        episode = store[index]
        steps = np.linspace(0, episode.length - 1, STRIP_FRAMES).round().astype(int)
        rows = [[images[step] for step in steps] for images in episode.images.values()]
        labels = [f"step {step}" for step in steps]
        pictures[task_name] = plots.image_strip(rows, labels, f"{task_name}: {episode.instruction}")
        write_bytes(folder / "pictures" / f"{task_name}.png", pictures[task_name])
    write_json(folder / "metrics.json", metrics)
    publish_numbers("metrics", metrics, "demonstrations")
    rejected = [asdict(rejection) for rejection in store.rejected]
    publish_table("quarantine", rejected or [{"episode": "none"}], "rejected episodes")
    publish_images("frames", pictures, "one demonstration per task")


@flow(name="ingest")
def ingest(workspace: str = ".") -> None:
    """Make ``data/episodes/``."""
    run = start("ingest", workspace)
    collect(run)
    describe(run)
    finish(run, [run.path("reports/ingest"), run.path("data/episodes/manifest.json")])


if __name__ == "__main__":
    raise SystemExit(main(ingest))
