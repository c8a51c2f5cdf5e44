#!/usr/bin/env bash
# huggingface_hub 2.4.0: PyTorchModelHubMixin saves the default of an argument where a numpy number was passed.
#
# Guess: save_pretrained writes what the constructor was given, or says that it cannot; from_pretrained gives that policy.
# Seen: what JSON does not know, numpy's float32 and int64 among it, is left out and the default is written in its place,
#   without a warning: a policy with limit 4 and horizon 16 has "limit": 1.0 and "horizon": 8 in its config.json, comes
#   back with those and acts a quarter as far. numpy's float64 is a float of Python's and is kept, so the same line keeps
#   its number with data in float64 and loses it with data in float32.
# Met by: who takes a limit, a horizon or a scale from the data and shares the policy. The weights fit, so nothing fails;
#   float(limit) and int(horizon) are kept.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


class Policy(nn.Module, PyTorchModelHubMixin):
    def __init__(self, limit: float = 1.0, horizon: int = 8) -> None:
        super().__init__()
        self.limit, self.horizon = limit, horizon
        self.layer = nn.Linear(3, 2)

    def forward(self, state):
        return self.limit * torch.tanh(self.layer(state)).expand(self.horizon, 2)


actions, lengths, state = np.array([[-4.0, 1.0], [2.0, 0.5]]), np.array([12, 16]), torch.ones(3)
passed = {
    "float64": (np.abs(actions).max(), int(lengths.max())),
    "float32": (np.abs(actions.astype(np.float32)).max(), lengths.max()),
    "plain": (float(np.abs(actions.astype(np.float32)).max()), int(lengths.max())),
}
seen = {}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", UserWarning)
    for name, (limit, horizon) in passed.items():
        made = Policy(limit=limit, horizon=horizon)
        place = Path(sys.argv[1], name)
        made.save_pretrained(place)
        back = Policy.from_pretrained(place)
        written = json.loads((place / "config.json").read_text())
        with torch.no_grad():
            ratio = float(back(state)[0, 0] / made(state)[0, 0])
        seen[name] = written, tuple(back(state).shape), ratio
        print(f"{name}: passed {limit!r} and {horizon!r}, saved {written}, acts {ratio:.2f} times as far")
assert not [warning for warning in said if issubclass(warning.category, UserWarning)]
assert seen["float32"] == ({"limit": 1.0, "horizon": 8}, (8, 2), 0.25)
assert seen["float64"] == seen["plain"] == ({"limit": 4.0, "horizon": 16}, (16, 2), 1.0)
PYTHON
