"""Whether the parts of a policy were made for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wav.data.conventions import Conventions
from wav.data.statistics import Statistics
from wav.errors import CheckpointError

if TYPE_CHECKING:
    from wav.codec import Codec
    from wav.config import DataSettings
    from wav.model import WAVTransformer


def check_parts(
    model: WAVTransformer, codec: Codec, statistics: Statistics, conventions: Conventions, data: DataSettings
) -> None:
    """Raise CheckpointError where the parts of a policy do not belong together."""
    pairs = [
        ("latent channels", model.config.in_channels, codec.channels, "codec"),
        (
            "action and state channels",
            model.config.action_in_channels,
            data.action_dim + data.state_dim,
            "data settings",
        ),
        ("actions", data.action_dim, statistics.key("action").dimension, "statistics"),
        ("state", data.state_dim, statistics.key("state").dimension, "statistics"),
        ("views", tuple(data.views), tuple(conventions.views), "conventions"),
        ("image height", data.image_height, conventions.image_height, "conventions"),
        ("image width", data.image_width, conventions.image_width, "conventions"),
    ]
    if model.has_value:
        pairs.append(
            ("value channels", model.config.value_in_channels, statistics.key("value").dimension, "statistics")
        )
    for what, wanted, found, where in pairs:
        if wanted != found:
            raise CheckpointError(f"policy: {what} = {wanted} but the {where} have {found}; use parts of one training")
