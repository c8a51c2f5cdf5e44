#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1): seeking backward to a frame of an H.265 file may land after it.
#
# Guess: container.seek(pts) goes to the key frame at or before pts, so decoding from there passes the frame.
# Seen: with libx265's open groups of pictures, frames that are shown before a key frame are stored behind it and cannot
#   be decoded from it. Seeking to one of them lands on that key frame, and the first frame decoded is a later one:
#   16 of 150 frames at a key frame every 30 with four B-frames. Seeking to an earlier time finds them.
# Met by: readers of LeRobot v3 datasets that were encoded anew: an episode that begins there looks truncated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import av
import numpy as np

path = str(Path(sys.argv[1], "a.mp4"))
options = {"x265-params": "keyint=30:min-keyint=30:scenecut=0:bframes=4:b-adapt=0:log-level=error"}
with av.open(path, "w") as out:
    stream = out.add_stream("libx265", rate=30, options=options)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for i in range(150):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + i, np.uint8), format="rgb24")))
    out.mux(stream.encode())
with av.open(path) as container:
    times = [frame.pts for frame in container.decode(video=0)]
late, found = [], 0
for number, pts in enumerate(times):
    with av.open(path) as container:
        stream = container.streams.video[0]
        container.seek(pts, stream=stream)
        if next(container.decode(stream)).pts > pts:
            late.append(number)
            container.seek(max(times[0], times[max(0, number - 30)]), stream=stream)
            found += any(frame.pts == pts for frame in container.decode(stream))
print(f"{len(late)} of {len(times)} seeks land after the frame, for frames {late}; from a second earlier {found} are found")
assert len(late) == found == 16
PYTHON
