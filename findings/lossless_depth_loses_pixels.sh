#!/usr/bin/env bash
# PyAV 18.1.0 (its x265): 12-bit grey HEVC written with lossless=1 is exact in key frames only.
#
# Guess: lossless means that every 12-bit code of a depth map comes back as it was written.
# Seen: eight 64 x 64 frames of random codes, a key frame every other one: key frames are exact, the frames between lose
#   single pixels, by up to 2201 of 4095 codes. The same without x265's hand-written assembly, and ffmpeg decodes the file
#   alike, so the encoder does it. With key frames only (keyint=1) all are exact.
# Met by: depth cameras recorded as 12-bit HEVC, as LeRobot 0.6.1 does; smooth depth was exact here, steep edges need not be.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np


def round_trip(frames, group):
    """(key frame?, pixels that differ, largest difference) of every frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx265", rate=30)
        stream.options = {"x265-params": f"lossless=1:keyint={group}:log-level=none"}
        stream.pix_fmt, stream.height, stream.width = "gray12le", *frames.shape[1:]
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray12le")))
        output.mux(stream.encode())
    file.seek(0)
    with av.open(file) as source:
        read = [(frame.key_frame, frame.to_ndarray(format="gray12le").astype(int)) for frame in source.decode(video=0)]
    return [(key, int((a != f).sum()), int(np.abs(a - f).max())) for (key, a), f in zip(read, frames, strict=True)]


frames = np.random.default_rng(0).integers(0, 4096, (8, 64, 64), dtype=np.uint16)
alone, pairs = round_trip(frames, 1), round_trip(frames, 2)
print("keyint=1:", alone)
print("keyint=2:", pairs)
assert all(wrong == 0 for _, wrong, _ in alone)
assert all(wrong == 0 for key, wrong, _ in pairs if key)
assert sum(wrong for key, wrong, _ in pairs if not key) == 89
PYTHON
