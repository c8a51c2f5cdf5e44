"""A projection, not a measurement: training and planning at the paper's size on 8xA100, from counted operations.

Operations of a sample are those of ``wav/accounting.py`` (counted by torch on shapes alone), those
of T5-XXL and of the LTX VAE counted here; seconds follow from the share of the GPUs' peak that is reached. Two shares
are used: the one that the published run reached (its 20.7 samples a second over the operations of its own schedule),
and ``--share``, an assumption. Prints tables; ``--json FILE`` writes them:

    python benchmarks/projection.py --json benchmarks/results/projection.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from counting import write_result
from sizes import SIZES, Sizes, Train

from wav import accounting

GPUS, PEAK = 8, 312e12  #: A100, dense bf16 products (vendor's data sheet)
PUBLISHED = 20.7  #: samples a second of the published run: 128 x 70-80 thousand steps in five days on 8xA100
TARGET = 45.0
SHARE = 0.40  #: of the peak, assumed
STEPS = 35_000  #: of a stage, presets/libero.yaml
STAGES = {"pretrain_video": 0.06, "train_value": 0.0, "train_joint": 0.0}  #: and its caption dropout
T5_XXL = {"layers": 24, "width": 4096, "inner": 64 * 64, "feed": 10240}


def accounted(sizes: Sizes) -> accounting.Sizes:
    """The formulas' sizes."""
    model = sizes.model
    return accounting.Sizes(
        layers=model.layers,
        width=model.width,
        value_width=model.value_heads * model.value_head_dim,
        action_width=model.action_heads * model.action_head_dim,
        views=sizes.views,
        memory=sizes.memory,
        future=sizes.future,
        height=sizes.grid[0],
        image_width=sizes.grid[1],
        chunk=sizes.chunk,
        text=sizes.text_tokens,
        latent_channels=sizes.latent,
        caption_channels=sizes.caption,
        value_channels=sizes.value_channels,
        action_channels=sizes.action_channels,
    )


def t5_operations(tokens: int) -> float:
    """T5-XXL's encoder over ``tokens`` tokens: four projections, a gated feed-forward, attention."""
    L, D, inner, feed = (T5_XXL[name] for name in ("layers", "width", "inner", "feed"))
    return L * (2 * tokens * (4 * D * inner + 3 * D * feed) + 4 * tokens**2 * inner)


def vae_operations(sizes: Sizes) -> float:
    """LTX-Video's VAE over a sample's memory frames, one by one, and its future clip; all views."""
    from diffusers import AutoencoderKLLTXVideo
    from torch.utils.flop_counter import FlopCounterMode

    height, width = (32 * cells for cells in sizes.grid)
    total = 0.0
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLLTXVideo(latent_channels=sizes.latent)
        for count, frames in ((sizes.memory, 1), (1, 1 + 8 * (sizes.future - 1))):
            with FlopCounterMode(display=False) as counter:
                vae.encode(torch.empty(1, 3, frames, height, width))
            total += sizes.views * count * counter.get_total_flops()
    return total


def baseline_extra(sizes: Sizes, trained: bool) -> float:
    """Operations of an AdaLN row for every video token instead of every frame; ``trained``: backward too."""
    counted = accounted(sizes)
    rows = counted.tokens - counted.frames
    width = counted.width
    first, rest = rows * 2 * 256 * width, rows * 2 * 7 * width**2  # sinusoid to e, e to the six AdaLN rows
    return first + rest + (first + 2 * rest if trained else 0.0)


def training(sizes: Sizes, encoders: float, share: float) -> dict[str, Any]:
    """Per stage: operations of a sample on both schedules, and samples a second and days at both shares."""
    rows: dict[str, Any] = {}
    per_gpu = sizes.batch // GPUS
    for stage in STAGES:
        train = Train(stage, sizes.batch, gradient_checkpointing="on", action_probability=0.7)
        cost = accounting.training_cost(accounted(sizes), train)  # type: ignore[arg-type]
        kept = cost.total - cost.recomputed
        head = 0.0 if stage != "train_value" else 2 * accounted(sizes).tokens * sizes.model.width * sizes.latent
        baseline = cost.total + encoders + baseline_extra(sizes, stage != "train_value") + head
        rows[stage] = {"baseline": baseline, "ours": cost.total, "ours_without_recomputing": kept}
        for name, recomputed in (("activations_gib", "on"), ("activations_gib_without_recomputing", "off")):
            chosen: Any = replace(train, gradient_checkpointing=recomputed, precision="bf16")
            rows[stage][name] = accounting.activation_bytes(accounted(sizes), chosen, per_gpu) / 2**30
    mean = sum(row["baseline"] for row in rows.values()) / len(rows)
    reached = PUBLISHED * mean / (GPUS * PEAK)
    for row in rows.values():
        for name, part in (("published_share", reached), ("assumed_share", share)):
            rate = part * GPUS * PEAK / row["ours"]
            row[name] = {
                "samples_per_second": rate,
                "samples_per_second_without_recomputing": part * GPUS * PEAK / row["ours_without_recomputing"],
                "days": STEPS * sizes.batch / rate / 86400,
            }
    ours = sum(row["ours"] for row in rows.values()) / len(rows)
    needed = TARGET * ours / (GPUS * PEAK)
    return {"stages": rows, "published_share": reached, "assumed_share": share, "share_for_the_target": needed}


def planning(sizes: Sizes, share: float) -> dict[str, Any]:
    """One call on one GPU: operations as built and as the reference does them, and the latency at a share."""
    counted, planner = accounted(sizes), sizes.planner
    ours = accounting.plan_cost(counted, planner)  # type: ignore[arg-type]
    baseline = accounting.reference_search(
        counted, planner.iterations, planner.video_samples, planner.value_samples, planner.denoise_steps
    )
    return {
        "ours_tflop": ours.total / 1e12,
        "baseline_search_tflop": baseline / 1e12,
        "ours_seconds_a100": ours.total / (share * PEAK),
        "baseline_seconds_a100": baseline / (share * PEAK),
    }


def project(share: float) -> dict[str, Any]:
    """The whole projection."""
    sizes = SIZES["full"]
    encoders = {"t5": t5_operations(sizes.text_tokens), "vae": vae_operations(sizes)}
    result = training(sizes, sum(encoders.values()), share)
    rates = {
        name: 3 / sum(1 / row[name]["samples_per_second"] for row in result["stages"].values())
        for name in ("published_share", "assumed_share")
    }
    return {
        "projection": "counted operations over an assumed share of the vendor's peak; nothing here was measured",
        "gpus": f"{GPUS}xA100, {PEAK / 1e12:.0f} TFLOP/s each",
        "published_samples_per_second": PUBLISHED,
        "target_samples_per_second": TARGET,
        "samples_per_second": rates,
        "encoders_tflop": {name: value / 1e12 for name, value in encoders.items()},
        **result,
        "planning": planning(sizes, share),
        "sizes": asdict(sizes),
    }


def main() -> None:
    """Project, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--share", type=float, default=SHARE, help="of the GPUs' peak, assumed")
    arguments = parser.parse_args()
    result = project(arguments.share)
    print(f"a projection, not a measurement: {result['gpus']}, presets/libero.yaml")
    print(
        "T5-XXL {t5:.2f} and VAE {vae:.2f} TFLOP a sample, in a step of the baseline".format(**result["encoders_tflop"])
    )
    print(
        "{:15}{:>8}{:>8}{:>12}{:>8}{:>12}{:>8}".format(
            "TFLOP a sample", "baseline", "ours", "samples/s", "days", "samples/s", "days"
        )
    )
    for stage, row in result["stages"].items():
        cells = "".join(
            f"{row[name]['samples_per_second']:12.1f}{row[name]['days']:8.2f}"
            for name in ("published_share", "assumed_share")
        )
        print(f"{stage:15}{row['baseline'] / 1e12:8.2f}{row['ours'] / 1e12:8.2f}{cells}")
    rates = result["samples_per_second"]
    print(
        f"shares of the peak: {result['published_share']:.1%} (the published run's, by its {PUBLISHED} samples/s) and "
        f"{result['assumed_share']:.0%} (assumed); the three stages together {rates['published_share']:.1f} and "
        f"{rates['assumed_share']:.1f} samples/s; {TARGET:.0f} need {result['share_for_the_target']:.1%}"
    )
    plan = result["planning"]
    print(
        f"planning: {plan['ours_tflop']:.0f} TFLOP a call ({plan['baseline_search_tflop']:.0f} as the reference), "
        f"{plan['ours_seconds_a100']:.2f} s on one A100 at the assumed share"
    )
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
