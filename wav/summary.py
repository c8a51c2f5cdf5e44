"""``wav summary``: what a parameter file means, on one page, without weights or data.

Costs are counted in :mod:`wav.accounting`; this module puts them into lines or JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from wav.accounting import (
    memory_per_gpu,
    parameter_split,
    plan_cost,
    reference_search,
    trained_parameters,
    training_cost,
)
from wav.config import PlannerSettings, Settings, TrainSettings
from wav.errors import ConfigError
from wav.planning.types import Levels
from wav.stages import TRAINING
from wav.training.activations import Sizes

ZERO_STAGES = (1, 2, 3)
#: the reference's released schedule: K, M, N, Euler steps
REFERENCE = (5, 30, 5, 10)
_SCHEDULE = ("iterations", "video_samples", "value_samples", "denoise_steps")
#: units, largest first; a table uses the first that its largest number reaches
FLOP_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
BYTE_UNITS = (("GiB", 2.0**30), ("MiB", 2.0**20))


def summarise(settings: Settings, gpus: int = 8) -> dict[str, Any]:
    """Sizes, parameters, operations and memory as plain numbers (operations, bytes).

    Raises:
        ConfigError: a global batch that does not divide over the GPUs.
    """
    sizes, split = Sizes.of(settings), parameter_split(settings)
    stages: dict[str, Any] = {}
    for name in TRAINING:
        train: TrainSettings = getattr(settings, name)
        if name == "train_value" and not sizes.value_width:
            continue
        micro = micro_batch(name, train, gpus)
        cost = training_cost(sizes, train)
        stages[name] = {
            "trained_parameters": trained_parameters(split, train),
            "micro_batch": micro,
            "precision": train.precision,
            "gradient_checkpointing": train.gradient_checkpointing,
            "flops_per_sample": cost.as_dict(),
            "flops": cost.total * train.batch_size * train.steps,
            "memory": {
                f"zero_{stage}": memory_per_gpu(sizes, split, train, stage, gpus, micro).as_dict()
                for stage in ZERO_STAGES
            },
        }
    result = {
        "sizes": {**asdict(sizes), "frames": sizes.frames, "tokens": sizes.tokens},
        "parameters": split,
        "gpus": gpus,
        "stages": stages,
        "plan": plan_cost(sizes, settings.planner, Levels.of(settings.coupling)).as_dict(),
    }
    if sizes.value_width:
        same = settings.planner.model_copy(update=dict(zip(_SCHEDULE, REFERENCE, strict=True)))
        result["reference_plan"] = {
            "search_as_the_reference": reference_search(sizes, *REFERENCE),
            "search_as_built": plan_cost(sizes, same).search,
        }
    return result


def micro_batch(stage: str, train: TrainSettings, gpus: int) -> int:
    """Samples per GPU and forward pass; ConfigError where the global batch does not divide."""
    micro = train.micro_batch_size or train.batch_size // gpus
    if not micro or train.batch_size % (micro * gpus):
        raise ConfigError(
            f"{stage}.batch_size = {train.batch_size}: must be a multiple of {max(1, micro)} samples x {gpus} GPUs; "
            "give another --gpus or change the batch"
        )
    return micro


def lines(settings: Settings, found: dict[str, Any]) -> Iterator[str]:
    """What :func:`summarise` found, as text."""
    yield from _size_lines(settings, found["sizes"])
    yield ""
    yield "parameters"
    for name, count in found["parameters"].items():
        yield f"  {name:<8}{count:>16,}" if count else f"  {name:<8}{'none':>16}"
    yield ""
    yield from _training_lines(found)
    yield ""
    yield from _plan_lines(settings, found)
    yield ""
    yield from _memory_lines(found)


def _size_lines(settings: Settings, sizes: dict[str, Any]) -> Iterator[str]:
    data, model = settings.data, settings.model
    yield (
        f"sample   {len(data.views)} views of {data.image_height}x{data.image_width}, {data.memory_frames} memory + "
        f"{data.future_frames} future frames, {data.action_chunk} actions, {data.text_tokens} text tokens"
    )
    yield (
        f"latents  {sizes['memory']} + {sizes['future']} frames of {sizes['height']}x{sizes['image_width']} cells with "
        f"{sizes['latent_channels']} channels: {sizes['tokens']} video tokens"
    )
    yield "layers"
    parts = [("video", model.heads, model.head_dim, sizes["latent_channels"])]
    if model.value_expert:
        parts.append(("value", model.value_heads, model.value_head_dim, sizes["value_channels"]))
    parts.append(("action", model.action_heads, model.action_head_dim, sizes["action_channels"]))
    for name, heads, width, channels in parts:
        yield f"  {name:<8}{model.layers} layers, {heads} heads x {width} = {heads * width} wide, {channels} channels"


def _unit(numbers: Iterable[float], units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """Name and size of the unit in which the largest of ``numbers`` is at least 1 (the smallest unit if none is)."""
    largest = max(numbers)
    return next((unit for unit in units if largest >= unit[1]), units[-1])


def _training_lines(found: dict[str, Any]) -> Iterator[str]:
    costs = {name: stage["flops_per_sample"] for name, stage in found["stages"].items()}
    unit, size = _unit((cost["total"] for cost in costs.values()), FLOP_UNITS)
    runs, whole = _unit((stage["flops"] for stage in found["stages"].values()), FLOP_UNITS)
    yield f"training, {unit} per sample (again: forward operations that gradient checkpointing repeats)"
    yield f"  {'stage':<16}{'forward':>10}{'backward':>10}{'again':>10}{'total':>10}{f'run, {runs}':>13}"
    for name, cost in costs.items():
        numbers = "".join(f"{_short(cost[p] / size):>10}" for p in ("forward", "backward", "recomputed", "total"))
        yield f"  {name:<16}{numbers}{_short(found['stages'][name]['flops'] / whole):>13}"


def _plan_lines(settings: Settings, found: dict[str, Any]) -> Iterator[str]:
    unit, size = _unit([found["plan"]["total"]], FLOP_UNITS)

    def line(name: str, operations: float) -> str:
        return f"  {name:<48}{_short(operations / size):>10}"

    def call(planner: PlannerSettings, levels: Levels, cost: dict[str, float]) -> Iterator[str]:
        M, passes = planner.video_samples, len(levels.video)
        search = f"search, K={planner.iterations} M={M} N={planner.value_samples}"
        yield line(f"{search}, {planner.iterations * M * passes} video passes", cost["search"])
        yield line("actions" if passes == 1 else f"actions, {passes} video passes", cost["act"])
        yield line("total", cost["total"])

    yield f"one policy call, {unit}"
    yield from call(settings.planner, Levels.of(settings.coupling), found["plan"])
    if "reference_plan" in found:
        K, M, N, steps = REFERENCE
        other = found["reference_plan"]
        yield f"one call of the reference, K={K} M={M} N={N} with {steps} steps, {unit}"
        yield line(f"search as the reference computes it, {K * M} passes", other["search_as_the_reference"])
        yield line("search as built here", other["search_as_built"])


def _memory_lines(found: dict[str, Any]) -> Iterator[str]:
    heads = ("weights", "gradients", "optimizer", "average", "activations", "total")
    table = {
        (name, level): stage["memory"][f"zero_{level}"]
        for name, stage in found["stages"].items()
        for level in ZERO_STAGES
    }
    unit, size = _unit((memory["total"] for memory in table.values()), BYTE_UNITS)
    yield f"memory per GPU of {found['gpus']}, {unit} (activations are an estimate; buffers, CUDA context come on top)"
    yield f"  {'stage':<16}{'ZeRO':<6}" + "".join(f"{head:>12}" for head in heads) + "  samples"
    for (name, level), memory in table.items():
        stage, numbers = found["stages"][name], "".join(f"{_short(memory[head] / size):>12}" for head in heads)
        yield f"  {name:<16}{level:<6}{numbers}  {stage['micro_batch']} {stage['precision']}"


def _short(number: float) -> str:
    """Three significant digits, without an exponent down to a thousandth."""
    if number == 0:
        return "0"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.001 else f"{number:.1e}"
