#!/usr/bin/env bash
# robosuite 1.5.2 (mujoco 3.3.7): an object's file is read without its own <compiler> and its own unnamed <default>.
#
# Guess: MujocoXMLObject gives the object that MuJoCo makes of the file, as MjSpec.attach does: angles in the unit that
#   the file states (degrees where it states none), and every default of the file in force.
# Seen: angles are radians, as the scene's are, and defaults outside a class are gone, without a word. A lid that opens
#   by 0 to 90 degrees opens by 0 to 90 radians, which is no limit, and is mounted at 117 degrees in place of 90 (90
#   radians); box and lid weigh five times as much (density 200 becomes 1000), friction is 1 in place of 0.3, and the
#   hinge has no damping. Even an element with a class loses what that class inherits from the unnamed defaults.
# Met by: who brings an object into robosuite that a viewer shows well: it is heavier, stickier and loosely hinged, and
#   policies and demonstrations are of that object.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q robosuite==1.5.2 mujoco==3.3.7 opencv-python==4.11.0.86 numpy==1.26.4
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import logging
import sys
from pathlib import Path

logging.disable(logging.WARNING)
import mujoco
import numpy as np
from robosuite.models.objects import MujocoXMLObject
from robosuite.models.world import MujocoWorldBase

path = Path(sys.argv[1], "box.xml")
path.write_text("""<mujoco model="box">
  <default>
    <joint damping="0.5"/>
    <geom density="200" friction="0.3 0.005 0.0001"/>
    <default class="blue"><geom rgba="0 0 1 1"/></default>
  </default>
  <worldbody>
    <body>
      <body name="object">
        <geom name="base" type="box" size="0.1 0.1 0.05" group="0"/>
        <body name="lid" pos="0 0.1 0.05" euler="0 0 90">
          <joint name="hinge" type="hinge" axis="1 0 0" range="0 90"/>
          <geom name="plate" class="blue" type="box" pos="0 -0.1 0.01" size="0.1 0.1 0.01" group="0"/>
        </body>
      </body>
      <site name="bottom_site" pos="0 0 -0.05"/>
      <site name="top_site" pos="0 0 0.07"/>
      <site name="horizontal_radius_site" pos="0.15 0.15 0"/>
    </body>
  </worldbody>
</mujoco>""")


def told(model, prefix):
    """(hinge's upper limit and lid's turn in degrees, damping, masses of box and lid, friction, the lid is blue)."""
    hinge, plate, lid = model.joint(f"{prefix}hinge"), model.geom(f"{prefix}plate"), model.body(f"{prefix}lid")
    box = model.body(model.geom(f"{prefix}base").bodyid[0])
    numbers = (
        np.degrees(hinge.range[1]), np.degrees(2 * np.arccos(lid.quat[0])), hinge.damping[0], box.mass[0], lid.mass[0],
        plate.friction[0],
    )
    return *(round(float(number), 2) for number in numbers), plate.rgba.tolist() == [0, 0, 1, 1]


empty = MujocoWorldBase().get_xml()
spec = mujoco.MjSpec.from_string(empty)
spec.attach(mujoco.MjSpec.from_file(str(path)), prefix="box_", frame=spec.worldbody.add_frame())
thing = MujocoXMLObject(str(path), "box", joints=None, duplicate_collision_geoms=False)
world = MujocoWorldBase()
world.merge_assets(thing)
world.worldbody.append(thing.get_obj())
seen = {
    "the file in MuJoCo": told(mujoco.MjModel.from_xml_path(str(path)), ""),
    "attached to robosuite's scene by MjSpec": told(spec.compile(), "box_"),
    "in robosuite's scene by robosuite": told(world.get_model(), "box_"),
}
for where, numbers in seen.items():
    words = "opens by {} degrees, mounted at {}, damping {}, {} and {} kg, friction {}, blue: {}"
    print(f"{where}: {words.format(*numbers)}")
own, attached, robosuites = seen.values()
assert own == attached == (90.0, 90.0, 0.5, 0.8, 0.16, 0.3, True)
assert robosuites == (5156.62, 116.62, 0.0, 4.0, 0.8, 1.0, True)
PYTHON
