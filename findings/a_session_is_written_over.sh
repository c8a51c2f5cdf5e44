#!/usr/bin/env bash
# zarr 3.1.6: once a group's metadata was consolidated, each session that appends writes over the one before.
#
# Guess: consolidate_metadata helps those who ask for it (open_consolidated); open_group(path, mode="a") takes an array's
#   own shape, so that append goes behind what is there.
# Seen: every open_group and open takes the shapes that were consolidated, unasked and in mode "a" too, and append
#   leaves them as they are. Day 1 writes 10 frames and consolidates; days 2 and 3 append 10 each, and each is told 20. In
#   the end there are 20 frames, of days 1 and 3: day 2 is gone without a word, and who opens the group sees 10. Alike
#   in format 2 (.zmetadata) and 3. With use_consolidated=False all three days are there.
# Met by: replay buffers that grow by sessions of teleoperation and were consolidated once, as for a share or a download.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q zarr==3.1.6 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import zarr


def frames(day):
    return np.full((10, 2), day, np.float32)


def days(array):
    return [int(array[row, 0]) for row in range(0, array.shape[0], 10)]


for form in (2, 3):
    for how in ({}, {"use_consolidated": False}):
        path = Path(sys.argv[1], f"buffer-{form}-{len(how)}.zarr")
        data = zarr.open_group(path, mode="w", zarr_format=form).create_group("data")
        data.create_array("action", data=frames(1), chunks=(5, 2))
        zarr.consolidate_metadata(path)
        told = []
        for day in (2, 3):
            action = zarr.open_group(path, mode="a", **how)["data/action"]
            action.append(frames(day))
            told.append(action.shape[0])
        kept = days(zarr.open_array(path / "data/action", mode="r"))
        seen = days(zarr.open_group(path, mode="r", **how)["data/action"])
        print(f"format {form}, {how or 'as it is'}: told {told} frames, days kept {kept}, days seen in the group {seen}")
        assert (told, kept, seen) == (([20, 30], [1, 2, 3], [1, 2, 3]) if how else ([20, 20], [1, 3], [1]))
PYTHON
