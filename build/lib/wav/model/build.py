"""A WAVTransformer of the sizes that params.yaml asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wav.model.transformer import WAVTransformer
from wav.seeding import derive_seed

if TYPE_CHECKING:
    from wav.config import DataSettings, ModelSettings, Settings


def value_channels(data: DataSettings) -> int:
    """Channels of the value expert: 7 reward terms per arm, 2 of the top camera, and the return.

    Arms are counted by their wrist cameras, as the reward does: arms of six joints and of seven have the same terms.
    """
    from wav.data.conventions import wrist_views  # the model itself knows no data

    return 7 * max(1, len(wrist_views(data.views))) + 3


def build_from_settings(settings: Settings, seed: int = 0) -> WAVTransformer:
    """The transformer that a whole parameter file means: channels from sections ``encode`` and ``data``.

    Under ``torch.device("meta")`` it has every shape and no memory.
    """
    channels = (settings.encode.channels, settings.encode.text_dim, value_channels(settings.data))
    return build_model(settings.model, settings.data, *channels, seed=seed)


def build_model(
    model: ModelSettings,
    data: DataSettings,
    latent_channels: int,
    caption_channels: int,
    value_channels: int = 10,
    seed: int = 0,
) -> WAVTransformer:
    """A transformer of the sizes in params.yaml, initialised from ``seed``.

    Args:
        model: section ``model``, or anything with its attributes (also the next one): a machine that only plans and
            measures needs no parameter files.
        data: section ``data`` (action and state widths).
        latent_channels: of the codec.
        caption_channels: width of the text encoder.
        value_channels: reward terms + return (10 single-arm, 17 bimanual).
        seed: of the random initialisation.
    """
    channels = data.action_dim + data.state_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model.init"))
        built: WAVTransformer = WAVTransformer(
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_attention_heads=model.heads,
            attention_head_dim=model.head_dim,
            cross_attention_dim=model.heads * model.head_dim,
            num_layers=model.layers,
            caption_channels=caption_channels,
            max_view=model.max_views,
            action_in_channels=channels,
            action_out_channels=channels,
            action_num_attention_heads=model.action_heads,
            action_attention_head_dim=model.action_head_dim,
            action_kind=model.action_kind,
            value_expert=model.value_expert,
            value_in_channels=value_channels,
            value_num_attention_heads=model.value_heads,
            value_attention_head_dim=model.value_head_dim,
            rope_interpolation_scale=tuple(model.rope_scale),
        )
    return built
