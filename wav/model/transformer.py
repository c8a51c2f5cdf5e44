"""WAVTransformer: LTX-Video's DiT over several camera views, a value and an action expert, as one diffusers model.

Names and shapes of the state dict are those of LTX-Video, GE-Base and the WAV reference, so that their checkpoints load
without a conversion table. Rows are samples first; candidates (planning) and draws (training) ride as extra rows or as
an extra axis and share their sample's keys and values instead of tiling them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from wav.errors import ConfigError
from wav.model.experts import ExpertBlock, ExpertParts
from wav.model.kernels import Linear
from wav.model.layers import CaptionProjection, KeyValue, TimeEmbedding, adaln_table, modulated_head
from wav.model.reads import Rows, divide, select
from wav.model.rope import video_rope
from wav.model.video import TextContext, VideoBlock, pack, unpack

JOINT_EVERY = 3  # layers 0, 3, 6, ... attend across views


class VideoOutput(NamedTuple):
    """``velocity`` (N, V, C, F, h, w) or None; ``features``: output of every block, (N, V * F * h * w, D)."""

    velocity: Tensor | None
    features: tuple[Tensor, ...]


class ExpertOutput(NamedTuple):
    """``velocity`` like the tokens; ``features``: output of every block, (B, A, d), or (B, R, A, d) for R draws."""

    velocity: Tensor
    features: tuple[Tensor, ...]


class ActionCache(NamedTuple):
    """Keys and values the action expert reads, per layer; ``value`` is None without value features."""

    video: tuple[KeyValue, ...]
    value: tuple[KeyValue, ...] | None


class WAVOutput(NamedTuple):
    """Velocities of one stage's forward; None for what was not asked."""

    video: Tensor | None
    value: Tensor | None
    action: Tensor | None


class WAVTransformer(ModelMixin, ConfigMixin):
    """The World-Value-Action transformer.

    Sizes: inner width D = heads * head_dim of the video, value and action parts; channels of latents, captions, value
    (9 or 16 reward terms + return) and action (action + state) tokens. ``rope_interpolation_scale``: seconds, pixels,
    pixels of one latent; ``*_rope_base`` divide the experts' token positions. ``patch_size``, ``activation_fn``,
    ``qk_norm`` and ``norm_elementwise_affine`` exist for LTX-Video's configuration and take its values only.

    Raises:
        ConfigError: a size does not fit or a fixed option has another value.
    """

    proj_in: nn.Linear
    proj_out: nn.Linear
    scale_shift_table: nn.Parameter
    view_embed: nn.Parameter
    view_ada: nn.Module
    time_embed: nn.Module
    transformer_blocks: nn.ModuleList
    caption_projection: nn.Module
    gradient_checkpointing: bool

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VideoBlock", "ExpertBlock"]  # noqa: RUF012 (diffusers' own form)

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
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        _check_config(self.config, dim)
        self.scale_shift_table = adaln_table(2, dim)
        self.proj_in = Linear(in_channels, dim)
        self.time_embed = TimeEmbedding(dim)
        if use_view_embed:
            self.view_embed = nn.Parameter(torch.randn(max_view, dim) / dim**0.5)
            self.view_ada = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.caption_projection = CaptionProjection(caption_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            VideoBlock(dim, num_attention_heads, i % JOINT_EVERY == 0, attention_bias, attention_out_bias, eps=norm_eps)
            for i in range(num_layers)
        )
        self.proj_out = Linear(dim, out_channels)
        value_dim = value_num_attention_heads * value_attention_head_dim if value_expert else None
        if value_expert:
            self._add_expert("value", value_num_attention_heads, value_attention_head_dim, None)
        if action_expert:
            self._add_expert("action", action_num_attention_heads, action_attention_head_dim, value_dim)
        self.gradient_checkpointing, self.recomputed_layers = False, num_layers

    def _add_expert(self, name: str, heads: int, head_dim: int, value_dim: int | None) -> None:
        """Register an expert's modules under ``{name}_...``."""
        config, dim = self.config, heads * head_dim
        channels = config[f"{name}_in_channels"]
        video_dim = config.num_attention_heads * config.attention_head_dim
        self.register_parameter(f"{name}_scale_shift_table", adaln_table(2, dim))
        self.add_module(f"{name}_proj_in", Linear(channels, dim))
        self.add_module(f"{name}_time_embed", TimeEmbedding(dim))
        blocks = (ExpertBlock(dim, heads, video_dim, value_dim, config.norm_eps) for _ in range(config.num_layers))
        self.add_module(f"{name}_blocks", nn.ModuleList(blocks))
        self.add_module(f"{name}_proj_out", Linear(dim, config.get(f"{name}_out_channels", channels)))

    def _expert(self, name: str) -> ExpertParts:
        if not self.config[f"{name}_expert"]:
            raise ConfigError(f"model.{name}_expert = False: this model has no {name} expert; build one that has")
        names = ("proj_in", "time_embed", "blocks", "scale_shift_table", "proj_out")
        return ExpertParts(
            **{part: getattr(self, f"{name}_{part}") for part in names}, rope_base=self.config[f"{name}_rope_base"]
        )

    @property
    def has_value(self) -> bool:
        """Whether there is a value expert, hence planning."""
        return bool(self.config.value_expert)

    def _block(self, index: int, block: nn.Module, *args: Any) -> Tensor:
        """Block ``index``, recomputed in the backward pass where gradient checkpointing is on and reaches it."""
        if self.gradient_checkpointing and index < self.recomputed_layers and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)  # type: ignore[no-any-return, misc]
        return block(*args)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None, cache: bool = False) -> TextContext:
        """Project instruction embeddings ``text`` (B, L, C) once; ``text_mask`` (B, L) is 1 for tokens that count.

        ``cache``: compute every layer's K/V too, for repeated passes without gradients.
        """
        dtype = self.proj_in.weight.dtype
        states = self.caption_projection(text.to(dtype))
        bias = None
        if text_mask is not None:
            bias = ((1 - text_mask.to(dtype)) * -10000.0)[:, None, None, :]
        blocks = cast("list[VideoBlock]", list(self.transformer_blocks))
        keys = tuple(block.attn2.keys_values(states) for block in blocks) if cache else None
        return TextContext(states, bias, keys)

    def _time(self, timestep: Tensor, views: int) -> tuple[Tensor, Tensor]:
        """Return temb (N, V, 1 or F, 6, D) and e (N, V, 1 or F, D); one row per frame and view, never per token."""
        if timestep.ndim == 1:
            timestep = timestep[:, None, None]
        elif timestep.ndim == 2:
            timestep = timestep[:, None, :]
        temb, e = self.time_embed(timestep)
        if self.config.use_view_embed:
            view = self.view_embed[:views]
            temb = temb + self.view_ada(view)[:, None]
            e = e + view[:, None]
        return temb.unflatten(-1, (6, -1)), e

    def video(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        need_head: bool = True,
        first_frame: int = 0,
    ) -> VideoOutput:
        """One pass of the video DiT.

        Args:
            latents: (N, V, C, F, h, w), memory frames first.
            timestep: sigma * 1000, (N,), (N, F) or (N, V, F); 0 for memory frames.
            text: (B, L, C) or :meth:`encode_text`'s result; N = B * M, rows b * M + m are candidates of sample b.
            text_mask: (B, L), for a ``text`` tensor.
            need_head: False skips the head where only features are wanted.
            first_frame: where only the velocity from this frame on is wanted: the last block computes no others,
                ``velocity`` is (N, V, C, F - first_frame, h, w), and there are no features.

        Raises:
            ConfigError: more views than the model embeds.
        """
        _, views, _, frames, height, width = latents.shape
        if self.config.use_view_embed and views > self.config.max_view:
            raise ConfigError(
                f"views = {views}: the model embeds {self.config.max_view}; use fewer or raise model.max_views"
            )
        if not isinstance(text, TextContext):
            text = self.encode_text(text, text_mask)
        h = self.proj_in(pack(latents).to(self.proj_in.weight.dtype))
        temb, e = self._time(timestep, views)
        temb = temb.expand(-1, -1, frames, -1, -1)
        scale = tuple(self.config.rope_interpolation_scale)
        rope = video_rope(h.shape[-1], frames, height, width, scale, h.device)
        features = []
        for index, block in enumerate(self.transformer_blocks.children()):
            first = first_frame if index == self.config.num_layers - 1 else 0
            h = self._block(index, block, h, temb, rope, text.layer(index), text.bias, first)
            features.append(h.flatten(1, 3))
        velocity = None
        if need_head:
            later = e[:, :, first_frame:] if e.shape[2] > 1 else e
            tokens = self.proj_out(modulated_head(h, self.scale_shift_table, later.unsqueeze(3)))
            velocity = unpack(tokens, height, width)
        return VideoOutput(velocity, () if first_frame else tuple(features))

    def value_cache(self, features: Sequence[Tensor]) -> tuple[KeyValue, ...]:
        """K/V of the value expert's cross-attention, from video ``features`` (B, L, D) per layer."""
        blocks = self._expert("value").layers
        return tuple(block.caches(f, None)[0] for block, f in zip(blocks, features, strict=True))

    def action_cache(self, features: Sequence[Tensor], value_features: Sequence[Tensor] | None = None) -> ActionCache:
        """K/V of the action expert's cross-attentions, from video and value features per layer."""
        blocks = self._expert("action").layers
        values: Sequence[Tensor | None] = [None] * len(blocks) if value_features is None else value_features
        pairs = [block.caches(f, v) for block, f, v in zip(blocks, features, values, strict=True)]
        value = None if value_features is None else tuple(cast(KeyValue, pair[1]) for pair in pairs)
        return ActionCache(tuple(pair[0] for pair in pairs), value)

    def _run_expert(
        self,
        parts: ExpertParts,
        tokens: Tensor,
        timestep: Tensor,
        video: Sequence[Tensor | KeyValue],
        value: Sequence[Tensor | KeyValue] | None,
        history: Tensor | None,
    ) -> ExpertOutput:
        """Tokens through an expert's blocks; see :meth:`value` and :meth:`action`."""
        shape, chunk = tokens.shape, tokens.shape[-2]
        dtype = parts.proj_in.weight.dtype
        if len(shape) == 4:
            timestep = timestep.reshape(shape[0], -1).expand(shape[:2]).reshape(-1)
            history = None if history is None else history.repeat_interleave(shape[1], 0)
            tokens = tokens.flatten(0, 1)
        history = None if history is None else history.to(dtype)
        h, temb, e = parts.embed(tokens.to(dtype), timestep, history)
        rope = parts.rope(h)
        features = []
        for index, block in enumerate(parts.blocks.children()):
            h = self._block(index, block, h, temb, rope, video[index], None if value is None else value[index])
            features.append(h[:, -chunk:].reshape(*shape[:-1], -1))
        return ExpertOutput(parts.head(h[:, -chunk:], e).view(shape), tuple(features))

    def value(
        self,
        tokens: Tensor,
        timestep: Tensor,
        features: Sequence[Tensor | KeyValue],
        history: Tensor | None = None,
    ) -> ExpertOutput:
        """Velocity of value trajectories given video features.

        Args:
            tokens: (B, A, C), or (B, R, A, C) for R draws per sample that share its features.
            timestep: (B,), or (B, R); sigma * 1000.
            features: per layer video features (B, L, D), or :meth:`value_cache`'s result.
            history: (B, 1, C), a clean token in front (the reference accepts one and never uses it).

        Raises:
            ConfigError: the model has no value expert.
        """
        return self._run_expert(self._expert("value"), tokens, timestep, features, None, history)

    def action(
        self,
        tokens: Tensor,
        timestep: Tensor,
        video_features: Sequence[Tensor] | ActionCache,
        value_features: Sequence[Tensor] | None = None,
        history: Tensor | None = None,
    ) -> Tensor:
        """Velocity of action chunks given video and value features.

        Args:
            tokens: (B, A, C), or (B, R, A, C) for R draws per sample that share its features.
            timestep: (B,), or (B, R); sigma * 1000.
            video_features: per layer (B, L, D), or :meth:`action_cache`'s result (then ``value_features`` is unused).
            value_features: per layer (B, A, d_value); None skips attn3.
            history: (B, 1, C) = [zeros | state], a clean token in front; dropped before the head.

        Raises:
            ConfigError: the model has no action expert.
        """
        video: Sequence[Tensor | KeyValue] = cast("Sequence[Tensor]", video_features)
        value: Sequence[Tensor | KeyValue] | None = value_features
        if isinstance(video_features, ActionCache):
            video, value = video_features
        return self._run_expert(self._expert("action"), tokens, timestep, video, value, history).velocity

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        *,
        need_video: bool = True,
        freeze_video: bool = False,
        first_frame: int = 0,
        features: Sequence[Tensor] | None = None,
        value_tokens: Tensor | None = None,
        value_timestep: Tensor | None = None,
        value_rows: Rows = None,
        value_sources: int | None = None,
        action_tokens: Tensor | None = None,
        action_timestep: Tensor | None = None,
        action_rows: Rows = None,
        action_value_rows: Rows = None,
        history: Tensor | None = None,
    ) -> WAVOutput:
        """One stage's whole computation (what a DeepSpeed engine calls): video, then value, then action.

        The experts may run on some samples only: ``value_rows`` and ``action_rows`` say which rows of the video pass
        their rows read, ``action_value_rows`` which value rows feed attn3 (None: all, in order). Value rows that feed
        attn3 must be one pass per sample (3-D tokens). Without ``value_tokens`` attn3 is skipped. ``value_sources``:
        ``value_rows`` picks among the first this many rows, some several times, and their keys and values are
        projected once; as many value rows as sources are these in order. ``freeze_video`` runs the video pass without
        gradients and without its head; ``features`` replaces it by what it would give
        (:class:`wav.model.frozen.FrozenVideo`). ``first_frame``: of the velocity, where there is no expert. Other
        arguments as in :meth:`video`, :meth:`value` and :meth:`action`.
        """
        video = None
        if features is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_video):
                head = need_video and not freeze_video
                video, features = self.video(latents, timestep, text, text_mask, head, first_frame)
        for_value, for_action = divide(
            features, None if value_tokens is None else value_rows, value_sources,
            None if action_tokens is None else action_rows,
        )  # fmt: skip
        value: ExpertOutput | None = None
        if value_tokens is not None and value_timestep is not None:
            reads: Sequence[Tensor | KeyValue] = for_value
            if value_sources is not None:
                reads = cache = self.value_cache(for_value)
                if len(value_tokens) != value_sources:
                    reads = [KeyValue(k[value_rows], v[value_rows]) for k, v in cache]
            value = self.value(value_tokens, value_timestep, reads)
        action = None
        if action_tokens is not None and action_timestep is not None:
            conditions = None if value is None else select(value.features, action_value_rows)
            action = self.action(action_tokens, action_timestep, for_action, conditions, history)
        return WAVOutput(video, None if value is None else value.velocity, action)


def _check_config(config: Any, dim: int) -> None:
    """Refuse options that the architecture fixes and sizes that cannot work; raises ConfigError."""
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
