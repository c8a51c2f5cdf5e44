#!/usr/bin/env bash
# robosuite 1.5.2 (mujoco 3.3.7): the scene that is kept with a demonstration weighs more than the one that was played.
#
# Guess: model.xml of DataCollectionWrapper, which becomes a demonstration's model_file, is the scene that was played.
# Seen: robosuite's scenes say that only collision geoms (inertiagrouprange="0 0") have mass. The kept file comes from
#   sim.model.get_xml(), and MuJoCo 3.3.7 does not write that attribute: loaded again, visual geoms weigh too. An IIWA's
#   gripper goes from 0.31 to 0.56 kg, the table from 32 to 70 kg, and a mug whose picture is a second geom of the same
#   size from 0.06 to 0.13 kg. From one state and by one sequence of actions the hand is up to 0.9 mm off within 5 s,
#   and 0 mm with env.model.get_xml(), which keeps the attribute. MuJoCo 3.10.0 leaves it out too, 4.0.0 writes it.
# Met by: who replays demonstrations (model_file of robosuite and robomimic) to render or relabel them, or compares
#   forces and inertias: pictures and states are of other bodies than those that the actions moved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q robosuite==1.5.2 mujoco==3.3.7 opencv-python==4.11.0.86 numpy==1.26.4 h5py==3.16.0
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import logging
import sys
from pathlib import Path

logging.disable(logging.WARNING)
import numpy as np
import robosuite
from robosuite.models.objects import MujocoXMLObject
from robosuite.models.world import MujocoWorldBase
from robosuite.utils.binding_utils import MjSim
from robosuite.wrappers import DataCollectionWrapper

GRIPPER = "gripper0_right_right_gripper"
WAVE = np.array([1.0, 1.3, 0.7, 0.0, 0.0, 0.0])
actions = [np.append(0.5 * np.sin(step / 10 * WAVE), -1.0) for step in range(100)]


def made():
    return robosuite.make(
        "Lift", robots="IIWA", has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, seed=0
    )


def masses(sim, *bodies):
    return [round(float(sim.model.body_mass[sim.model.body_name2id(body)]), 2) for body in bodies]


def played(scene):
    """(masses of gripper and table, where the hand was after each action) in the scene of an XML text."""
    env = made()
    env.reset()
    env.reset_from_xml_string(scene)
    env.sim.set_state_from_flattened(state)
    env.sim.forward()
    hand = []
    for action in actions:
        env.step(action)
        hand.append(env.sim.data.get_body_xpos("robot0_right_hand").copy())
    return masses(env.sim, GRIPPER, "table"), np.array(hand)


recorder = DataCollectionWrapper(made(), sys.argv[1])
recorder.reset()
state = recorder.env.sim.get_state().flatten()
scene = recorder.env.model.get_xml()
recorder.step(actions[0])
recorder.close()
(kept,) = Path(sys.argv[1]).glob("ep_*/model.xml")
(weights, hand), (weights_again, hand_again) = played(scene), played(scene)
weights_kept, hand_kept = played(kept.read_text())
off = 1000 * float(np.linalg.norm(hand_kept - hand, axis=1).max())
print(f"gripper and table: {weights} kg in the scene played, {weights_kept} kg in the one kept")
print(f"the hand is up to {off:.2f} mm off, {1000 * np.abs(hand_again - hand).max()} mm in a second run as played")

path = Path(sys.argv[1], "mug.xml")
path.write_text("""<mujoco model="mug">
  <worldbody>
    <body>
      <body name="object">
        <geom name="wall" type="box" size="0.04 0.04 0.05" density="100" group="0"/>
        <geom name="picture" type="cylinder" size="0.045 0.05" density="100" group="1" contype="0" conaffinity="0"/>
      </body>
      <site name="bottom_site" pos="0 0 -0.05"/>
      <site name="top_site" pos="0 0 0.05"/>
      <site name="horizontal_radius_site" pos="0.05 0.05 0"/>
    </body>
  </worldbody>
</mujoco>""")
mug, world = MujocoXMLObject(str(path), "mug", duplicate_collision_geoms=False), MujocoWorldBase()
world.worldbody.append(mug.get_obj())
sim = MjSim.from_xml_string(world.get_xml())
mugs = masses(sim, "mug_main") + masses(MjSim.from_xml_string(sim.model.get_xml()), "mug_main")
print(f"mug: {mugs[0]} kg, {mugs[1]} kg when kept and loaded again")
assert weights == weights_again == [0.31, 32.0] and weights_kept == [0.56, 70.09]
assert np.array_equal(hand, hand_again) and 0.3 < off < 3
assert mugs == [0.06, 0.13]
PYTHON
