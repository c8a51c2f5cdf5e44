#!/usr/bin/env bash
# diffusers 0.42.1: n steps of FlowMatchEulerDiscreteScheduler are n - 1 steps and one that hardly moves.
#
# Guess: set_timesteps(n) cuts the way from noise (1) to data (0) in n equal steps, as policies' own loops do (dt = -1/n).
# Seen: it puts n points between 1 and 0.001 and then 0 behind: n = 4 goes 1, 0.667, 0.334, 0.001, 0, and n = 2 goes
#   1, 0.001, 0. The last call of the network moves a thousandth of the way, so two steps are one: where the field is
#   curved, two calls land where one does. With shift 3 the last call moves 0.009, as the shift is taken twice. With
#   sigmas=linspace(1, 1/n, n), which the library's own image pipelines pass, the steps are equal.
# Met by: flow-matching policies, which act with 2 to 10 calls: a tenth to half of their time goes into nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def walk(steps, equal=False, **options):
    """(sigmas, where a sample of 1 lands): the velocity x is no straight line, its true end is exp(-1)."""
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    if equal:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    x = torch.ones(1)
    for time in scheduler.timesteps:
        x = scheduler.step(x, time, x).prev_sample
    return [round(float(sigma), 4) for sigma in scheduler.sigmas], round(float(x), 3)


seen = {name: walk(**how) for name, how in {
    "1 step": {"steps": 1},
    "2 steps": {"steps": 2},
    "4 steps": {"steps": 4},
    "2 steps, shift 3": {"steps": 2, "shift": 3.0},
    "2 equal steps": {"steps": 2, "equal": True},
}.items()}
for name, (sigmas, end) in seen.items():
    print(f"{name}: {sigmas}, ends at {end} of {np.exp(-1):.3f}")
assert seen["1 step"] == ([1.0, 0.0], 0.0)
assert seen["2 steps"] == ([1.0, 0.001, 0.0], 0.001)
assert seen["4 steps"][0] == [1.0, 0.667, 0.334, 0.001, 0.0]
assert seen["2 steps, shift 3"][0] == [1.0, 0.0089, 0.0]
assert seen["2 equal steps"] == ([1.0, 0.5, 0.0], 0.25)
PYTHON
