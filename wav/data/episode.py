"""The one in-memory form of a demonstration.

At step t the robot sees frame t and executes action t. The last frame shows the result; its action is a hold (no
motion, gripper as it was), so that every array of an episode has one row per frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.data.names import is_plain
from wav.errors import DataError


@dataclass(frozen=True)
class Episode:
    """One demonstration of T frames."""

    episode_id: str
    task: str
    instruction: str
    images: Mapping[str, NDArray[np.uint8]]
    """view -> (T, H, W, 3) uint8, RGB."""
    state: NDArray[np.float32]
    """(T, S) float32, see :mod:`wav.data.state`."""
    joints: NDArray[np.float32] | None
    """(T, J) float32 joint angles (rad) and gripper opening, where the source has them."""
    actions: NDArray[np.float32]
    """(T, A) float32, as executed: OSC_POSE deltas in [-1, 1]; gripper -1 open, +1 close."""
    expert_actions: NDArray[np.float32] | None = None
    """(T, A) float32: what the expert wanted before execution noise, where the source knows it."""
    success: bool = True
    init_index: int = -1
    """Initial state of the simulator, and the seed; -1 where nobody knows."""
    seed: int = -1
    source: str = ""
    """Format, file and name of what it was read from, or what recorded it."""
    style: str = ""
    """How a scripted expert moved (:data:`wav.sim.styles.STYLES`); empty where nobody knows. No model ever sees it."""

    @property
    def length(self) -> int:
        """Number of frames T."""
        return len(self.state)

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the cameras."""
        return tuple(self.images)

    def labels(self) -> NDArray[np.float32]:
        """(T, A) actions to learn: the expert's where known, else the executed ones."""
        return self.actions if self.expert_actions is None else self.expert_actions

    def validate(self) -> None:
        """Check types, shapes, lengths and finiteness; DataError names the episode, the field and what it should be."""
        if not is_plain(self.task):
            raise DataError(
                f"episode {self.episode_id}: task {self.task!r} cannot name a file everywhere; name it by "
                "wav.data.names.task_name"
            )
        if not self.instruction.strip():
            raise DataError(f"episode {self.episode_id}: instruction is empty; give every episode its language command")
        if not self.images:
            raise DataError(f"episode {self.episode_id}: images has no view; record at least one camera")
        self._check("state", self.state, np.float32, (None, None))
        length = self.length
        if not length:
            raise DataError(f"episode {self.episode_id}: has no frames; drop it at the source")
        for view, frames in self.images.items():
            self._check(f"images[{view!r}]", frames, np.uint8, (length, None, None, 3))
        self._check("actions", self.actions, np.float32, (length, None))
        if self.expert_actions is not None:
            self._check("expert_actions", self.expert_actions, np.float32, self.actions.shape)
        if self.joints is not None:
            self._check("joints", self.joints, np.float32, (length, None))

    def _check(self, name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
        """Check one field; ``None`` in ``shape`` accepts any size."""
        where = f"episode {self.episode_id}: {name}"
        if not isinstance(array, np.ndarray):
            raise DataError(f"{where} is {type(array).__name__}; give a numpy array")
        if array.dtype != np.dtype(dtype):
            raise DataError(f"{where} has dtype {array.dtype}; convert it to {np.dtype(dtype)}")
        fits = array.ndim == len(shape) and all(w in (None, h) for w, h in zip(shape, array.shape, strict=True))
        if not fits:
            wanted = tuple("any" if size is None else size for size in shape)
            raise DataError(f"{where} has shape {array.shape}; every field needs one row per frame, here {wanted}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            raise DataError(f"{where} holds {array[row].tolist()} at step {row}; remove NaN and infinity at the source")
