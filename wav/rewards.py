"""Dense rewards of demonstrations: the paper's Table 2 and the return over the planning window.

Every term compares step t with the episode's final frame or measures how abruptly the robot moves. One arm has nine
terms, two arms sixteen. Rewards are labels: they are computed once per episode store, never while training::

    label_store(EpisodeStore.open("data/episodes"), settings.label_rewards, settings.data.action_chunk, "data/rewards")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.episode import Episode
from wav.data.files import (
    MANIFEST,
    atomic_folder,
    check_files,
    manifest_digest,
    open_array,
    read_manifest,
    write_array,
    write_manifest,
)
from wav.data.state import unwrap_axis_angle
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import EpisodeStore
from wav.errors import DataError

if TYPE_CHECKING:
    from wav.config import LabelRewardsSettings

FORMAT, VERSION = "wav-rewards", 1
REMEDY = "label the episodes again with `dvc repro label_rewards`"

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
_CHUNK_BYTES = 1 << 26  # float64 pixels of images handled at once
_WRIST_NAMES = ("wrist", "hand", "eye_in_hand", "gripper")


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


def _blur_matrix(size: int) -> NDArray[np.float64]:
    """(size - 10, size): a Gaussian of 11 taps at every place where it fits."""
    taps = np.exp(-0.5 * (np.arange(-(_WINDOW // 2), _WINDOW // 2 + 1) / _SIGMA) ** 2)
    taps /= taps.sum()
    matrix = np.zeros((size - _WINDOW + 1, size))
    for row in range(len(matrix)):
        matrix[row, row : row + _WINDOW] = taps
    return matrix


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
    use_sample_covariance=False, sigma=1.5, channel_axis=-1, data_range=255``).

    Raises:
        DataError: wrong types or sizes, or images smaller than 11 pixels.
    """
    _check_pair(images, reference, _WINDOW, "ssim")
    rows, columns = _blur_matrix(reference.shape[0]), _blur_matrix(reference.shape[1]).T

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        smoothed: NDArray[np.float64] = rows @ x @ columns
        return smoothed

    y = reference.transpose(2, 0, 1).astype(np.float64)
    mean_y = blur(y)
    variance_y = blur(y * y) - mean_y**2
    result = np.empty(len(images))
    step = max(1, _CHUNK_BYTES // (8 * reference.size))
    for start in range(0, len(images), step):
        x = images[start : start + step].transpose(0, 3, 1, 2).astype(np.float64)
        mean_x = blur(x)
        variance_x = blur(x * x) - mean_x**2
        covariance = blur(x * y) - mean_x * mean_y
        similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
        similarity /= (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
        result[start : start + step] = similarity.mean(axis=(1, 2, 3))
    return result


def mse(images: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared error (N,) of images (N, H, W, 3) uint8 with one reference (H, W, 3), on 0..255."""
    _check_pair(images, reference, 1, "mse")
    result = np.empty(len(images))
    step = max(1, _CHUNK_BYTES // (8 * reference.size))
    for start in range(0, len(images), step):
        error = images[start : start + step].astype(np.float64) - reference.astype(np.float64)
        result[start : start + step] = (error * error).mean(axis=(1, 2, 3))
    return result


def _arm_views(views: tuple[str, ...], arms: int) -> tuple[tuple[str, ...], str]:
    """The wrist view of every arm, in the order of ``views``, and the third-person view."""
    wrists = tuple(view for view in views if any(name in view.lower() for name in _WRIST_NAMES))
    others = tuple(view for view in views if view not in wrists)
    if len(wrists) != arms or len(others) != 1:
        raise DataError(
            f"data.views = {views}: the reward of {arms} arm(s) needs {arms} view(s) named with 'wrist' and one "
            "third-person view; correct data.views or label_rewards.arms"
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
        DataError: views that do not fit the arms, images below 11 pixels, columns that do not split over the arms.
    """
    arms, weight = settings.arms, float(Fraction(settings.weight))
    wrists, top = _arm_views(tuple(views or episode.views), arms)
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
