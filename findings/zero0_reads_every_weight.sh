#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0, bf16 on one rank: a step of ZeRO stage 0 reads numbers on the host per weight.
#
# Guess: with one rank stage 0 is the lightest layout, since nothing is partitioned; a step reads at most the gradients'
#   norm from the device, as stage 1 does.
# Seen: with AdamW, clipping and 4 weights a step takes 11 numbers out of tensors, with 16 weights 35: two for each weight
#   and three more. Stage 1 takes 4, however many weights there are.
# Met by: training in bf16 on one GPU without partitioning; every such read waits until the GPU has caught up.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 DS_ACCELERATOR=cpu
for layout in "0 4 11" "0 16 35" "1 4 4" "1 16 4"; do
    read -r stage weights reads <<< "$layout"
    "$folder/venv/bin/python" -W ignore - "$stage" "$weights" "$reads" "$folder" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import logging
import sys

import deepspeed
import deepspeed.ops
import torch
from torch.utils._python_dispatch import TorchDispatchMode

logging.disable()
stage, weights, reads = (int(number) for number in sys.argv[1:4])


class Reads(TorchDispatchMode):
    """Counts numbers taken out of tensors."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler and changes nothing here
meet = f"file://{sys.argv[4]}/meet{stage}-{weights}"
torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(weights)])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
for _ in range(2):
    with Reads() as seen:
        engine.backward(engine(torch.ones(2, 8, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
print(f"ZeRO {stage}, {weights} weights: {seen.reads} numbers read in a step")
assert seen.reads == reads
torch.distributed.destroy_process_group()
PYTHON
done
