"""Dense rewards of demonstrations: the paper's Table 2 and the return over the planning window.

Every term compares step t with the episode's final frame or measures how abruptly the robot moves. One arm has nine
terms, two arms sixteen. Rewards are labels: they are computed once per episode store, never while training::

    label_store(EpisodeStore.open("data/episodes"), settings.label_rewards, settings.data.action_chunk, "data/rewards")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.conventions import wrist_views
from wav.data.episode import Episode
from wav.data.state import unwrap_axis_angle
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import EpisodeStore
from wav.errors import DataError
from wav.io.files import (
    MANIFEST,
    atomic_folder,
    check_files,
    manifest_digest,
    open_array,
    read_manifest,
    write_array,
    write_manifest,
)

if TYPE_CHECKING:
    from wav.config import LabelRewardsSettings

FORMAT, VERSION = "wav-rewards", 1
REMEDY = "label the episodes again with `dvc repro label_rewards`"

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
_BLOCK = 16  # places blurred by one matrix product
_FRAMES = 16  # frames whose squared errors are summed at once


@dataclass(frozen=True)
class RewardTerms:
    """Terms of one episode of T steps; K is 9 for one arm, 16 for two."""

    names: tuple[str, ...]
    terms: NDArray[np.float32]
    """(T, K) unweighted: similarities in (0, 1], motions >= 0."""
    weights: NDArray[np.float32]
    """(K,) signed weights."""

    @property
    def weighted(self) -> NDArray[np.float32]:
        """(T, K) terms times weights."""
        return self.terms * self.weights

    @property
    def reward(self) -> NDArray[np.float32]:
        """(T,) weighted sum r_t."""
        total: NDArray[np.float32] = self.weighted.sum(axis=1, dtype=np.float32)
        return total


class _Blur:
    """Gaussian means of float32 planes (P, H, W) over every place where the whole window fits, (P, H - 10, W - 10).

    The window is separable and its matrix is banded, so each axis is a few small dense products. Buffers are reused.
    """

    def __init__(self, planes: int, height: int, width: int) -> None:
        taps = np.exp(-0.5 * (np.arange(_WINDOW) - _WINDOW // 2) ** 2 / _SIGMA**2)
        self._band = np.zeros((_BLOCK, _BLOCK + _WINDOW - 1), np.float32)
        for row in range(_BLOCK):
            self._band[row, row : row + _WINDOW] = taps / taps.sum()
        lost = _WINDOW - 1
        self.planes = np.empty((planes, height, width), np.float32)  #: input; fill it, then call
        self._rows = np.empty((planes, height - lost, width), np.float32)
        self._means = np.empty((planes, height - lost, width - lost), np.float32)

    def __call__(self) -> NDArray[np.float32]:
        """Blurred :attr:`planes`; overwritten by the next call."""
        for target, source, band in self._products(self._rows.shape[1]):
            np.matmul(band, self.planes[:, source], out=self._rows[:, target])
        flat, means = (array.reshape(-1, array.shape[2]) for array in (self._rows, self._means))
        for target, source, band in self._products(means.shape[1]):
            np.matmul(flat[:, source], band.T, out=means[:, target])
        return self._means

    def _products(self, places: int) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """(places, pixels under their windows, matrix) of each block."""
        for start in range(0, places, _BLOCK):
            count = min(_BLOCK, places - start)
            pixels = count + _WINDOW - 1
            yield slice(start, start + count), slice(start, start + pixels), self._band[:count, :pixels]


def _check_pair(images: NDArray[np.uint8], reference: NDArray[np.uint8], smallest: int, what: str) -> None:
    """Raise DataError unless images (N, H, W, 3) and reference (H, W, 3) are uint8 of equal, sufficient size."""
    if images.dtype != np.uint8 or reference.dtype != np.uint8 or images.shape[1:] != reference.shape:
        raise DataError(
            f"{what}: images {images.dtype} {images.shape} against {reference.dtype} {reference.shape}; "
            "pass uint8 images (N, H, W, 3) and one of their size"
        )
    if min(reference.shape[:2]) < smallest:
        raise DataError(
            f"{what}: image size {reference.shape[0]}x{reference.shape[1]} is below the window's {smallest} pixels; "
            "raise data.image_height and data.image_width"
        )


def ssim(images: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity (N,) of images (N, H, W, 3) uint8 with one reference (H, W, 3).

    Gaussian window 11x11, sigma 1.5, data range 255, biased covariance; the mean is over channels and over the places
    where the whole window lies inside the image (Wang et al. 2004, and scikit-image with ``gaussian_weights=True,
    use_sample_covariance=False, sigma=1.5, channel_axis=-1, data_range=255``). Computed in float32: within 1e-4.

    Raises:
        DataError: wrong types or sizes, or images smaller than 11 pixels.
    """
    _check_pair(images, reference, _WINDOW, "ssim")
    height, width, channels = reference.shape
    blur = _Blur(2 * channels, height, width)
    y, squares = np.split(blur.planes, 2)
    shift_y = _centre(reference, y)
    np.multiply(y, y, out=squares)
    mean_y, square_y = np.split(blur(), 2)
    spread_y, bright_y = square_y - mean_y**2 + _C2, mean_y + shift_y
    energy_y = bright_y**2 + _C1
    blur, scratch, result = _Blur(3 * channels, height, width), np.empty_like(mean_y), np.empty(len(images))
    x, squares, products = np.split(blur.planes, 3)
    for index, image in enumerate(images):  # in place and one at a time: everything stays in the cache
        shift = _centre(image, x)
        np.multiply(x, x, out=squares)
        np.multiply(x, y, out=products)
        mean, square, covariance = np.split(blur(), 3)
        covariance -= np.multiply(mean, mean_y, out=scratch)
        covariance *= 2
        covariance += _C2
        square -= np.multiply(mean, mean, out=scratch)
        square += spread_y
        covariance /= square
        mean += shift
        np.multiply(mean, mean, out=scratch)
        scratch += energy_y
        mean *= bright_y
        mean *= 2
        mean += _C1
        mean /= scratch
        mean *= covariance
        result[index] = mean.mean(dtype=np.float64)
    return result


def _centre(image: NDArray[np.uint8], planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill planes (3, H, W) with the image less its means (3, 1, 1), which it returns: float32 holds such squares."""
    planes[...] = image.transpose(2, 0, 1)
    mean: NDArray[np.float32] = planes.mean(axis=(1, 2), keepdims=True)
    planes -= mean
    return mean


def mse(images: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared error (N,) of images (N, H, W, 3) uint8 with one reference (H, W, 3), on 0..255."""
    _check_pair(images, reference, 1, "mse")
    result, y = np.empty(len(images)), reference.astype(np.float32)
    for start in range(0, len(images), _FRAMES):
        error = (images[start : start + _FRAMES] - y).reshape(-1, len(y), y[0].size)
        rows = np.einsum("nij,nij->ni", error, error)  # whole numbers, exact in float32 below 2^24
        result[start : start + len(error)] = rows.sum(axis=1, dtype=np.float64) / y.size
    return result


def _arm_views(views: tuple[str, ...], arms: int) -> tuple[tuple[str, ...], str]:
    """The wrist view of every arm, in the order of ``views``, and the third-person view."""
    wrists = wrist_views(views)
    others = tuple(view for view in views if view not in wrists)
    for kind, found, needed in (("wrist", wrists, arms), ("third-person", others, 1)):
        if len(found) != needed:
            raise DataError(
                f"data.views = {views}: the reward of {arms} arm(s) needs {needed} {kind} camera(s), found "
                f"{', '.join(found) or 'none'} (a wrist camera's name says wrist, hand or gripper); correct data.views "
                "or label_rewards.arms"
            )
    return wrists, others[0]


def _split(columns: NDArray[np.float64], arms: int, what: str) -> list[NDArray[np.float64]]:
    """Columns (T, D) of every arm: equal shares, left to right."""
    if columns.shape[1] % arms:
        raise DataError(f"{what}: {columns.shape[1]} columns do not split over {arms} arms; correct label_rewards.arms")
    return np.split(columns, arms, axis=1)


def _motion(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Velocity sum_j |x_t - x_{t-1}| and acceleration sum_j |v_t - v_{t-1}|, both (T,); the robot starts at rest."""
    velocity = np.diff(x, axis=0, prepend=x[:1])
    acceleration = np.diff(velocity, axis=0, prepend=velocity[:1])
    return np.abs(velocity).sum(axis=1), np.abs(acceleration).sum(axis=1)


def episode_rewards(
    episode: Episode, settings: LabelRewardsSettings, views: tuple[str, ...] | None = None
) -> RewardTerms:
    """Table 2 for one episode.

    Args:
        episode: its last frame is the reference. The state in the reward is ``joints`` where the source has them, else
            the end-effector state with the axis-angle unwrapped.
        settings: arms (9 or 16 terms) and weight w: +w for similarities, -w for state motion, -0.1 w for action motion.
        views: cameras to use; None takes the episode's.

    Raises:
        DataError: a camera is missing, views or columns do not fit the arms, images are below 11 pixels.
    """
    arms, weight = settings.arms, float(Fraction(settings.weight))
    wrists, top = _arm_views(tuple(views or episode.views), arms)
    for view in (*wrists, top):
        if view not in episode.images:
            raise DataError(
                f"episode {episode.episode_id}: camera {view!r} is missing, it has {', '.join(episode.images)}; "
                "ingest it with that camera or correct data.views"
            )
    state = episode.joints if episode.joints is not None else unwrap_axis_angle(episode.state)
    states = _split(np.asarray(state, np.float64), arms, f"episode {episode.episode_id}: state")
    actions = _split(np.asarray(episode.actions, np.float64), arms, f"episode {episode.episode_id}: actions")
    sides = ("",) if arms == 1 else ("left_", "right_")
    terms: dict[str, tuple[NDArray[np.float64], float]] = {}
    cameras = [*((f"{side}wrist", view) for side, view in zip(sides, wrists, strict=True)), ("top", top)]
    for name, view in cameras:
        frames = episode.images[view]
        terms[f"{name}_mse"] = np.exp(-0.01 * mse(frames, frames[-1])), weight
        terms[f"{name}_ssim"] = np.exp(ssim(frames, frames[-1]) - 1), weight
    for side, x in zip(sides, states, strict=True):
        terms[f"{side}proximity"] = np.exp(-np.linalg.norm(x - x[-1], axis=1)), weight
    for kind, parts, share in (("state", states, -weight), ("action", actions, -0.1 * weight)):
        for side, x in zip(sides, parts, strict=True):
            velocity, acceleration = _motion(x)
            terms[f"{side}{kind}_velocity"] = velocity, share
            terms[f"{side}{kind}_acceleration"] = acceleration, share
    return RewardTerms(
        names=tuple(terms),
        terms=np.stack([term for term, _ in terms.values()], axis=1).astype(np.float32),
        weights=np.array([share for _, share in terms.values()], np.float32),
    )


def returns(reward: NDArray[np.floating], gamma: float, horizon: int | None) -> NDArray[np.float32]:
    """Return v_t = sum_{i < horizon} gamma^i r_{t+i}, (T,) for rewards (T,).

    Args:
        reward: r_t; after the final frame the last one is held (the goal is absorbing).
        gamma: discount.
        horizon: steps summed (H + 1 in the spec's notation, the action chunk by default). None sums to the episode's
            end instead, without holding; such returns FALL toward success, because rewards are positive.

    Raises:
        DataError: a horizon below one.
    """
    r = np.asarray(reward, np.float64)
    if horizon is None:
        result, tail = np.empty(len(r)), 0.0
        for t in range(len(r) - 1, -1, -1):
            result[t] = tail = r[t] + gamma * tail
        return result.astype(np.float32)
    if horizon < 1:
        raise DataError(
            f"label_rewards.horizon = {horizon}: a return sums at least one step; use 0 for the action chunk"
        )
    held = np.concatenate([r, np.full(horizon - 1, r[-1])])
    windows = np.lib.stride_tricks.sliding_window_view(held, horizon)
    return np.asarray(windows @ gamma ** np.arange(horizon), dtype=np.float32)


def value_channels(terms: RewardTerms, settings: LabelRewardsSettings, action_chunk: int) -> NDArray[np.float32]:
    """Training targets of the value expert, (T, K + 1): the weighted terms, then the return."""
    horizon = None if settings.to_end else settings.horizon or action_chunk
    value = returns(terms.reward, settings.gamma, horizon)
    return np.concatenate([terms.weighted, value[:, None]], axis=1)


def label_store(
    episodes: EpisodeStore,
    settings: LabelRewardsSettings,
    action_chunk: int,
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> RewardStore:
    """Label every episode and write ``out`` atomically: values.npy, statistics.json, manifest.json.

    Args:
        episodes: the store; rows of values.npy follow its concatenated frame order.
        settings: see :func:`episode_rewards` and :func:`returns`.
        action_chunk: steps of a return where ``settings.horizon`` is 0.
        out: folder.
        progress: called with (episodes done, episodes in total).

    Raises:
        DataError: an episode without the views or sizes the reward needs, or a value that is not finite.
        StorageError: the disk is full.
    """
    labels: list[NDArray[np.float32]] = []
    for index in range(len(episodes)):
        terms = episode_rewards(episodes[index], settings, episodes.conventions.views)
        labels.append(value_channels(terms, settings, action_chunk))
        if progress:
            progress(index + 1, len(episodes))
    if not labels:
        raise DataError(f"{episodes.path}: holds no episode to label; run the ingest stage again")
    values = np.concatenate(labels)
    with atomic_folder(out) as folder:
        write_array(folder / "values.npy", values)
        statistics = compute_statistics(values, "zscore_symlog", "value statistics")
        Statistics({"value": statistics}).save(folder / "statistics.json")
        content = {
            "episodes": episodes.digest,
            "frames": episodes.frames,
            "offsets": [int(row) for row in episodes.offsets],
            "names": list(terms.names),
            "weights": [float(weight) for weight in terms.weights],
            "action_chunk": action_chunk,
            "settings": settings.model_dump(mode="json"),
        }
        write_manifest(folder, FORMAT, VERSION, content)
    return RewardStore.open(out, episodes)


class RewardStore:
    """Read access to ``data/rewards``; open it with :meth:`open`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self._manifest = path, manifest
        try:
            self.names = tuple(str(name) for name in manifest["names"])
            self.weights = np.array(manifest["weights"], np.float32)
            self.offsets = np.array(manifest["offsets"], np.int64)
            self.episodes_digest = str(manifest["episodes"])
            frames = int(manifest["frames"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path / MANIFEST}: malformed ({error}); {REMEDY}") from None
        #: (N, K + 1) weighted terms and, last, the return; rows in the episode store's concatenated frame order
        self.values = open_array(path / "values.npy", (frames, len(self.names) + 1), np.float32, remedy=REMEDY)
        self.statistics = Statistics.load(path / "statistics.json", REMEDY)
        self.digest = manifest_digest(manifest)

    @classmethod
    def open(cls, path: str | Path, episodes: EpisodeStore | None = None) -> RewardStore:
        """Open a store; with ``episodes``, check that it was made from them.

        Raises:
            DataError: something is missing, truncated, of another version, or made from other episodes.
        """
        path = Path(path)
        store = cls(path, read_manifest(path, FORMAT, VERSION, remedy=REMEDY))
        if episodes is not None and store.episodes_digest != episodes.digest:
            raise DataError(
                f"{path}: made from episodes {store.episodes_digest[:12]}, {episodes.path} holds "
                f"{episodes.digest[:12]}; {REMEDY}"
            )
        return store

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def episode(self, index: int) -> NDArray[np.float32]:
        """Values (T, K + 1) of one episode."""
        rows: NDArray[np.float32] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return rows

    def verify(self) -> None:
        """Compare every file's content with the manifest's SHA-256; DataError names the first that differs."""
        check_files(self._manifest, self.path, remedy=REMEDY, digests=True)
