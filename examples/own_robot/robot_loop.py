"""A robot that a served policy drives at its own rate.

Replace the two functions by your robot's; then, beside a running ``wav serve export/``:

    python examples/own_robot/robot_loop.py "lift the red cube"
"""

import sys

import numpy as np
from wav_client import Client
from wav_client.realtime import Runner

HOLD = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)  # no motion; the gripper stays as it was commanded last


def observe() -> dict:
    """The newest camera frames and state; what the policy expects stands in ``client.metadata``."""
    image = np.zeros((480, 640, 3), np.uint8)
    state = np.zeros(8, np.float32)
    return {"observation/image": image, "observation/wrist_image": image, "observation/state": state, "prompt": PROMPT}


def apply(action: np.ndarray | None) -> None:
    """Send one action to the robot's controller; None: hold."""
    if action is not None:
        HOLD[-1] = action[-1]
    command = HOLD if action is None else action
    print(np.round(command, 2))


PROMPT = sys.argv[1]
with Client("127.0.0.1", 8000) as client:
    client.reset()
    print(Runner(client.act, observe, apply, rate=client.metadata["control_hz"]).run(steps=200))
