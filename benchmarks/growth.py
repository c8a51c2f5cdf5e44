"""How planning grows with candidates, samples, iterations, views, resolution and layers: time, memory and exponents.

One planning call at the default sizes with one of them varied over a factor of eight, on random weights, one thread.
Time is processor time (neighbours disturb it less than wall time), memory the largest sum of live tensors during the
call, weights excluded. The exponent is of the power law that best follows the points: 1 is linear:

    python benchmarks/growth.py --json benchmarks/results/growth-planning-cpu.json

Training, ingest, labelling and encoding: ``growth_training.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from counting import Counted, machine, write_result
from fitting import fit_exponent
from sizes import SIZES, Sizes
from torch.profiler import ProfilerActivity, profile

from wav.inference.backends import noise_shapes, planner_model
from wav.inference.cpu.kernels import description
from wav.model.transformer import WAVTransformer
from wav.planning.planner import Planner
from wav.planning.types import RowKey, SeededNoise

BASE = replace(SIZES["default"], model=replace(SIZES["default"].model, max_views=8))


def _planner(**changes: Any) -> Sizes:
    return replace(BASE, planner=replace(BASE.planner, **changes))


#: What varies -> (size of each point, sizes to plan with). Tokens of a view: resolution.
SWEEPS: dict[str, list[tuple[int, Sizes]]] = {
    "M": [(m, _planner(video_samples=m, video_elites=2)) for m in (2, 4, 8, 16)],
    "N": [(n, _planner(value_samples=n, value_elites=4)) for n in (1, 2, 4, 8, 16)],
    "K": [(k, _planner(iterations=k)) for k in (1, 2, 4, 8)],
    "views": [(v, replace(BASE, views=v)) for v in (1, 2, 4, 8)],
    "cells of a frame": [(h * w, replace(BASE, grid=(h, w))) for h, w in ((2, 4), (4, 4), (4, 8), (8, 8), (8, 16))],
    "layers": [(n, replace(BASE, model=replace(BASE.model, layers=n))) for n in (2, 4, 8, 16)],
}
#: Why an exponent is what it is, where it is far from 1.
NOTES = {
    "M": "the acted plan and the observation's own work are the same for every M",
    "N": "the video passes do not depend on N",
    "K": "the acted plan is the same for every K; memory is one iteration's",
    "views": "every third layer attends across views: its logits grow with the square of the views",
    "cells of a frame": "self-attention grows with the square of the tokens, all else linearly",
    "layers": "the acted plan's tokens are embedded once; memory: one layer's results live at a time, beside all keys",
}


def make(sizes: Sizes) -> Any:
    """A model of random weights."""
    m = sizes.model
    model = WAVTransformer(
        in_channels=sizes.latent,
        out_channels=sizes.latent,
        num_attention_heads=m.heads,
        attention_head_dim=m.head_dim,
        cross_attention_dim=m.width,
        num_layers=m.layers,
        caption_channels=sizes.caption,
        max_view=m.max_views,
        action_in_channels=sizes.action_channels,
        action_out_channels=sizes.action_channels,
        action_num_attention_heads=m.action_heads,
        action_attention_head_dim=m.action_head_dim,
        value_in_channels=sizes.value_channels,
        value_num_attention_heads=m.value_heads,
        value_attention_head_dim=m.value_head_dim,
    ).eval()
    return planner_model(model, noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk))


def caller(sizes: Sizes) -> Callable[[], object]:
    """One planning call of one observation."""
    model, generator = make(sizes), torch.Generator().manual_seed(0)
    memory = torch.randn((1, sizes.views, sizes.latent, sizes.memory, *sizes.grid), generator=generator)
    text = torch.randn((1, sizes.text_tokens, sizes.caption), generator=generator)
    history = torch.randn((1, 1, sizes.action_channels), generator=generator)
    noise, settings = SeededNoise([RowKey(0, "growth", 0)]), sizes.planner

    def call() -> object:
        context = model.begin(memory, text, None, history)
        return Planner(model, settings, lambda values: values[..., -1]).plan(context, noise)

    return call


def largest(call: Callable[[], object]) -> int:
    """Largest number of bytes that tensors allocated during the call held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    held = peak = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def point(sizes: Sizes, repeats: int) -> dict[str, float]:
    """Processor seconds (best of ``repeats``), bytes and FLOPs of one planning call."""
    with torch.inference_mode():
        call = caller(sizes)
        call()
        seconds = []
        for _ in range(repeats):
            began = time.process_time()
            call()
            seconds.append(time.process_time() - began)
        with Counted() as counted:
            call()
        return {"seconds": min(seconds), "bytes": largest(call), "gflop": counted.flops / 1e9}


def sweep(name: str, repeats: int) -> dict[str, Any]:
    """All points of one sweep and their exponents."""
    points = [{"size": size, **point(sizes, repeats)} for size, sizes in SWEEPS[name]]
    x = [p["size"] for p in points]
    fits = {kind: fit_exponent(x, [p[kind] for p in points]) for kind in ("seconds", "bytes", "gflop")}
    exponents = {kind: {"exponent": round(b, 2), "r_squared": round(r, 3)} for kind, (b, r) in fits.items()}
    return {"points": points, "fits": exponents, "note": NOTES[name]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "threads": 1, "kernels": description(), "sweeps": {}}
    print(f"{'':18}{'sizes':>14}{'seconds':>18}{'MB':>16}{'time ~':>8}{'memory ~':>10}{'FLOPs ~':>9}")
    for name in arguments.sweeps:
        found = result["sweeps"][name] = sweep(name, arguments.repeats)
        first, last = found["points"][0], found["points"][-1]
        ends = [
            f"{first[kind] / unit:.3g} to {last[kind] / unit:.3g}" for kind, unit in (("seconds", 1), ("bytes", 1e6))
        ]
        powers = [found["fits"][kind]["exponent"] for kind in ("seconds", "bytes", "gflop")]
        print(f"{name:18}{first['size']:>7} to {last['size']:<4}{ends[0]:>18}{ends[1]:>16}", end="")
        print(f"{powers[0]:8.2f}{powers[1]:10.2f}{powers[2]:9.2f}  {found['note']}")
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
