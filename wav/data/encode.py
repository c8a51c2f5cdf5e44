"""Making the latent store: a codec and a text encoder, then every frame, clip and instruction through them.

::

    codec = fit_codec(episodes, settings.data, settings.encode)
    text = build_text_encoder(settings.encode, settings.data, episodes.instructions, folder)
    encode_store(episodes, codec, text, settings.data, "data/latents")
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.codec import Codec, PCACodec, load_codec, psnr
from wav.data.episode_shards import Progress, done, fill, opened
from wav.data.latents import FORMAT, REMEDY, VERSION, FrameGrid, LatentStore, latents_of
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.io.arrays import ArrayWriter, ShardedArray
from wav.io.files import atomic_folder, require_free_space, write_manifest
from wav.seeding import numpy_generator
from wav.shards import Mapper, staging_folder
from wav.text import TextEncoder, build_small

if TYPE_CHECKING:
    from wav.config import DataSettings, EncodeSettings

LTX_HUB_ID = "Lightricks/LTX-Video"

_CHUNK_BYTES = 1 << 26  # raw pixels gathered at once
_FIT_BYTES = 1 << 28  # raw pixels of the clips (and of the frames) a codec is fitted on
_PSNR_FRAMES = 128  # per view
_codec_on = lru_cache(maxsize=1)(load_codec)

#: rows of image.npy (n, V, C, h, w) and of clip.npy (n, V, C, f, h, w)
Block = tuple[NDArray[np.float32], NDArray[np.float32]]


def fit_codec(episodes: EpisodeStore, data: DataSettings, settings: EncodeSettings, device: str = "cpu") -> Codec:
    """The codec that ``settings`` describe: a PCA fitted on frames drawn from the store, the LTX VAE, or a kept one.

    ConfigError where the codec has other sizes, ServiceError for weights that were not fetched.
    """
    if settings.codec == "ltx" or settings.path:
        codec = load_codec(settings.path or LTX_HUB_ID, device)
        for name, have in (("patch", codec.spatial), ("temporal", codec.temporal), ("channels", codec.channels)):
            if getattr(settings, name) != have:
                raise ConfigError(f"encode.{name} = {getattr(settings, name)}: the codec has {have}; set it to {have}")
        return codec
    grid = FrameGrid(data.frame_stride, data.future_frames)
    frame_bytes = data.image_height * data.image_width * 3
    generator = numpy_generator(settings.seed, "codec.fit")
    count = min(settings.fit_frames, max(64, _FIT_BYTES // frame_bytes))
    frames = [episodes.images(view, rows) for view, rows in _draw(episodes, count, generator)]
    count = min(settings.fit_frames, max(64, _FIT_BYTES // (frame_bytes * grid.future_frames)))
    clips = []
    for view, rows in _draw(episodes, count, generator):
        future = _future_rows(episodes, rows, grid)
        clips.append(episodes.images(view, future.reshape(-1)).reshape(*future.shape, *frames[0].shape[1:]))
    return PCACodec.fit(
        np.concatenate(frames),
        np.concatenate(clips),
        patch=settings.patch,
        temporal=settings.temporal,
        channels=settings.channels,
        coordinates=settings.coordinates,
        seed=settings.seed,
    )


def _draw(episodes: EpisodeStore, count: int, generator: np.random.Generator) -> list[tuple[str, NDArray[np.int64]]]:
    """About ``count`` frames in total, the same number from every view: (view, sorted rows)."""
    views = episodes.conventions.views
    share = min(episodes.frames, -(-count // len(views)))
    return [(view, np.sort(generator.choice(episodes.frames, share, replace=False))) for view in views]


def build_text_encoder(
    settings: EncodeSettings, data: DataSettings, instructions: Sequence[str], folder: Path, device: str = "cpu"
) -> TextEncoder:
    """The text encoder that ``settings`` describe; the built-in one is written into ``folder`` first.

    ConfigError where ``encode.text_dim`` is not its width, ServiceError for weights that were not fetched.
    """
    if settings.text == "builtin-small":
        source = str(build_small(folder, instructions, settings.text_dim, settings.seed))
    else:
        source = settings.text
    encoder = TextEncoder.from_pretrained(source, data.text_tokens, device=device)
    if encoder.dim != settings.text_dim:
        raise ConfigError(
            f"encode.text_dim = {settings.text_dim}: {settings.text} has width {encoder.dim}; set it to {encoder.dim}"
        )
    return encoder


def encode_store(
    episodes: EpisodeStore,
    codec: Codec,
    text_encoder: TextEncoder,
    data: DataSettings,
    out: str | Path,
    progress: Progress | None = None,
    instructions: Sequence[str] = (),
    run: Mapper | None = None,
    device: str = "cpu",
) -> LatentStore:
    """Encode a whole episode store into ``out``, atomically and in bounded memory; shards that are there stay.

    ``instructions`` are encoded beside the episodes' own and ""; ``run`` encodes shards elsewhere (:mod:`wav.cluster`),
    where the codec is loaded on ``device``; ``progress`` is told (frames done, frames in total).

    Raises:
        DataError: the store's views or image size are not those of ``data``, a text is too long.
        ConfigError: the text encoder was opened for another ``data.text_tokens``.
        StorageError: the disk is full, or too small for what will be written.
    """
    have = episodes.conventions
    if (have.views, have.image_height, have.image_width) != (tuple(data.views), data.image_height, data.image_width):
        raise DataError(
            f"{episodes.path}: views {have.views} at {have.image_height}x{have.image_width} where data.views and the "
            f"image size say {tuple(data.views)} at {data.image_height}x{data.image_width}; run the ingest stage again"
        )
    if text_encoder.tokens != data.text_tokens:
        raise ConfigError(
            f"data.text_tokens = {data.text_tokens}: the encoder pads to {text_encoder.tokens}; open it with the same"
        )
    out, grid = Path(out), FrameGrid(data.frame_stride, data.future_frames)
    with atomic_folder(out) as folder, _reachable(codec, out, run) as named:
        texts = ("", *sorted({*episodes.instructions, *instructions} - {""}))
        embedding, mask = text_encoder.encode(texts)
        np.save(folder / "text.npy", embedding)
        np.save(folder / "text_mask.npy", mask)
        codec.save(folder / "codec", reference=True)
        text_encoder.save(folder / "text_encoder", reference=True)
        shapes = _rows(episodes, codec, grid)
        shards = fill(
            folder,
            encode_shard,
            episodes,
            (named, grid, device),
            identity=(codec.digest, grid.stride, grid.future_frames),
            out=out,
            version=(FORMAT, VERSION),
            run=run,
            progress=progress,
        )
        latents = {kind: latents_of(folder.joinpath, shards.rows, kind, row) for kind, row in shapes.items()}
        content = {
            "episodes": episodes.digest,
            "codec": codec.digest,
            "text": text_encoder.digest,
            "text_tokens": text_encoder.tokens,
            "instructions": list(texts),
            "shards": shards.content,
            "views": list(have.views),
            "stride": grid.stride,
            "future_frames": grid.future_frames,
            "psnr": _quality(latents, episodes, codec, grid),
            **{kind: list(row) for kind, row in shapes.items()},
        }
        write_manifest(folder, FORMAT, VERSION, content, shards.digests)
    done(out)
    return LatentStore.open(out, episodes)


def _rows(episodes: EpisodeStore, codec: Codec, grid: FrameGrid) -> dict[str, tuple[int, ...]]:
    """Shapes of a row of image.npy and of clip.npy."""
    views, conventions = len(episodes.conventions.views), episodes.conventions
    h, w = (n // codec.spatial for n in (conventions.image_height, conventions.image_width))
    frames = 1 + (grid.future_frames - 1) // codec.temporal
    return {"image": (views, codec.channels, h, w), "clip": (views, codec.channels, frames, h, w)}


@contextmanager
def _reachable(codec: Codec, out: Path, run: Mapper | None) -> Iterator[Codec | str]:
    """What a shard's job needs to have the codec: itself, or the folder it lies in where jobs run elsewhere."""
    if run is None:
        yield codec
        return
    staging = staging_folder(out)
    saved = staging.with_name(f"{staging.name}.codec-{codec.digest[:16]}")  # the name tells apart what it makes
    codec.save(saved, reference=True)
    try:
        yield str(saved)
    finally:
        shutil.rmtree(saved, ignore_errors=True)


def _encoded(episodes: EpisodeStore, which: range, codec: Codec, grid: FrameGrid) -> Iterator[Block]:
    """Latents of the episodes ``which``, a bounded number of frames at a time."""
    views, conventions = episodes.conventions.views, episodes.conventions
    clip_bytes = conventions.image_height * conventions.image_width * 3 * grid.future_frames
    step = max(1, _CHUNK_BYTES // clip_bytes)
    for index in which:
        episode = episodes[index]
        for start in range(0, episode.length, step):
            stop = min(start + step, episode.length)
            rows = grid.rows(start, stop, episode.length)
            frames = [codec.encode_frames(np.asarray(episode.images[v][start:stop])) for v in views]
            clips = [codec.encode_clips(np.asarray(episode.images[v][rows])) for v in views]
            yield np.stack(frames, axis=1), np.stack(clips, axis=1)


def encode_shard(
    path: str,
    digest: str,
    which: range,
    codec: Codec | str,
    grid: FrameGrid,
    device: str,
    folder: str,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Leave the latents of the episodes ``which`` of the store at ``path`` in ``folder``; ``codec`` may be a folder."""
    episodes = opened(path, digest)
    made_by = _codec_on(codec, device) if isinstance(codec, str) else codec
    shapes, rows = _rows(episodes, made_by, grid), sum(episodes.episodes[index].length for index in which)
    with atomic_folder(folder) as new:
        require_free_space(new, 4 * rows * sum(math.prod(row) for row in shapes.values()))
        image_file, clip_file = (ArrayWriter(new / f"{kind}.npy", row, np.float32) for kind, row in shapes.items())
        with image_file, clip_file:
            for image, clip in _encoded(episodes, which, made_by, grid):
                image_file.append(image)
                clip_file.append(clip)
                if progress:
                    progress(len(image))


def _quality(
    latents: Mapping[str, ShardedArray], episodes: EpisodeStore, codec: Codec, grid: FrameGrid
) -> dict[str, dict[str, float]]:
    """PSNR (dB, at most 100) per view of evenly spaced frames and future clips: {"image"|"clip": {view: dB}}."""
    result: dict[str, dict[str, float]] = {"image": {}, "clip": {}}
    for index, view in enumerate(episodes.conventions.views):
        rows = _evenly(episodes.frames, _PSNR_FRAMES)
        decoded = codec.decode_frames(latents["image"][rows][:, index])
        result["image"][view] = round(min(100.0, psnr(decoded, episodes.images(view, rows))), 3)
        rows = _evenly(episodes.frames, max(1, _PSNR_FRAMES // grid.future_frames))
        frames = _future_rows(episodes, rows, grid)
        decoded = codec.decode_clips(latents["clip"][rows][:, index])
        original = episodes.images(view, frames.reshape(-1)).reshape(decoded.shape)
        result["clip"][view] = round(min(100.0, psnr(decoded, original)), 3)
    return result


def _evenly(total: int, count: int) -> NDArray[np.int64]:
    """At most ``count`` evenly spaced rows of ``total``."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def _future_rows(episodes: EpisodeStore, rows: NDArray[np.int64], grid: FrameGrid) -> NDArray[np.int64]:
    """(n, future_frames) rows, in the concatenated order, of the future clips at ``rows`` (n,)."""
    last = episodes.offsets[np.searchsorted(episodes.offsets, rows, side="right")] - 1
    steps = rows[:, None] + grid.stride * np.arange(1, grid.future_frames + 1)
    return np.asarray(np.minimum(steps, last[:, None]))


def codec_of(latents: LatentStore) -> Codec:
    """The codec that made the latents; DataError where the saved one is another."""
    folder = latents.path / "codec"
    codec = load_codec(folder)
    if codec.digest != latents.codec_digest:
        raise DataError(f"{folder}: is not the codec that made the latents; {REMEDY}")
    return codec


def text_encoder_of(latents: LatentStore) -> TextEncoder:
    """The text encoder that made the embeddings; DataError where the saved one is another."""
    folder = latents.path / "text_encoder"
    encoder = TextEncoder.from_pretrained(folder, latents.text_tokens)
    if encoder.digest != latents.text_digest:
        raise DataError(f"{folder}: is not the encoder that made the embeddings; {REMEDY}")
    return encoder
