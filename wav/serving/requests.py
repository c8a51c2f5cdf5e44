"""From a message of openpi's protocol to an observation as trained on, or to a sentence that says why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.config import DataSettings
from wav.data.conventions import Conventions, wrist_views
from wav.data.sources.frames import preparation
from wav.errors import DataError
from wav.policy.parts import check_observation
from wav.sim.env import Observation

RESET = "<reset>"  #: In a prompt: a new episode begins. For clients that can send nothing but openpi's fields.
MAX_PROMPT = 1000
_ROTATIONS = ("none", "180")


@dataclass(frozen=True)
class Request:
    """One observation and what its message says about its episode."""

    observation: Observation
    reset: bool  #: a new episode begins with it
    episode: str | int | None  #: name of the episode that begins, which decides its noise
    seed: int | None  #: seed of the episode that begins


@dataclass(frozen=True)
class Reader:
    """Reads messages for one policy.

    A view is found under ``observation/<view>`` or under openpi's own names: ``observation/image`` is the first view
    that no arm carries, ``observation/wrist_image`` the first that one does.
    """

    data: DataSettings
    conventions: Conventions

    def names(self, view: str) -> tuple[str, ...]:
        """Fields that a view may be sent as."""
        wrist = wrist_views(self.data.views)
        firsts = {"observation/image": [v for v in self.data.views if v not in wrist][:1]}
        firsts["observation/wrist_image"] = list(wrist[:1])
        return (f"observation/{view}", *(name for name, views in firsts.items() if view in views))

    def metadata(self) -> dict[str, Any]:
        """What a client must send, and what the actions mean."""
        data, conventions = self.data, self.conventions
        return {
            "suite": data.suite,
            "views": {view: list(self.names(view)) for view in data.views},
            "image_size": [data.image_height, data.image_width],
            "image_rotation": conventions.image_rotation,
            "state_dim": data.state_dim,
            "state_layout": conventions.state_layout,
            "action_dim": data.action_dim,
            "action_horizon": data.action_chunk,
            "action": conventions.action,
            "gripper": conventions.gripper,
            "control_hz": data.control_hz,
        }

    def __call__(self, message: Mapping[str, Any]) -> Request:
        """Make a request of a message.

        Raises:
            DataError: names the field that is missing or does not fit, and what is expected.
        """
        stored = message.get("image_rotation", self.conventions.image_rotation)
        if not isinstance(stored, str) or stored not in _ROTATIONS:
            raise DataError("image_rotation: send 'none' (a simulator's raw buffer) or '180' (turned already)")
        prompt = _prompt(message)
        images = {view: self._image(message, view, stored) for view in self.data.views}
        instruction = prompt.replace(RESET, "").strip()
        if not instruction:
            raise DataError("prompt: is empty; send the instruction, such as 'lift the red cube'")
        observation = Observation(images, self._state(message), instruction)
        check_observation(observation, self.data, self.conventions)
        episode, seed, reset = (_plain(message.get(name)) for name in ("episode", "seed", "reset"))
        if not (
            episode is None or isinstance(episode, int) or (isinstance(episode, str) and len(episode) <= MAX_PROMPT)
        ):
            raise DataError(f"episode: {_shown(episode)}; send a name or a number")
        if not (seed is None or isinstance(seed, int)):
            raise DataError(f"seed: {_shown(seed)}; send an integer")
        if not (reset is None or isinstance(reset, int)):
            raise DataError(f"reset: {_shown(reset)}; send true or false")
        return Request(observation, bool(reset) or RESET in prompt, episode, seed)

    def _image(self, message: Mapping[str, Any], view: str, stored: str) -> NDArray[np.uint8]:
        """A view's image in the size and rotation trained with."""
        names = self.names(view)
        found = [name for name in names if name in message]
        if not found:
            raise DataError(f"{' or '.join(names)}: missing; send the image of view {view!r}")
        image = message[found[0]]
        expected = f"{found[0]}: {_shown(image)}; send an RGB image, uint8 (H, W, 3)"
        if not isinstance(image, np.ndarray) or image.ndim != 3 or 0 in image.shape:
            raise DataError(expected)
        if image.shape[2] != 3 and image.shape[0] == 3:  # openpi's servers take channels first, and floats, too
            image = np.moveaxis(image, 0, 2)
        if image.dtype.kind == "f":
            if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
                raise DataError(f"{expected}, or floats between 0 and 1")
            image = (255 * image).astype(np.uint8)
        if image.dtype != np.uint8 or image.shape[2] != 3:
            raise DataError(expected)
        height, width = self.data.image_height, self.data.image_width
        prepared = preparation(stored, self.conventions.image_rotation, False, height, width)
        return np.ascontiguousarray(prepared(image))

    def _state(self, message: Mapping[str, Any]) -> NDArray[np.float32]:
        """The field ``observation/state`` as float32."""
        state = message.get("observation/state")
        expected = (
            f"observation/state: {_shown(state)}; send {self.data.state_dim} finite numbers "
            f"({self.conventions.state_layout})"
        )
        if isinstance(state, list) and all(type(value) in (int, float) for value in state):
            state = np.asarray(state, np.float64)
        if not isinstance(state, np.ndarray) or state.dtype.kind not in "iuf" or state.shape != (self.data.state_dim,):
            raise DataError(expected)
        with np.errstate(over="ignore"):
            single = state.astype(np.float32)
        if not np.isfinite(single).all():
            raise DataError(expected)
        return single


def _prompt(message: Mapping[str, Any]) -> str:
    """The field ``prompt``."""
    prompt = _plain(message.get("prompt"))
    if isinstance(prompt, str) and len(prompt) <= MAX_PROMPT and prompt.isprintable():
        return prompt
    raise DataError(
        f"prompt: {_shown(prompt)}; send the instruction, a string of at most {MAX_PROMPT} printable characters"
    )


def _plain(value: Any) -> Any:
    """A NumPy number, or an array of no dimensions, as Python's own; everything else as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _shown(value: Any) -> str:
    """A value of anybody's message in a few words."""
    if value is None:
        return "missing"
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
