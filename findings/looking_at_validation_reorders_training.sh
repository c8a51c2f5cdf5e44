#!/usr/bin/env bash
# torch 2.13.0: a pass over a DataLoader that neither shuffles nor has workers draws from the global generator.
#
# Guess: DataLoader(data, shuffle=False, num_workers=0) needs no random number, so a validation in between leaves a seeded
#   training as it was.
# Seen: every iterator draws a seed for workers, whether there are any or not. With a look at the validation data between
#   two epochs of the same seed the second epoch comes in another order, and its dropout differs, though the model was in
#   eval and nothing was random. With a generator of its own the loader leaves the global one alone.
# Met by: who compares a run that validates every 100 steps with one that validates every 1,000, or switches validation
#   on in a recipe: part of the difference is another order of the data.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils.data import DataLoader

training = DataLoader(range(8), batch_size=8, shuffle=True)


def second_epoch(validation=None):
    """The order of the second epoch and what dropout keeps there, with or without a pass over ``validation`` before."""
    torch.manual_seed(0)
    next(iter(training))
    if validation is not None:
        assert [batch.tolist() for batch in validation] == [[0, 1], [2, 3]]
    order = next(iter(training)).tolist()
    return order, torch.nn.functional.dropout(torch.ones(8)).bool().int().tolist()


data = {"batch_size": 2, "shuffle": False, "num_workers": 0}
seen = {
    "without validation": second_epoch(),
    "with validation": second_epoch(DataLoader(range(4), **data)),
    "with a generator of its own": second_epoch(DataLoader(range(4), generator=torch.Generator(), **data)),
}
for name, (order, kept) in seen.items():
    print(f"{name}: {order}, dropout keeps {kept}")
assert seen["without validation"] == seen["with a generator of its own"]
assert seen["with validation"][0] != seen["without validation"][0]
assert seen["with validation"][1] != seen["without validation"][1]
PYTHON
