"""Stage ``encode``: frames to latents and instructions to embeddings, once, into ``data/latents/``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from prefect import flow

from flows.artifacts import Progress, publish_images, publish_numbers
from flows.common import StageRun, finish, main, start, step
from wav import plots
from wav.codec import psnr
from wav.data.encode import build_text_encoder, codec_of, encode_store, fit_codec
from wav.data.latents import LatentStore
from wav.data.store import EpisodeStore
from wav.io.files import write_bytes, write_json

PICTURED_FRAMES = 6


@step("encode frames and instructions")
def encode_all(run: StageRun) -> None:
    """Fit or load the codec and the text encoder, then encode the whole store, with progress."""
    data, settings = run.settings.data, run.settings.encode
    episodes = EpisodeStore.open(run.path("data/episodes"))
    episodes.verify()
    run.logger.info("codec %s: fitting or loading", settings.codec)
    device = run.runtime.device if run.gpu else "cpu"
    codec = fit_codec(episodes, data, settings, device)
    with (
        tempfile.TemporaryDirectory(dir=run.scratch("text")) as folder,
        Progress("latents", run.logger) as progress,
        run.cluster() as cluster,
    ):
        text = build_text_encoder(settings, data, episodes.instructions, Path(folder) / "encoder")
        encode_store(
            episodes,
            codec,
            text,
            data,
            run.path("data/latents"),
            progress=progress,
            run=cluster and cluster.mapper(gpu=run.gpu),
            device=device,
        )


@step("picture reconstructions")
def picture(run: StageRun) -> None:
    """Reconstruction quality (PSNR, dB) of held frames, in numbers and pictures."""
    episodes, folder = EpisodeStore.open(run.path("data/episodes")), run.path("reports/encode")
    latents = LatentStore.open(run.path("data/latents"), episodes)
    codec = codec_of(latents)
    rows = np.linspace(0, episodes.frames - 1, PICTURED_FRAMES).round().astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, quality = {}, {}
    for index, view in enumerate(run.settings.data.views):
        images = np.asarray(episodes.images(view, rows))
        decoded = codec.decode_frames(latents.image[rows][:, index])
        quality[view] = round(float(psnr(decoded, images)), 3)
        pictures[view] = plots.reconstruction(images, decoded, f"{view}: frames and their reconstructions")
        write_bytes(folder / "pictures" / f"reconstruction-{view}.png", pictures[view])
    shape = [int(n) for n in latents.image.shape]
    metrics = {"frames": shape[0], "psnr_pictured": quality, "psnr": latents.psnr, "latent_shape": str(shape[1:])}
    write_json(folder / "metrics.json", metrics)
    publish_numbers("metrics", metrics, "latents and reconstruction quality (dB)")
    publish_images("reconstruction", pictures, "frames above, reconstructions below")


@flow(name="encode")
def encode(workspace: str = ".") -> None:
    """Make ``data/latents/``."""
    run = start("encode", workspace)
    encode_all(run)
    picture(run)
    finish(run, [run.path("reports/encode"), run.path("data/latents/manifest.json")])


if __name__ == "__main__":
    raise SystemExit(main(encode))
