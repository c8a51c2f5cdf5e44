"""The paper's Table 2: dense rewards of a demonstration, one function per kind of term.

Every term compares step t with the episode's final frame or measures how abruptly the robot moves. One arm has nine
terms, two arms sixteen. To add one, write its function here under :func:`term`; names, weights and the number of value
channels follow from the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wav.data.conventions import wrist_views
from wav.data.episode import Episode
from wav.data.state import unwrap_axis_angle
from wav.errors import DataError
from wav.rewards.ssim import check_pair, ssim

if TYPE_CHECKING:
    from wav.config import LabelRewardsSettings

Subject = Literal["camera", "state", "action"]
#: (T, H, W, 3) uint8 frames of a camera, or (T, D) float64 states or actions of an arm, to (T,) or (names, T)
Measure = Callable[[NDArray[Any]], NDArray[np.float64]]
_FRAMES = 16  # frames whose squared errors are summed at once


@dataclass(frozen=True)
class Term:
    """One row of Table 2: what is measured on every camera, or on every arm's states or actions."""

    subject: Subject
    names: tuple[str, ...]
    """One per column that ``measure`` gives; the camera's or the arm's name goes before it."""
    weight: float
    """Share of ``label_rewards.weight``; negative for costs."""
    measure: Measure


#: Table 2 in the order of the value channels.
TERMS: list[Term] = []


def term(subject: Subject, *names: str, weight: float) -> Callable[[Measure], Measure]:
    """Enter a function in :data:`TERMS`."""

    def enter(measure: Measure) -> Measure:
        TERMS.append(Term(subject, names, weight, measure))
        return measure

    return enter


@term("camera", "mse", "ssim", weight=1.0)
def similarity(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """exp(-0.01 MSE) and exp(SSIM - 1) of frames (T, H, W, 3) with the final one: (2, T)."""
    return np.stack([np.exp(-0.01 * mse(frames, frames[-1])), np.exp(ssim(frames, frames[-1]) - 1)])


@term("state", "proximity", weight=1.0)
def proximity(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(-|x_t - x_T|) of states (T, D): (T,)."""
    return np.asarray(np.exp(-np.linalg.norm(x - x[-1], axis=1)))


@term("state", "state_velocity", "state_acceleration", weight=-1.0)
def state_motion(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Velocity sum_j |x_t - x_{t-1}| and acceleration sum_j |v_t - v_{t-1}| of (T, D), begun at rest: (2, T)."""
    velocity = np.diff(x, axis=0, prepend=x[:1])
    acceleration = np.diff(velocity, axis=0, prepend=velocity[:1])
    return np.stack([np.abs(velocity).sum(axis=1), np.abs(acceleration).sum(axis=1)])


@term("action", "action_velocity", "action_acceleration", weight=-0.1)
def action_motion(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same of the actions (T, D): (2, T)."""
    return state_motion(x)


def channels(arms: int) -> int:
    """Value channels of a robot with so many arms: every term on its subjects, and the return.

    >>> channels(arms=1), channels(arms=2)
    (10, 17)
    """
    subjects = {"camera": arms + 1, "state": arms, "action": arms}
    return 1 + sum(len(term.names) * subjects[term.subject] for term in TERMS)


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


def episode_rewards(
    episode: Episode, settings: LabelRewardsSettings, views: tuple[str, ...] | None = None
) -> RewardTerms:
    """Table 2 for one episode, whose last frame is the reference; ``views`` are the cameras to use (None: its own).

    The state in the reward is ``joints`` where the source has them, else the end-effector state with the axis-angle
    unwrapped. ``settings`` tell the arms (9 or 16 terms) and the weight w: +w for similarities, -w for state motion,
    -0.1 w for action motion. DataError where a camera is missing, or views or columns do not fit the arms.
    """
    subjects = _subjects(episode, settings.arms, tuple(views or episode.views))
    names: list[str] = []
    columns: list[NDArray[np.float64]] = []
    weights: list[float] = []
    for row in TERMS:
        for prefix, values in subjects[row.subject]:
            names += [prefix + name for name in row.names]
            columns += [*np.atleast_2d(row.measure(values))]
            weights += [row.weight * float(Fraction(settings.weight))] * len(row.names)
    terms = np.stack(columns, axis=1).astype(np.float32)
    return RewardTerms(tuple(names), terms, np.array(weights, np.float32))


def _subjects(episode: Episode, arms: int, views: tuple[str, ...]) -> dict[Subject, list[tuple[str, NDArray[Any]]]]:
    """(prefix of the names, values) of every camera and of every arm's states and actions."""
    where = f"episode {episode.episode_id}"
    wrists, top = _arm_views(views, arms)
    for view in (*wrists, top):
        if view not in episode.images:
            raise DataError(
                f"{where}: camera {view!r} is missing, it has {', '.join(episode.images)}; "
                "ingest it with that camera or correct data.views"
            )
    state = episode.joints if episode.joints is not None else unwrap_axis_angle(episode.state)
    sides = ("",) if arms == 1 else ("left_", "right_")
    cameras = [(f"{side}wrist_", view) for side, view in zip(sides, wrists, strict=True)]
    return {
        "camera": [(prefix, episode.images[view]) for prefix, view in [*cameras, ("top_", top)]],
        "state": _by_arm(state, sides, f"{where}: state"),
        "action": _by_arm(episode.actions, sides, f"{where}: actions"),
    }


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


def _by_arm(columns: NDArray[np.floating], sides: tuple[str, ...], what: str) -> list[tuple[str, NDArray[Any]]]:
    """(prefix, columns (T, D / arms) in float64) of every arm: equal shares, left to right."""
    if columns.shape[1] % len(sides):
        raise DataError(
            f"{what}: {columns.shape[1]} columns do not split over {len(sides)} arms; correct label_rewards.arms"
        )
    return list(zip(sides, np.split(np.asarray(columns, np.float64), len(sides), axis=1), strict=True))


def mse(images: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared error (N,) of images (N, H, W, 3) uint8 with one reference (H, W, 3), on 0..255."""
    check_pair(images, reference, 1, "mse")
    result, y = np.empty(len(images)), reference.astype(np.float32)
    for start in range(0, len(images), _FRAMES):
        error = (images[start : start + _FRAMES] - y).reshape(-1, len(y), y[0].size)
        rows = np.einsum("nij,nij->ni", error, error)  # whole numbers, exact in float32 below 2^24
        result[start : start + len(error)] = rows.sum(axis=1, dtype=np.float64) / y.size
    return result
