#!/usr/bin/env bash
# robosuite 1.4.0 with MuJoCo 3.3.2: a restored simulator state does not go on as it did.
#
# Guess: sim.set_state_from_flattened(sim.get_state().flatten()) and sim.forward() restore a deterministic simulation,
#   so the same actions give the same motion.
# Seen: the arm controller keeps its goal orientation in Python, and an action without rotation leaves it as it is; the
#   gripper's commanded opening is an integrator in Python, too. After 15 equal actions the hand is turned by 0.98
#   rad from where it went before, and the fingers are 0.6 mm off. With controller.goal_ori and gripper.current_action
#   put back as well, hand and fingers come back (1e-7 rad).
# Met by: whoever compares several futures of one state, or replays a recorded episode from its middle.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q robosuite==1.4.0 mujoco==3.3.2 numpy==2.4.6 numba==0.68.1 termcolor==3.3.0
"$folder/venv/bin/python" -W ignore - 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import numpy as np
import robosuite
from robosuite.controllers import load_controller_config

options = {"has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False, "hard_reset": False}
controllers = load_controller_config(default_controller="OSC_POSE")
env = robosuite.make("Lift", robots="Panda", controller_configs=controllers, ignore_done=True, **options)
env.reset()
robot = env.robots[0]


def run(rotation, gripper, steps):
    for _ in range(steps):
        env.step(np.array([0, 0, 0, 0, 0, rotation, gripper]))
    hand = np.array(env.sim.data.site_xmat[robot.eef_site_id]).reshape(3, 3)
    return hand, env.sim.data.qpos[robot._ref_gripper_joint_pos_indexes].copy()


def apart(one, two):
    angle = np.arccos(np.clip((np.trace(one[0].T @ two[0]) - 1) / 2, -1, 1))
    return angle, 1000 * np.abs(one[1] - two[1]).max()


run(0.5, -1, 10)
state = env.sim.get_state().flatten()
held = robot.controller.goal_ori.copy(), robot.gripper.current_action.copy()
wanted = run(0, -1, 15)
run(-1, 1, 10)  # another future
env.sim.set_state_from_flattened(state)
env.sim.forward()
usual = apart(run(0, -1, 15), wanted)
run(-1, 1, 10)
env.sim.set_state_from_flattened(state)
env.sim.forward()
robot.controller.goal_ori, robot.gripper.current_action = held
robot.controller.new_update = True
whole = apart(run(0, -1, 15), wanted)
print(f"state alone: hand turned by {usual[0]:.3f} rad, fingers {usual[1]:.2f} mm off")
print(f"with what Python holds: {whole[0]:.1e} rad, {whole[1]:.1e} mm")
assert usual[0] > 0.5 and usual[1] > 0.3
assert whole[0] < 1e-4 and whole[1] < 1e-3
PYTHON
