#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts 0 for nn.TransformerEncoderLayer once it acts (eval, no gradient).
#
# Guess: a layer's matrix products cost the same in train and eval; without dropout nothing else differs.
# Seen: 2,228,224 operations in train, 0 in eval under no_grad: the layer then is one fused call, which the counter has no
#   formula for and passes over in silence; so are nn.MultiheadAttention and an LSTM. With gradients, or with
#   torch.backends.mha.set_fastpath_enabled(False), the layer is counted again, at 2,228,224 with attention's math kernel.
# Met by: who compares what policies or plans compute per action: a transformer of these layers looks free beside one that
#   is written out, in the very mode that it acts in.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(module, *inputs, gradient=False):
    with torch.set_grad_enabled(gradient), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


x = torch.randn(2, 16, 64)
layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
attention = nn.MultiheadAttention(64, 4, batch_first=True)
seen = {"train": counted(layer.train(), x), "eval": counted(layer.eval(), x)}
seen["eval, with gradients"] = counted(layer, x, gradient=True)
seen["attention, train"], seen["attention, eval"] = counted(attention.train(), x, x, x), counted(attention.eval(), x, x, x)
seen["LSTM, eval"] = counted(nn.LSTM(64, 64, batch_first=True).eval(), x)
torch.backends.mha.set_fastpath_enabled(False)
seen["eval, no fast path"] = counted(layer, x)
for name, operations in seen.items():
    print(f"{name}: {operations:,}")
assert seen["train"] == seen["eval, with gradients"] == seen["eval, no fast path"] == 2_228_224
assert seen["attention, train"] > 0
assert seen["eval"] == seen["attention, eval"] == seen["LSTM, eval"] == 0
PYTHON
