#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0, float32 on a CPU: a step whose gradient is not finite counts as done.
#
# Guess: only fp16, with its loss scaling, skips steps; in float32 such a gradient goes into the weights, whatever the
#   ZeRO stage, and the loss shows it.
# Seen: at stage 0 it does. At stage 1 the step is dropped without a word: the weights stay, the loss stays finite,
#   engine.global_steps goes on as if it had been made, and only engine.skipped_steps tells.
# Met by: training that watches the loss alone; steps, schedules and averages then count what was never learned.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 DS_ACCELERATOR=cpu
for stage in 0 1; do
    "$folder/venv/bin/python" -W ignore - "$stage" "$folder" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import logging
import math
import sys

import deepspeed
import deepspeed.ops
import torch

logging.disable()
stage = int(sys.argv[1])


class Model(torch.nn.Module):
    """Its loss is finite everywhere, its gradient is not at 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (self.weight * x).abs().sqrt().sum()


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler and changes nothing here
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet{stage}", rank=0, world_size=1)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
losses = []
for value in (1.0, 0.0, 1.0):
    loss = engine(torch.full((3,), value))
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
print(f"ZeRO {stage}: losses {losses}, global_steps {engine.global_steps}, skipped_steps {engine.skipped_steps}")
assert engine.global_steps == 3
assert (engine.skipped_steps, math.isfinite(losses[2])) == ((0, False) if stage == 0 else (1, True))
torch.distributed.destroy_process_group()
PYTHON
done
