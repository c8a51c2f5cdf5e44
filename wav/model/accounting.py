"""What a parameter file costs: parameters, floating-point operations and memory, by formula (``wav summary``).

A matrix product (m, k) x (k, n) counts 2 m k n operations; norms, activations, rotations and softmax are not counted
(tests compare with torch's FlopCounterMode). The letters: L layers, D video width, d expert width, T video tokens of
a sample (views V x frames F x cells h w), A action chunk, S text tokens.

Per video layer: self-attention 4 projections and 4 T T' D (T' = T in every third layer, which joins the views,
otherwise T / V); text cross-attention 2 projections of T, 2 of S, and 4 T S D; feed-forward 2 x 4 D^2. Per expert
layer: the same over A tokens at width d, and cross-attention whose keys and values project T video tokens from D to
d: 4 T D d, the largest share, paid once per sample where rows share them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from wav.model.build import build_from_settings, value_channels
from wav.model.video import JOINT_EVERY

if TYPE_CHECKING:
    from wav.config import PlannerSettings, Settings, TrainJointSettings, TrainSettings, TrainValueSettings

TIME_WAVES = 256  #: width of the sinusoidal time embedding
#: Tensors of a block that autograd keeps for one token (or that live at once when the block is recomputed), in units
#: of the block's width: inputs, AdaLN and norms, q k v, attention, the 4 x wide feed-forward. Measured, see the tests.
SAVED_PER_TOKEN = 34


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass, apart by what their backward pass costs.

    ``linear``: products with weights, whose input needs a gradient (backward: twice the forward); ``first``: those
    whose input needs none (data, frozen features; backward: once); ``attention``: products of activations (twice,
    what a fused kernel recomputes not counted). ``blocks``: the part of all these that lies in transformer blocks,
    which gradient checkpointing runs again.
    """

    linear: float = 0.0
    first: float = 0.0
    attention: float = 0.0
    blocks: float = 0.0

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return self.linear + self.first + self.attention

    @property
    def backward(self) -> float:
        """Operations of the backward pass, recomputation left out."""
        return 2 * self.linear + self.first + 2 * self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear,
            self.first + other.first,
            self.attention + other.attention,
            self.blocks + other.blocks,
        )

    def __mul__(self, times: float) -> Flops:
        return Flops(self.linear * times, self.first * times, self.attention * times, self.blocks * times)

    def in_blocks(self) -> Flops:
        """The same, marked as inside transformer blocks."""
        return replace(self, blocks=self.forward)


@dataclass(frozen=True)
class Sizes:
    """Everything the formulas read; 0 for the width of an expert that the model lacks."""

    layers: int
    width: int
    value_width: int
    action_width: int
    views: int
    memory: int
    future: int
    height: int
    image_width: int
    chunk: int
    text: int
    latent_channels: int
    caption_channels: int
    value_channels: int
    action_channels: int

    @classmethod
    def of(cls, settings: Settings) -> Sizes:
        """Sizes that a parameter file means; the latent grid follows from ``encode.patch`` and ``encode.temporal``."""
        model, data, encode = settings.model, settings.data, settings.encode
        return cls(
            layers=model.layers,
            width=model.heads * model.head_dim,
            value_width=model.value_heads * model.value_head_dim if model.value_expert else 0,
            action_width=model.action_heads * model.action_head_dim,
            views=len(data.views),
            memory=data.memory_frames,
            future=1 + (data.future_frames - 1) // encode.temporal,
            height=data.image_height // encode.patch,
            image_width=data.image_width // encode.patch,
            chunk=data.action_chunk,
            text=data.text_tokens,
            latent_channels=encode.channels,
            caption_channels=encode.text_dim,
            value_channels=value_channels(data),
            action_channels=data.action_dim + data.state_dim,
        )

    @property
    def frames(self) -> int:
        """Latent frames F, memory and future."""
        return self.memory + self.future

    @property
    def tokens(self) -> int:
        """Video tokens T of a sample, all views."""
        return self.views * self.frames * self.height * self.image_width


def parameter_split(settings: Settings) -> dict[str, int]:
    """Parameters by part (video, value, action, total), counted on a model without memory."""
    with torch.device("meta"):
        model = build_from_settings(settings)
    split = {"video": 0, "value": 0, "action": 0}
    for name, parameter in model.named_parameters():
        split[name.split(".", 1)[0]] += parameter.numel()
    return {**split, "total": sum(split.values())}


def _time_embedding(rows: float, width: int) -> Flops:
    """Sinusoid to e (two linears) to the six AdaLN rows, for ``rows`` distinct timesteps."""
    return Flops(linear=rows * 2 * 7 * width**2, first=rows * 2 * TIME_WAVES * width)


def text_flops(sizes: Sizes, rows: float = 1, keys: bool = False) -> Flops:
    """Caption projection of ``rows`` instructions; ``keys``: every layer's text keys and values too (planning)."""
    S, D = sizes.text, sizes.width
    total = Flops(linear=rows * 2 * S * D**2, first=rows * 2 * S * sizes.caption_channels * D)
    return total + Flops(linear=rows * sizes.layers * 4 * S * D**2) if keys else total


def video_flops(sizes: Sizes, rows: float = 1, *, head: bool = True, planning: bool = False) -> Flops:
    """One pass of the video DiT over ``rows`` samples or candidates, without the caption projection.

    ``head``: with output projection; ``planning``: text keys and values, AdaLN rows and what the memory frames are in
    the first layer (:func:`memory_flops`) are there already.
    """
    T, D, S = sizes.tokens, sizes.width, sizes.text
    joint = math.ceil(sizes.layers / JOINT_EVERY)
    weights = sizes.layers * (2 * T * D**2 * (4 + 2 + 8) + (0 if planning else 4 * S * D**2))
    self_attention = 4 * T * D * (joint * T + (sizes.layers - joint) * T / sizes.views)
    blocks = Flops(linear=weights, attention=self_attention + sizes.layers * 4 * T * S * D).in_blocks()
    outer = Flops(first=2 * T * sizes.latent_channels * D)
    if head:
        outer += Flops(linear=2 * T * D * sizes.latent_channels)
    if planning:
        return (blocks + outer + memory_flops(sizes) * -1) * rows
    outer += _time_embedding(sizes.frames, D)
    return (blocks + outer) * rows + Flops(linear=2 * sizes.views * 6 * D**2)  # view_ada, once per pass


def memory_flops(sizes: Sizes) -> Flops:
    """The memory frames' embedding and first q, k and v, which do not depend on the future's noise."""
    tokens = sizes.tokens * sizes.memory / sizes.frames
    return Flops(linear=2 * tokens * 3 * sizes.width**2, first=2 * tokens * sizes.latent_channels * sizes.width)


def unwanted_flops(sizes: Sizes) -> Flops:
    """What the last block and the head would cost for a sample's memory tokens beyond their keys and values."""
    tokens, D = sizes.tokens * sizes.memory / sizes.frames, sizes.width
    seen = sizes.tokens / (1 if (sizes.layers - 1) % JOINT_EVERY == 0 else sizes.views)
    block = Flops(linear=2 * tokens * D**2 * (2 + 2 + 8), attention=4 * tokens * (seen + sizes.text) * D).in_blocks()
    return block + Flops(linear=2 * tokens * D * sizes.latent_channels)


def _expert_flops(sizes: Sizes, width: int, channels: int, tokens: int, draws: float) -> Flops:
    """An expert's pass over ``draws`` rows of ``tokens``, without cross-attention keys and values, and AdaLN rows."""
    weights = sizes.layers * 2 * tokens * width**2 * (4 + 2 + 8)
    attention = sizes.layers * (4 * tokens**2 * width + 4 * tokens * sizes.tokens * width)
    ends = Flops(linear=2 * tokens * width * channels, first=2 * tokens * channels * width)
    return (Flops(linear=weights, attention=attention).in_blocks() + ends) * draws


def video_keys(sizes: Sizes, width: int, rows: float = 1, *, frozen: bool = False) -> Flops:
    """An expert's keys and values of ``rows`` samples' video features; ``frozen``: the features need no gradient."""
    amount = rows * sizes.layers * 4 * sizes.tokens * sizes.width * width
    return (Flops(first=amount) if frozen else Flops(linear=amount)).in_blocks()


def value_flops(sizes: Sizes, draws: float = 1, *, planning: bool = False) -> Flops:
    """One value pass over ``draws`` trajectories, video keys and values not counted (:func:`video_keys`).

    ``planning``: AdaLN rows are there already.
    """
    total = _expert_flops(sizes, sizes.value_width, sizes.value_channels, sizes.chunk, draws)
    return total if planning else total + _time_embedding(draws, sizes.value_width)


def action_flops(sizes: Sizes, draws: float = 1, *, planning: bool = False) -> Flops:
    """One action pass over ``draws`` chunks, each behind its history token; keys and values not counted.

    ``planning``: AdaLN rows are there already.
    """
    A, d = sizes.chunk + 1, sizes.action_width
    total = _expert_flops(sizes, d, sizes.action_channels, A, draws)
    total += Flops() if planning else _time_embedding(draws + 1, d)
    unused = Flops(linear=2 * d * sizes.action_channels * draws)  # the head does not read the history token
    if sizes.value_width:
        reads = Flops(linear=sizes.layers * 4 * A * d**2, attention=sizes.layers * 4 * A * sizes.chunk * d)
        total += reads.in_blocks() * draws
    return total + unused * -1


def value_keys(sizes: Sizes, rows: float = 1) -> Flops:
    """The action expert's keys and values of ``rows`` samples' value features (attn3)."""
    return Flops(linear=rows * sizes.layers * 4 * sizes.chunk * sizes.value_width * sizes.action_width).in_blocks()


@dataclass(frozen=True)
class TrainingCost:
    """Operations per training sample."""

    forward: float
    backward: float
    recomputed: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.recomputed


def training_cost(sizes: Sizes, train: TrainSettings, batch: int) -> TrainingCost:
    """Operations per sample of a stage; ``batch``: samples of a forward pass, which share the view embedding.

    The video stage has no loss on memory frames, whose last outputs are not computed. The value stage runs the video
    part forward only, as planning does (AdaLN rows are kept and not counted). The joint stage's shares of action, value
    and video samples are those of ``action_probability``; value draws of a sample share its keys and values, which are
    kept, not recomputed.
    """
    video = text_flops(sizes, batch) + video_flops(sizes, batch, head=train.stage != "train_value")
    if train.stage == "pretrain_video":
        video += unwanted_flops(sizes) * -batch
    passes, idle = video, Flops()
    if train.stage == "train_value":
        if not sizes.value_width:
            return TrainingCost(0.0, 0.0, 0.0)
        passes = value_flops(sizes, batch * cast("TrainValueSettings", train).value_draws)
        passes += video_keys(sizes, sizes.value_width, batch, frozen=True)
        idle = text_flops(sizes, batch, keys=True) + memory_flops(sizes) * batch
        idle += video_flops(sizes, batch, head=False, planning=True)
    elif train.stage == "train_joint":
        joint = cast("TrainJointSettings", train)
        action = batch * joint.action_probability
        passes += action_flops(sizes, action * joint.action_draws) + video_keys(sizes, sizes.action_width, action)
        if sizes.value_width:
            rows = action + (batch - action) / 2 * joint.value_draws
            keys = video_keys(sizes, sizes.value_width, (batch + action) / 2)
            passes += value_flops(sizes, rows) + replace(keys, blocks=0.0) + value_keys(sizes, action)
    again = passes.blocks if train.gradient_checkpointing else 0.0
    return TrainingCost((passes.forward + idle.forward) / batch, passes.backward / batch, again / batch)


@dataclass(frozen=True)
class PlanCost:
    """Operations of one policy call for one observation: the search of Algorithm 1, and decoding the actions."""

    search: float
    act: float

    @property
    def total(self) -> float:
        """Both."""
        return self.search + self.act


def plan_cost(sizes: Sizes, planner: PlannerSettings) -> PlanCost:
    """A call as built: instruction and memory once, keys and values once per candidate, no candidate tiled.

    AdaLN rows are kept from call to call and not counted. ``planner.iterations`` 0, or a model without value expert,
    leaves the decoding alone.
    """
    M, N, steps = planner.video_samples, planner.value_samples, planner.denoise_steps

    def features(rows: int) -> Flops:
        total = video_flops(sizes, rows, head=False, planning=True)
        return total + video_keys(sizes, sizes.value_width, rows)

    search = Flops()
    act = text_flops(sizes, keys=True) + memory_flops(sizes) + features(1)
    act += video_keys(sizes, sizes.action_width) + action_flops(sizes, planning=True) * steps
    if sizes.value_width:
        search = features(M) + value_flops(sizes, M * N, planning=True) * (planner.score_steps or steps)
        act += value_flops(sizes, planning=True) + value_keys(sizes)
    return PlanCost((search * planner.iterations).forward, act.forward)


def reference_search(sizes: Sizes, iterations: int, M: int, N: int, steps: int) -> float:
    """Operations of the reference's search (spec section 8).

    The text projected for every candidate, a time embedding for every token, the video head computed and dropped, and
    the value expert's keys and values projected again for each of N samples and each Euler step.
    """
    D, d = sizes.width, sizes.value_width
    video = text_flops(sizes) + video_flops(sizes)
    video += _time_embedding(sizes.tokens, D) + _time_embedding(sizes.frames, D) * -1
    value = video_keys(sizes, d) + value_flops(sizes) + _time_embedding(sizes.chunk - 1, d)
    return iterations * (M * video.forward + M * N * steps * value.forward)


def trained_parameters(split: Mapping[str, int], train: TrainSettings) -> int:
    """Parameters that a stage trains: the video part, the value expert, or all."""
    if train.stage == "train_joint":
        return split["total"]
    return split["value"] if train.stage == "train_value" else split["video"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def memory_per_gpu(
    sizes: Sizes, split: Mapping[str, int], train: TrainSettings, zero_stage: int, gpus: int, micro_batch: int
) -> Memory:
    """Memory of a stage under DeepSpeed ZeRO.

    bf16: 2 bytes of weight, 2 of gradient, 12 of optimiser (float32 master weight, two moments); fp32: 4, 4 and 8.
    The averaged weights take 4 bytes and are always sharded. ZeRO-1 shards the optimiser, ZeRO-2 the gradients too,
    ZeRO-3 the weights too; frozen weights have neither gradients nor optimiser. Activations are an estimate
    (:func:`activation_bytes`); buffers, fragmentation and the CUDA context come on top.
    """
    number, state = (2, 12) if train.precision == "bf16" else (4, 8)
    trained = trained_parameters(split, train)
    shard = [1 / gpus if zero_stage >= level else 1.0 for level in (1, 2, 3)]
    return Memory(
        weights=number * split["total"] * shard[2],
        gradients=number * trained * shard[1],
        optimizer=state * trained * shard[0],
        average=4 * trained / gpus,
        activations=activation_bytes(sizes, train, micro_batch),
    )


def activation_bytes(sizes: Sizes, train: TrainSettings, micro_batch: int) -> float:
    """Estimate of the activations kept for the backward pass of one micro-batch.

    Every block's output is kept (the experts read it). With gradient checkpointing one video block's inner tensors
    are alive on top, otherwise those of all blocks; a frozen video part keeps its outputs alone. ``auto`` counts as on.
    """
    number = 2 if train.precision == "bf16" else 4
    video, kept = sizes.tokens * sizes.width, 1 if train.gradient_checkpointing else sizes.layers
    elements: float = sizes.layers * video
    if train.stage != "train_value":
        elements += kept * SAVED_PER_TOKEN * video
    experts = 0.0
    if train.stage == "train_value":
        experts = cast("TrainValueSettings", train).value_draws * sizes.value_width
    elif train.stage == "train_joint":
        joint = cast("TrainJointSettings", train)
        experts = joint.action_draws * sizes.action_width + joint.value_draws * sizes.value_width
    elements += sizes.chunk * experts * (sizes.layers + kept * SAVED_PER_TOKEN)
    if experts:  # one layer's keys and values, or all
        elements += kept * 4 * sizes.tokens * (sizes.value_width + sizes.action_width)
    return number * micro_batch * elements
