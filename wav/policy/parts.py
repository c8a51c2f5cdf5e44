"""Whether the parts of a policy were made for each other, and whether an observation is what they were trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wav.data.conventions import Conventions
from wav.data.statistics import Statistics
from wav.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from wav.codec import Codec
    from wav.config import DataSettings
    from wav.model import WAVTransformer
    from wav.sim.env import Observation


def check_parts(
    model: WAVTransformer, codec: Codec, statistics: Statistics, conventions: Conventions, data: DataSettings
) -> None:
    """Raise CheckpointError where the parts of a policy do not belong together."""
    config, value = model.config, statistics.key("value").dimension if model.has_value else 0
    pairs = [
        ("latent channels", config.in_channels, codec.channels, "codec"),
        ("action and state channels", config.action_in_channels, data.action_dim + data.state_dim, "data settings"),
        ("value channels", config.value_in_channels if model.has_value else 0, value, "statistics"),
        ("actions", data.action_dim, statistics.key("action").dimension, "statistics"),
        ("state", data.state_dim, statistics.key("state").dimension, "statistics"),
        ("views", tuple(data.views), tuple(conventions.views), "conventions"),
        ("image height", data.image_height, conventions.image_height, "conventions"),
        ("image width", data.image_width, conventions.image_width, "conventions"),
    ]
    for what, wanted, found, where in pairs:
        if wanted != found:
            raise CheckpointError(f"policy: {what} = {wanted} but the {where} have {found}; use parts of one training")


def check_observation(observation: Observation, data: DataSettings, conventions: Conventions) -> None:
    """Raise DataError unless views, image sizes, types and the state are those of training."""
    if set(observation.images) != set(data.views):
        raise DataError(f"views = {sorted(observation.images)}: the policy sees {sorted(data.views)}; pass those")
    size = (data.image_height, data.image_width, 3)
    for view in data.views:
        image = observation.images[view]
        if image.shape != size or image.dtype != np.uint8:
            raise DataError(
                f"image of view {view!r}: {image.dtype} {image.shape}; pass uint8 {size}, the size trained with"
            )
    state = np.asarray(observation.state)
    if state.shape != (data.state_dim,) or not np.isfinite(state).all():
        raise DataError(
            f"state: shape {state.shape}, values {state.tolist()}; pass {data.state_dim} finite numbers "
            f"({conventions.state_layout})"
        )
