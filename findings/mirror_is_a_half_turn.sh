#!/usr/bin/env bash
# PyAV 18.1.0 and OpenCV 5.0.0.93 (wheels): an mp4 whose display matrix mirrors left and right, as front cameras write.
#
# Guess: OpenCV shows it mirrored, or as stored; PyAV's frame.rotation, which is an angle, is 0.
# Seen: OpenCV turns it by 180 degrees. PyAV gives the stored picture and rotation -180, the same number as for a video
#   that is to be turned by half; only the nine numbers of the DISPLAYMATRIX side data tell the two apart.
# Met by: readers of recordings of front cameras, phones and tablets, where left and right matter to a robot.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import struct
import sys
from pathlib import Path

import av
import cv2
import numpy as np

SIDE, ONE, UNIT = 64, 1 << 16, 1 << 30
MATRICES = {
    "mirror": (-ONE, 0, 0, 0, ONE, 0, SIDE * ONE, 0, UNIT),
    "half turn": (-ONE, 0, 0, 0, -ONE, 0, SIDE * ONE, SIDE * ONE, UNIT),
}
stored = np.full((SIDE, SIDE, 3), 40, np.uint8)
stored[:32, :32], stored[:32, 32:], stored[32:, :32] = (220, 60, 60), (60, 220, 60), (60, 60, 220)
PICTURES = {"stored": stored, "mirror": stored[:, ::-1], "half turn": stored[::-1, ::-1], "upside down": stored[::-1]}
plain = Path(sys.argv[1], "plain.mp4")
with av.open(str(plain), "w") as out:
    stream = out.add_stream("libx264", rate=30, options={"crf": "5"})
    stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
    for _ in range(4):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
    out.mux(stream.encode())


def called(picture):
    return min(PICTURES, key=lambda name: np.abs(picture.astype(int) - PICTURES[name]).mean())


seen = {}
for name, matrix in MATRICES.items():
    data = bytearray(plain.read_bytes())
    track = data.find(b"tkhd")
    place = track + (44 if data[track + 4] == 0 else 56)
    data[place : place + 36] = struct.pack(">9i", *matrix)
    path = plain.with_name(f"{name.replace(' ', '_')}.mp4")
    path.write_bytes(bytes(data))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    _, picture = cv2.VideoCapture(str(path)).read()
    seen[name] = called(frame.to_ndarray(format="rgb24")), frame.rotation, called(picture[:, :, ::-1])
    print(f"{name}: PyAV gives {seen[name][0]}, rotation {seen[name][1]}; OpenCV gives {seen[name][2]}")
assert seen["mirror"] == ("stored", -180, "half turn")
assert seen["half turn"][0] == "stored" and abs(seen["half turn"][1]) == 180 and seen["half turn"][2] == "half turn"
PYTHON
