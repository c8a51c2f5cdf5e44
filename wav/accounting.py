"""What a parameter file costs (``wav summary``): parameters, floating-point operations and memory.

Operations are counted, not calculated: the objective that trains and the model that plans run on tensors of torch's
meta device, which have shapes and no memory, under torch's FlopCounterMode. It counts a matrix product (m, k) x (k, n)
as 2 m k n operations and leaves norms, activations, rotations and softmax out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wav.model import WAVTransformer
from wav.model.build import build_from_settings
from wav.model.video import JOINT_EVERY
from wav.planning.types import PUBLISHED, Levels
from wav.training.activations import Sizes, activation_bytes

if TYPE_CHECKING:
    from wav.config import PlannerSettings, Settings, TrainSettings

#: Samples of a counted step: shares of roles come out to a thousandth, and what a pass does once weighs nothing.
SAMPLES = 1000
META = torch.device("meta")


def model_of(sizes: Sizes) -> WAVTransformer:
    """A transformer of these sizes without memory; how heads split a width changes no count."""
    with META:
        model: WAVTransformer = WAVTransformer(
            in_channels=sizes.latent_channels,
            out_channels=sizes.latent_channels,
            num_attention_heads=1,
            attention_head_dim=sizes.width,
            cross_attention_dim=sizes.width,
            num_layers=sizes.layers,
            caption_channels=sizes.caption_channels,
            max_view=sizes.views,
            action_in_channels=sizes.action_channels,
            action_out_channels=sizes.action_channels,
            action_num_attention_heads=1,
            action_attention_head_dim=sizes.action_width,
            value_expert=sizes.value_width > 0,
            value_in_channels=sizes.value_channels,
            value_num_attention_heads=1,
            value_attention_head_dim=sizes.value_width,
        )
    return model


def parameter_split(settings: Settings) -> dict[str, int]:
    """Parameters by part (video, value, action, total), counted on a model without memory."""
    with META:
        model = build_from_settings(settings)
    split = {"video": 0, "value": 0, "action": 0}
    for name, expert in model.named_children():
        split[name] = sum(parameter.numel() for parameter in expert.parameters())
    return {**split, "total": sum(split.values())}


def trained_parameters(split: Mapping[str, int], train: TrainSettings) -> int:
    """Parameters that a stage trains: the video part, the value expert, or all."""
    if train.stage == "train_joint":
        return split["total"]
    return split["value"] if train.stage == "train_value" else split["video"]


def count(call: Callable[[], Any]) -> float:
    """Operations of ``call``, which computes on the meta device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        call()
    return float(counter.get_total_flops())


def grown(cost: Callable[[int], float], size: int, step: int = 1) -> float:
    """``cost(size)`` of a cost that grows by a constant every ``step``, from two small sizes."""
    low = size % step or step
    first = cost(low)
    return first if size == low else first + (size - low) / step * (cost(low + step) - first)


def of_layers(cost: Callable[[Sizes], float], sizes: Sizes) -> float:
    """``cost(sizes)``, counted on few layers: each period of joint and per-view layers costs the same."""
    return grown(lambda layers: cost(replace(sizes, layers=layers)), sizes.layers, JOINT_EVERY)


def empty(*shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, device=META)


class _Shapes:
    """Draws without numbers (:class:`wav.training.draws.SeededRandom`)."""

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return empty(*shape)

    normal = levels = uniform


class Summed:
    """Numbers of one unit that make a whole."""

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(vars(self).values()))

    def as_dict(self) -> dict[str, float]:
        """They and their total, for JSON."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class TrainingCost(Summed):
    """Operations per training sample; ``recomputed``: forward operations that gradient checkpointing repeats."""

    forward: float
    backward: float
    recomputed: float


def training_cost(sizes: Sizes, train: TrainSettings) -> TrainingCost:
    """Operations per sample of a stage's step, the optimiser left out."""
    if train.stage == "train_value" and not sizes.value_width:
        return TrainingCost(0.0, 0.0, 0.0)
    steps = functools.cache(lambda few, checkpointing: _step(few, train, checkpointing))
    forward, backward = (of_layers(lambda few, i=i: steps(few, False)[i], sizes) for i in (0, 1))  # type: ignore[misc]
    again = train.gradient_checkpointing != "off"  # auto: at the most
    whole = of_layers(lambda few: steps(few, True)[1], sizes) if again else backward
    return TrainingCost(forward, backward, whole - backward)


def _step(sizes: Sizes, train: TrainSettings, checkpointing: bool) -> tuple[float, float]:
    """Operations per sample of the forward and of the backward pass."""
    from wav.data.windows import WindowBatch  # slow imports
    from wav.training.objectives import build_objective

    model, grid = model_of(sizes).train(), (sizes.height, sizes.image_width)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with META:
        batch = WindowBatch(
            memory=empty(SAMPLES, sizes.views, sizes.latent_channels, sizes.memory, *grid),
            future=empty(SAMPLES, sizes.views, sizes.latent_channels, sizes.future, *grid),
            text=empty(SAMPLES, sizes.text, sizes.caption_channels),
            text_mask=empty(SAMPLES, sizes.text).bool(),
            state=empty(SAMPLES, 1),
            actions=empty(SAMPLES, sizes.chunk, sizes.action_channels),
            values=empty(SAMPLES, sizes.chunk, sizes.value_channels) if sizes.value_width else None,
            episode=empty(SAMPLES),
            step=empty(SAMPLES),
        )
        objective = build_objective(train, model, sizes.memory, sizes.action_channels - 1)
        inputs = objective.draw(batch, None, _Shapes(), 0)  # type: ignore[arg-type]
        losses: list[Tensor] = []
        forward = count(lambda: losses.append(objective(inputs)[0]))
        backward = count(lambda: losses[0].backward())  # type: ignore[no-untyped-call]
    return forward / SAMPLES, backward / SAMPLES


@dataclass(frozen=True)
class PlanCost(Summed):
    """Operations of one policy call for one observation: the search of Algorithm 1, and decoding the actions."""

    search: float
    act: float


def plan_cost(sizes: Sizes, planner: PlannerSettings, levels: Levels = PUBLISHED) -> PlanCost:
    """A call as the readable backend computes it: keys and values once per candidate, no candidate tiled.

    ``levels`` are what the experts read: a video pass for each, and values before actions where those are read.
    ``iterations`` 0, or a model without value expert, leaves the decoding alone.
    """
    parts = functools.cache(lambda few: _plan(few, planner, levels))
    search, act = (of_layers(lambda few, i=i: parts(few)[i], sizes) for i in (0, 1))  # type: ignore[misc]
    return PlanCost(search * planner.iterations, act)


def _plan(sizes: Sizes, planner: PlannerSettings, levels: Levels) -> tuple[float, float]:
    """Operations of one iteration of the search, and of acting."""
    from wav.inference.backends import noise_shapes  # slow imports
    from wav.inference.torch import TorchPlannerModel

    built, grid = model_of(sizes).eval().requires_grad_(False), (sizes.height, sizes.image_width)
    shapes = noise_shapes(built, sizes.views, grid, sizes.future, sizes.chunk)
    model = TorchPlannerModel(built, shapes)
    memory = empty(1, sizes.views, sizes.latent_channels, sizes.memory, *grid)
    text, history = empty(1, sizes.text, sizes.caption_channels), empty(1, 1, sizes.action_channels)
    M, N = planner.video_samples, planner.value_samples

    def act(steps: int) -> None:
        context = model.begin(memory, text, None, history)
        features = model.video_features(context, empty(1, 1, *shapes.video), levels.video)
        value = None if shapes.value is None else empty(1, *shapes.value)
        if value is not None and levels.value < 1:
            model.denoise_value(features, value[:, None, None], steps)
        model.denoise_action(context, features, value, empty(1, *shapes.action), steps, levels.value)

    acting = grown(lambda steps: count(lambda: act(steps)), planner.denoise_steps)
    if not planner.iterations or shapes.value is None:
        return 0.0, acting
    context, found = model.begin(memory, text, None, history), []
    candidates, values = empty(1, M, *shapes.video), empty(1, M, N, *shapes.value)
    search = count(lambda: found.append(model.video_features(context, candidates, levels.video)))
    step = count(lambda: model.denoise_value(found[0], values, 1))
    return search + (planner.score_steps or planner.denoise_steps) * step, acting


def reference_search(sizes: Sizes, iterations: int, M: int, N: int, steps: int) -> float:
    """Operations of the reference's search (spec section 8).

    The text projected for every candidate, a time embedding for every token, the video head computed and dropped, and
    the value expert's keys and values projected again for each of N samples and each Euler step.
    """
    return iterations * of_layers(lambda few: _reference_iteration(few, M, N, steps), sizes)


def _reference_iteration(sizes: Sizes, M: int, N: int, steps: int) -> float:
    """Operations of one iteration of the reference's search."""
    model, cells = model_of(sizes).eval().requires_grad_(False), sizes.height * sizes.image_width
    tokens = empty(1, sizes.views, sizes.latent_channels, sizes.frames * cells, 1, 1)  # each is a frame of its own
    levels, text = empty(1, sizes.views, sizes.frames * cells), empty(1, sizes.text, sizes.caption_channels)
    features = [empty(1, sizes.tokens, sizes.width)] * sizes.layers
    values = empty(1, sizes.chunk, sizes.value_channels)
    value = count(lambda: model.value(values, empty(1), features))
    value += (sizes.chunk - 1) * count(lambda: model.value.time_embed(empty(1)))
    return M * count(lambda: model.video(tokens, levels, text)) + M * N * steps * value


@dataclass(frozen=True)
class Memory(Summed):
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float


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
