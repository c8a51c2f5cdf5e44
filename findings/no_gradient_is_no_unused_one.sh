#!/usr/bin/env bash
# DeepSpeed 0.19.8 (torch 2.13.0): ZeRO 2 and 3 train past a parameter that nothing uses, and fail on one whose operation
#   gives it no gradient.
#
# Guess: an autograd function may give None for a parameter's gradient, and then the parameter is one without a gradient,
#   like one that the pass did not use. Plain PyTorch treats both alike; so does DeepSpeed, which passes over unused ones.
# Seen: with the parameter unused, one AdamW step of lr 0.1 at ZeRO 0 to 3 leaves it at 0.999 (weight decay alone). With
#   None it is the same at ZeRO 0 and 1; ZeRO 2 and 3 end in an AttributeError inside the hook of the parameter, which
#   autograd calls all the same. Plain PyTorch leaves the parameter at 1 in both cases, without decay.
# Met by: kernels and recorded passes with a backward of their own, where a batch leaves a part of the model out. What
#   helps is to hand such a function only the parameters that it has gradients for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat > "$folder/step.py" <<'PY'
import os
import sys

case, stage = sys.argv[1], sys.argv[2]
os.environ.update(
    RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3],
    DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1",
)
import torch
import deepspeed
import deepspeed.ops

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be built


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, used, other):
        ctx.save_for_backward(x)
        return x * used

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return None, (slope * x).sum(0), None


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))

    def forward(self, x):
        return Scale.apply(x, self.used, self.other) if case == "none" else x * self.used


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)
try:
    if stage == "plain":
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    else:
        config = {
            "train_batch_size": 2,
            "zero_optimization": {"stage": int(stage)},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
    found = f"{model.other.max().item():.3f}"
except AttributeError:
    found = "AttributeError"
print("other", found)
assert found == sys.argv[4], f"was {sys.argv[4]}"
PY
port=29710
for run in "unused plain 1.000" "none plain 1.000" "unused 0 0.999" "unused 1 0.999" "unused 2 0.999" "unused 3 0.999" \
  "none 0 0.999" "none 1 0.999" "none 2 AttributeError" "none 3 AttributeError"; do
  read -r case stage other <<< "$run"
  port=$((port + 1))
  echo -n "$case, $stage: "
  "$folder/venv/bin/python" "$folder/step.py" "$case" "$stage" "$port" "$other" 2> "$folder/log" | grep "^other" || { cat "$folder/log"; exit 1; }
done
