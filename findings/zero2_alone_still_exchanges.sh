#!/usr/bin/env bash
# DeepSpeed 0.19.8: ZeRO 2 on one rank copies every gradient to be exchanged with nobody, and takes norms in float64.
#
# Guess: with one rank there is nothing to reduce, so gradients stay where backward put them, and clipping takes one norm
#   of them all, as torch.nn.utils.clip_grad_norm_ does in a few launches.
# Seen: each step joins all gradients in a buffer, reduces that over the one rank and copies it back (contiguous_gradients,
#   the default, copies four times as many elements as there are, without it twice), and casts each gradient on its own
#   to float64 for its norm. Of a step of 2.3 billion parameters on one H200 that was 26 of 330 ms, and 1,400 launches.
# Met by: who trains on one card. A single process is as well served by an optimiser of torch's own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
LOCAL_RANK=0 DS_ACCELERATOR=cpu "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an extension for CPUs, whose build takes minutes
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Seen(TorchDispatchMode):
    doubles = copied = reductions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.doubles += name == "_to_copy" and result.dtype == torch.float64
        self.copied += result.numel() if name == "copy_" and result.dtype == torch.bfloat16 else 0
        self.reductions += "allreduce" in name
        return result


for contiguous, times in ((True, 4), (False, 2)):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(30)))
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": contiguous},
    }
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    for _ in range(3):
        with Seen() as seen:
            engine.backward(engine(torch.randn(1, 64, dtype=torch.bfloat16)).square().mean())
            engine.step()
    elements = sum(parameter.numel() for parameter in model.parameters())
    print(f"contiguous_gradients {contiguous}: {elements} gradients of 30 weights on one rank, in one step:")
    print(f"  {seen.copied} copied, {seen.reductions} reductions, {seen.doubles} weights cast to float64 for their norms")
    assert (seen.copied, seen.doubles) == (times * elements, 30)
    assert seen.reductions > 0
PYTHON
