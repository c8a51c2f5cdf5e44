#!/usr/bin/env bash
# DeepSpeed 0.19.8 (torch 2.13.0): sharded, Muon's orthogonalised update is clipped; unsharded, its gradient is.
#
# Guess: the ZeRO stage decides where state lies and not what a step is, so one configuration (Muon, lr 0.02,
#   gradient_clipping 1.0) makes the same first step at ZeRO 0 and at ZeRO 1.
# Seen: the first step of a 64 x 64 matrix whose gradient has rank 8 has norm 0.0546 at ZeRO 0, whatever the clipping is,
#   and 0.0200 at ZeRO 1, which is lr times the clipping norm, however many matrices there are. Without clipping both are
#   0.0546.
# Met by: who finds a recipe on one card and shards it: it learns slower by the root of the matrices' summed ranks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat > "$folder/step.py" <<'PY'
import os
import sys

stage, clip = int(sys.argv[1]), float(sys.argv[2])
os.environ.update(
    RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3],
    DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1",
)
import torch
import deepspeed
import deepspeed.ops

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be built
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
before = model[0].weight.detach().clone()
config = {
    "train_batch_size": 8,
    "gradient_clipping": clip,
    "zero_optimization": {"stage": stage},
    "zero_force_ds_cpu_optimizer": False,
    "optimizer": {"type": "Muon", "params": {"lr": 0.02, "weight_decay": 0.0}},
}
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
engine.backward(engine(torch.randn(8, 64)).square().mean())
engine.step()
norm = f"{float((engine.module[0].weight.detach() - before).norm()):.4f}"
print("step", norm)
assert norm == sys.argv[4], f"was {sys.argv[4]}"
PY
for run in "0 1.0 0.0546" "1 1.0 0.0200" "0 0 0.0546" "1 0 0.0546"; do
  read -r stage clip norm <<< "$run"
  echo -n "ZeRO $stage, clipping $clip: "
  "$folder/venv/bin/python" "$folder/step.py" "$stage" "$clip" "$((29600 + stage))" "$norm" 2> "$folder/log" | grep "^step" || { cat "$folder/log"; exit 1; }
done
