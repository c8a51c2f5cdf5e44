"""PCA patch codec: a closed-form stand-in for a video VAE, fitted on the data in seconds.

A latent cell is an image patch (or the same patch over ``temporal`` frames) projected on its leading principal
components and whitened. Two bases: one for single images, one for groups of frames; the clip basis is rotated
(orthogonal Procrustes) so that its channels mean what the image basis' channels mean, since one network reads both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from wav.codec.base import CODEC_FILE, Codec, Images, Latents, check_clip_length, check_images
from wav.errors import ConfigError, DataError, cut
from wav.seeding import numpy_generator

BASIS_FILE = "basis.safetensors"
FORMAT = 1
_PARTS = ("mean", "encode", "decode")
_CHUNK_VALUES = 1 << 24  # pixel values turned to float at once (64 MiB)
_DENSE_LIMIT = 1024  # larger covariances: only the leading eigenvectors, by Lanczos
_MAX_ROWS = 65536  # patches a basis is fitted on


@dataclass(frozen=True)
class Basis:
    """Affine map between a flattened patch (D pixels in [-1, 1]) and its latent (Cp content channels)."""

    mean: NDArray  # (D,) float32
    encode: NDArray  # (D, Cp) float32
    decode: NDArray  # (Cp, D) float32
    explained: float  # share of the patches' variance kept

    def __post_init__(self) -> None:
        for name in _PARTS:  # one memory layout, so that a loaded basis gives the same bits
            object.__setattr__(self, name, np.array(getattr(self, name), np.float32, order="C"))


def _patches(frames: NDArray, patch: int) -> NDArray:
    """Groups (N, G, H, W, 3) -> (N, h, w, G*patch*patch*3), a patch of all G frames per cell."""
    n, g, height, width, _ = frames.shape
    cells = frames.reshape(n, g, height // patch, patch, width // patch, patch, 3)
    return cells.transpose(0, 2, 4, 1, 3, 5, 6).reshape(n, height // patch, width // patch, g * patch * patch * 3)


def _images(patches: NDArray, group: int, patch: int) -> NDArray:
    """Inverse of :func:`_patches`."""
    n, h, w, _ = patches.shape
    cells = patches.reshape(n, h, w, group, patch, patch, 3)
    return cells.transpose(0, 3, 1, 4, 2, 5, 6).reshape(n, group, h * patch, w * patch, 3)


def _to_float(pixels: NDArray) -> NDArray[np.float32]:
    """Pixels 0..255 as float32 in [-1, 1]."""
    scaled: NDArray[np.float32] = np.multiply(pixels, np.float32(2 / 255), dtype=np.float32)
    return scaled - np.float32(1)


def _row_chunks(groups: Images, patch: int) -> Iterator[NDArray[np.float32]]:
    """Float patch rows (n, D) of groups (N, G, H, W, 3), a bounded number of pixels at a time."""
    step = max(1, _CHUNK_VALUES // int(np.prod(groups.shape[1:])))
    for start in range(0, len(groups), step):
        rows = _patches(groups[start : start + step], patch)
        yield _to_float(rows.reshape(-1, rows.shape[-1]))


def _moments(groups: Images, patch: int) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Mean (D,), biased covariance (D, D) and row count of the patch rows."""
    total: NDArray[np.float64] | float = 0.0
    product: NDArray[np.float64] | float = 0.0
    count = 0
    for rows in _row_chunks(groups, patch):
        total = total + rows.sum(0, dtype=np.float64)
        product = product + (rows.T @ rows).astype(np.float64)
        count += len(rows)
    mean = np.asarray(total) / count
    return mean, np.asarray(product) / count - np.outer(mean, mean), count


def _leading(covariance: NDArray[np.float64], k: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The k largest eigenvalues (descending) and eigenvectors (D, k), signs fixed by the largest entry."""
    import scipy.linalg  # fitting needs it, using what was fitted does not
    import scipy.sparse.linalg

    size = len(covariance)
    if size <= _DENSE_LIMIT or k > size // 4:
        values, vectors = scipy.linalg.eigh(covariance, subset_by_index=[size - k, size - 1])
    else:
        start = numpy_generator(seed, "codec.pca.lanczos").standard_normal(size)
        values, vectors = scipy.sparse.linalg.eigsh(covariance, k=k, v0=start, which="LA")
    order = np.argsort(-values, kind="stable")
    values, vectors = values[order], vectors[:, order]
    sign = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(k)])
    return values, vectors * sign


def _fit_basis(groups: Images, patch: int, k: int, floor: float, seed: int, what: str) -> Basis:
    """Whitened PCA of the patches: latent i = u_i . (x - mean) / sqrt(lambda_i + floor * lambda_1)."""
    mean, covariance, rows = _moments(groups, patch)
    if rows <= k:
        raise DataError(f"{what}: {rows} patches cannot fix {k} components; raise encode.fit_frames or add episodes")
    if k > len(mean):
        raise ConfigError(
            f"encode.channels: {k} content channels exceed a patch's {len(mean)} values; lower encode.channels"
        )
    values, vectors = _leading(covariance, k, seed)
    if values[0] <= 1e-9:
        raise DataError(f"{what}: the patches are constant, nothing to encode; check that the renderer drew a scene")
    scale = np.sqrt(np.maximum(values, 1e-7 * values[0]) + floor * values[0])
    return Basis(
        mean=mean,
        encode=vectors / scale,
        decode=(vectors * scale).T,
        explained=float(values.sum() / np.trace(covariance)),
    )


def _subset(stack: Images, cells: int, generator: np.random.Generator) -> Images:
    """At most ``_MAX_ROWS`` patches' worth of the stack's rows, drawn without replacement in order."""
    limit = max(1, _MAX_ROWS // cells)
    if len(stack) <= limit:
        return stack
    return stack[np.sort(generator.choice(len(stack), limit, replace=False))]


class PCACodec(Codec):
    """Patch PCA with whitening; see :mod:`wav.codec.pca`. Make one with :meth:`fit` or ``load_codec``."""

    kind = "pca"

    def __init__(self, image: Basis, clip: Basis, patch: int, temporal: int, coordinates: bool, floor: float) -> None:
        self.image, self.clip = image, clip
        self.spatial, self.temporal, self.coordinates, self.floor = patch, temporal, coordinates, floor
        self.channels = image.encode.shape[1] + (2 if coordinates else 0)

    @classmethod
    def fit(
        cls,
        frames: Images,
        clips: Images,
        patch: int = 16,
        temporal: int = 4,
        channels: int = 48,
        coordinates: bool = True,
        seed: int = 0,
        floor: float = 1e-3,
    ) -> PCACodec:
        """Fit both bases.

        Args:
            frames: (N, H, W, 3) uint8, all views mixed; H and W multiples of ``patch``, not necessarily equal.
            clips: (M, 1 + temporal*k, H, W, 3) uint8; the groups after each first frame fit the clip basis. With k = 0
                the clip basis sees repeated frames.
            patch: pixels per latent cell.
            temporal: frames per latent frame.
            channels: latent channels, the two position channels included when ``coordinates``.
            coordinates: the last two channels carry the cell centre's (y, x) in [-1, 1]; ignored in decoding.
            seed: draws the patches of very large stacks and the eigensolver's start.
            floor: damping of weak components, as a share of the leading eigenvalue: component i has variance
                lambda_i / (lambda_i + floor * lambda_1). 0 whitens exactly.

        Raises:
            DataError: bad shapes, too few or constant patches. ConfigError: too many channels.
        """
        content = channels - (2 if coordinates else 0)
        if content < 1:
            raise ConfigError(f"encode.channels = {channels}: no content channel is left; use at least 3")
        check_images(frames, 4, patch, "frames")
        check_images(clips, 5, patch, "clips")
        if frames.shape[1:] != clips.shape[2:]:
            raise DataError(f"clips: size {clips.shape[2:]} differs from the frames' {frames.shape[1:]}; use one size")
        cells = (frames.shape[1] // patch) * (frames.shape[2] // patch)
        k = check_clip_length(clips.shape[1], temporal)
        draw = numpy_generator(seed, "codec.pca.rows")
        if k:
            clips = _subset(clips, cells * k, draw)
            groups = clips[:, 1:].reshape(len(clips) * k, temporal, *clips.shape[2:])
        else:
            groups = np.repeat(_subset(clips, cells, draw), temporal, axis=1)
        frames = _subset(frames, cells, draw)
        image = _fit_basis(frames[:, None], patch, content, floor, seed, "frames")
        clip = _fit_basis(groups, patch, content, floor, seed, "clips")
        clip = _aligned(clip, image, groups, patch, temporal)
        return cls(image, clip, patch, temporal, coordinates, floor)

    def _encode(self, clips: Images) -> Latents:
        n, k = len(clips), check_clip_length(clips.shape[1], self.temporal)
        first = self._project(clips[:, :1], self.image)[:, :, None]
        if not k:
            return first
        groups = clips[:, 1:].reshape(n * k, self.temporal, *clips.shape[2:])
        rest = self._project(groups, self.clip)
        rest = rest.reshape(n, k, *rest.shape[1:]).transpose(0, 2, 1, 3, 4)
        return np.concatenate([first, rest], axis=2)

    def _decode(self, latents: Latents) -> Images:
        n, c, frames, h, w = latents.shape
        first = self._pixels(latents[:, :, 0], self.image, 1)
        if frames == 1:
            return first
        rest = latents[:, :, 1:].transpose(0, 2, 1, 3, 4).reshape(n * (frames - 1), c, h, w)
        groups = self._pixels(rest, self.clip, self.temporal)
        return np.concatenate([first, groups.reshape(n, -1, *first.shape[2:])], axis=1)

    def save(self, folder: str | Path, reference: bool = False) -> None:
        """Write ``codec.json`` and ``basis.safetensors`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), str(folder / BASIS_FILE))
        (folder / CODEC_FILE).write_text(json.dumps({**self._header(), "digest": self.digest}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> PCACodec:
        """Read what :meth:`save` wrote; raises DataError if it is missing, unknown or altered."""
        folder = Path(folder)
        try:
            header = json.loads((folder / CODEC_FILE).read_text())
            arrays = load_file(str(folder / BASIS_FILE))
            if header["format"] != FORMAT:
                raise DataError(f"{folder}: codec format {header['format']} is unknown; run the encode stage again")
            image, clip = (
                Basis(arrays[f"{n}.mean"], arrays[f"{n}.encode"], arrays[f"{n}.decode"], float(header["explained"][n]))
                for n in ("image", "clip")
            )
            codec = cls(image, clip, header["patch"], header["temporal"], header["coordinates"], header["floor"])
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{folder}: not a readable PCA codec ({cut(error)}); run the encode stage again") from error
        if codec.digest != header["digest"]:
            raise DataError(f"{folder}: the basis does not match its digest; restore the folder or run encode again")
        return codec

    def _project(self, groups: Images, basis: Basis) -> Latents:
        """Groups (N, G, H, W, 3) -> (N, C, h, w)."""
        n, _, height, width, _ = groups.shape
        h, w = height // self.spatial, width // self.spatial
        out = np.empty((n, self.channels, h, w), np.float32)
        step = max(1, _CHUNK_VALUES // int(np.prod(groups.shape[1:])))
        content = basis.encode.shape[1]
        for start in range(0, n, step):
            rows = _to_float(_patches(groups[start : start + step], self.spatial)) - basis.mean
            out[start : start + step, :content] = (rows @ basis.encode).transpose(0, 3, 1, 2)
        if self.coordinates:
            out[:, content] = ((2 * np.arange(h) + 1) / h - 1)[:, None]
            out[:, content + 1] = ((2 * np.arange(w) + 1) / w - 1)[None, :]
        return out

    def _pixels(self, latents: Latents, basis: Basis, group: int) -> Images:
        """Latents (N, C, h, w) -> (N, group, H, W, 3) uint8."""
        n, _, h, w = latents.shape
        out = np.empty((n, group, h * self.spatial, w * self.spatial, 3), np.uint8)
        step = max(1, _CHUNK_VALUES // max(1, int(np.prod(out.shape[1:]))))
        content = len(basis.decode)
        for start in range(0, n, step):
            z = np.asarray(latents[start : start + step, :content], np.float32).transpose(0, 2, 3, 1)
            pixels = np.clip(np.rint((z @ basis.decode + basis.mean + 1) * 127.5), 0, 255).astype(np.uint8)
            out[start : start + step] = _images(pixels, group, self.spatial)
        return out

    def _header(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "patch": self.spatial,
            "temporal": self.temporal,
            "channels": self.channels,
            "coordinates": self.coordinates,
            "floor": self.floor,
            "explained": {"image": self.image.explained, "clip": self.clip.explained},
        }

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        return {
            f"{name}.{part}": getattr(basis, part)
            for name, basis in (("image", self.image), ("clip", self.clip))
            for part in _PARTS
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of header and bases."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for name, array in sorted(self._tensors().items()):
            digest.update(name.encode() + str(array.shape).encode() + array.tobytes())
        return digest.hexdigest()


def _aligned(clip: Basis, image: Basis, groups: Images, patch: int, temporal: int) -> Basis:
    """Clip basis times the orthogonal matrix that brings its latents nearest to the mean frame's image latents."""
    cross = np.zeros((image.encode.shape[1],) * 2)
    for rows in _row_chunks(groups, patch):
        average = rows.reshape(len(rows), temporal, -1).mean(1)
        z_clip = (rows - clip.mean) @ clip.encode
        z_image = (average - image.mean) @ image.encode
        cross += (z_clip.T @ z_image).astype(np.float64)
    left, _, right = np.linalg.svd(cross)
    rotation = left @ right
    return Basis(
        mean=clip.mean,
        encode=clip.encode @ rotation,
        decode=rotation.T @ clip.decode,
        explained=clip.explained,
    )
