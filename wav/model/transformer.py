"""WAVTransformer: the video, the value and the action expert of section 4.2 as one diffusers model.

The video expert foresees; the value expert judges what it foresees; the action expert acts on both. Each is a module
that is called by itself (training, planning), or all in one ``forward``. Rows are samples first; candidates (planning)
and draws (training) ride as extra rows or as an extra axis and share their sample's keys and values.

On disk the parameters have the names of LTX-Video, GE-Base and the WAV reference (:mod:`wav.model.loading`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from wav.errors import ConfigError
from wav.model.experts import ACTION_EXPERTS, ActionExpert, Expert, ValueExpert
from wav.model.layers import Blocks
from wav.model.video import TextContext, VideoExpert


class WAVOutput(NamedTuple):
    """Velocities of the three experts; None for what was not asked."""

    video: Tensor
    value: Tensor | None
    action: Tensor | None


class WAVTransformer(ModelMixin, ConfigMixin):
    """The World-Value-Action transformer.

    Sizes: inner width D = heads * head_dim of the video, value and action parts; channels of latents, captions, value
    (9 or 16 reward terms + return) and action (action + state) tokens. ``rope_interpolation_scale``: seconds, pixels,
    pixels of one latent; ``*_rope_base`` divide the experts' token positions; ``action_kind`` names the class of
    the action expert. ``patch_size``, ``activation_fn``, ``qk_norm`` and ``norm_elementwise_affine`` exist for
    LTX-Video's configuration and take its values only.

    Attributes:
        video: the video expert.
        value: the value expert; None in a model without one.
        action: the action expert; None in a model without one.

    Raises:
        ConfigError: a size does not fit or a fixed option has another value.
    """

    _supports_gradient_checkpointing = True

    video: VideoExpert
    value: ValueExpert
    action: ActionExpert

    @register_to_config
    def __init__(
        self,
        in_channels: int = 128,
        out_channels: int = 128,
        patch_size: int = 1,
        patch_size_t: int = 1,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 2048,
        num_layers: int = 28,
        activation_fn: str = "gelu-approximate",
        qk_norm: str = "rms_norm_across_heads",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        attention_bias: bool = True,
        attention_out_bias: bool = True,
        use_view_embed: bool = True,
        max_view: int = 3,
        action_expert: bool = True,
        action_in_channels: int = 15,
        action_out_channels: int = 15,
        action_num_attention_heads: int = 16,
        action_attention_head_dim: int = 32,
        value_expert: bool = True,
        value_in_channels: int = 10,
        value_num_attention_heads: int = 16,
        value_attention_head_dim: int = 32,
        rope_interpolation_scale: Sequence[float] = (8 / 30, 32.0, 32.0),
        action_rope_base: int = 54,
        value_rope_base: int = 57,
        action_kind: str = "paper",
    ) -> None:
        super().__init__()
        _check_config(self.config)
        self.video = VideoExpert(self.config)
        self.value = ValueExpert(self.config) if value_expert else None  # type: ignore[assignment]
        self.action = ACTION_EXPERTS[action_kind](self.config) if action_expert else None  # type: ignore[assignment]

    @property
    def has_value(self) -> bool:
        """Whether there is a value expert, hence planning."""
        return self.value is not None

    def expert(self, name: str) -> Expert:
        """The expert ``value`` or ``action``; raises ConfigError where the model has none."""
        found: Expert | None = getattr(self, name)
        if found is None:
            raise ConfigError(f"model.{name}_expert = False: this model has no {name} expert; build one that has")
        return found

    def recompute(self, layers: int) -> None:
        """Let gradient checkpointing, where it is on, recompute the first ``layers`` of every expert, not all."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.recomputed = layers

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run every block as one compiled graph from its next call on; names of parameters stay as they are.

        Blocks of a kind share their graphs, one for each shape, dtype and mode that they meet; more than eight of them
        need :func:`wav.code_cache.prepare_compiler` first.
        """
        for module in self.modules():
            if isinstance(module, Blocks):
                for block in module:
                    block.compile(backend=backend, fullgraph=True, dynamic=False)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        value_tokens: Tensor | None = None,
        value_timestep: Tensor | None = None,
        action_tokens: Tensor | None = None,
        action_timestep: Tensor | None = None,
        history: Tensor | None = None,
    ) -> WAVOutput:
        """Video, then values given the video, then actions given both; without tokens an expert is skipped.

        Arguments as the experts' own. Value tokens are one trajectory per sample, (B, A, C), where actions read them.
        """
        velocity, seen = self.video(latents, timestep, text, text_mask)
        values = actions = judged = None
        if value_tokens is not None:
            values, judged = self.expert("value")(value_tokens, value_timestep, seen)
        if action_tokens is not None:
            actions = self.expert("action")(action_tokens, action_timestep, seen, judged, history)
        return WAVOutput(velocity, values, actions)

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "10GB") -> None:
        """Write config.json and weights under their published names (:func:`wav.model.loading.save_model`)."""
        from wav.model.loading import save_model  # which imports this module

        save_model(self, folder, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WAVTransformer:
        """The model in a local folder (:func:`wav.model.loading.load_model`)."""
        from wav.model.loading import load_model  # which imports this module

        return load_model(folder)


def _check_config(config: Any) -> None:
    """Refuse options that the architecture fixes and sizes that cannot work; raises ConfigError."""
    dim, kind = config.num_attention_heads * config.attention_head_dim, config.action_kind
    if kind not in ACTION_EXPERTS:
        raise ConfigError(f"model.action_kind = {kind!r}: unknown; use one of {', '.join(ACTION_EXPERTS)}")
    fixed = {
        "patch_size": 1,
        "patch_size_t": 1,
        "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": False,
        "cross_attention_dim": dim,
    }
    for name, wanted in fixed.items():
        if config[name] != wanted:
            raise ConfigError(f"model config {name} = {config[name]!r}: only {wanted!r} is built; correct config.json")
    if dim < 12 or dim % 2:
        raise ConfigError(f"model.heads * model.head_dim = {dim}: must be even and at least 12; raise model.head_dim")
