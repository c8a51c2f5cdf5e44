#!/usr/bin/env bash
# diffusers 0.42.1: EMAModel(decay=0.9999, use_ema_warmup=False) warms up over 90,000 steps.
#
# Guess: without warm-up the decay is 0.9999 from the first or second step on.
# Seen: use_ema_warmup chooses between two warm-ups. False takes (1 + t) / (10 + t): 0.526 at step 10, 0.917 at 100, 0.991
#   at 1,000, 0.9996 at 20,000; 0.9999 is reached at step 89,991. Only min_decay=0.9999 beside it gives the decay that was
#   asked for, from the second step on.
# Met by: who compares decays or the average with the last weights on runs of some ten thousand steps, as fine-tunes of
#   policies are: up to there decay 0.9999, 0.99999 and 0.999999 are one and the same average, of about the last tenth.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from diffusers.training_utils import EMAModel


def weight_left(**options):
    """The first weight's share in the average, and the decay, after 1,000 steps whose weight is another one."""
    first = torch.nn.Parameter(torch.ones(1))
    average = EMAModel([first], use_ema_warmup=False, **options)
    average.step([first])
    later = torch.nn.Parameter(torch.zeros(1))
    for _ in range(999):
        average.step([later])
    return round(float(average.shadow_params[0]), 3), round(average.cur_decay_value, 4)


asked, longer = weight_left(decay=0.9999), weight_left(decay=0.999999)
held = weight_left(decay=0.9999, min_decay=0.9999)
average = EMAModel([torch.nn.Parameter(torch.ones(1))], decay=0.9999, use_ema_warmup=False)
reached = next(step for step in range(1, 100_000) if average.get_decay(step) >= 0.9999)
print(f"decay 0.9999: {asked[0]} of the first weight is left after 1,000 steps, decay {asked[1]}; decay 0.999999: {longer}")
print(f"with min_decay 0.9999: {held[0]} is left, decay {held[1]}; 0.9999 ** 999 is {0.9999 ** 999:.3f}")
print(f"0.9999 is reached at step {reached}: {[round(average.get_decay(step), 4) for step in (10, 100, 1000, 20_000)]}")
assert asked == longer == (0.0, 0.9911)
assert held == (0.905, 0.9999)
assert reached == 89_991
PYTHON
