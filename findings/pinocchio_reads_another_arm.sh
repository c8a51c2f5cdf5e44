#!/usr/bin/env bash
# Pinocchio 4.1.0 (pin): an MJCF file that is valid and usual gives another arm than in MuJoCo, without a word.
#
# Guess: buildModelFromMJCF gives the arm that MuJoCo 3.3.7 makes of the file, or an error that names what it does not
#   read.
# Seen: one arm of two joints and 3 kg, written in six ways that MuJoCo takes for one and the same. Pinocchio agrees on
#   the plain one. With the mount as axisangle, whose axis MuJoCo brings to length 1, the mount is no rotation and the
#   hand of an arm of 0.8 m is 12 m off; with euler under eulerseq="XYZ", which it reads as "xyz", 0.93 m. Masses that a
#   default class gives the geoms, and settotalmass, are passed over: 1.28 kg (from density) or 6 kg in place of 3. A
#   body inside of <frame> is gone with its joint and all behind it.
# Met by: controllers and planners that take dynamics from Pinocchio for a robot that is simulated in MuJoCo: gravity
#   compensation pushes, and inverse kinematics reaches for another place.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pin==4.1.0 mujoco==3.3.7 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import mujoco
import numpy as np
import pinocchio

PLAIN = {
    "compiler": "", "default": "", "mount": 'quat="0.70710678 0.5 0.5 0"', "upper": 'mass="2"', "lower": 'mass="1"',
    "before": "", "after": "", "place": 'pos="0.4 0 0"',
}
WAYS = {
    "plain": {},
    "axisangle": {"mount": 'axisangle="1 1 0 90"'},
    "eulerseq": {"compiler": 'eulerseq="XYZ"', "mount": 'euler="90 45 45"'},
    "default masses": {
        "default": '<default class="two"><geom mass="2"/></default><default class="one"><geom mass="1"/></default>',
        "upper": 'class="two"', "lower": 'class="one"',
    },
    "settotalmass": {"compiler": 'settotalmass="3"', "upper": 'mass="4"', "lower": 'mass="2"'},
    "frame": {"before": '<frame pos="0.4 0 0">', "after": "</frame>", "place": ""},
}
ARM = """<mujoco model="arm"><compiler {compiler}/><default>{default}</default><worldbody>
  <body name="upper" pos="0 0 0.3" {mount}><joint name="shoulder" axis="0 1 0"/>
    <geom type="box" size="0.2 0.02 0.02" pos="0.2 0 0" {upper}/>
    {before}<body name="lower" {place}><joint name="elbow" axis="0 1 0"/>
      <geom type="box" size="0.2 0.02 0.02" pos="0.2 0 0" {lower}/>
      <body name="hand" pos="0.4 0 0"/>
    </body>{after}
  </body>
</worldbody></mujoco>"""
ANGLES = np.array([0.3, 0.5])


def by_mujoco(path):
    """(joints, kg, place of the hand)."""
    model = mujoco.MjModel.from_xml_path(path)
    data = mujoco.MjData(model)
    data.qpos[:] = ANGLES
    mujoco.mj_kinematics(model, data)
    return model.njnt, round(float(model.body_mass.sum()), 2), data.body("hand").xpos.copy()


def by_pinocchio(path):
    """(joints, kg, place of the hand, or None where there is no hand)."""
    model = pinocchio.buildModelFromMJCF(path)
    data = model.createData()
    pinocchio.framesForwardKinematics(model, data, ANGLES[: model.nq])
    place = data.oMf[model.getFrameId("hand")].translation.copy() if model.existFrame("hand") else None
    return model.njoints - 1, round(pinocchio.computeTotalMass(model), 2), place


seen = {}
plain_hand = None
for way, changes in WAYS.items():
    path = Path(sys.argv[1], "arm.xml")
    path.write_text(ARM.format(**{**PLAIN, **changes}))
    joints, mass, hand = by_mujoco(str(path))
    plain_hand = hand if plain_hand is None else plain_hand
    assert (joints, mass) == (2, 3.0) and np.allclose(hand, plain_hand, atol=1e-6), way
    joints, mass, place = by_pinocchio(str(path))
    seen[way] = joints, mass, None if place is None else round(float(np.linalg.norm(place - hand)), 2)
    off = "no hand" if place is None else f"the hand {seen[way][2]} m off"
    print(f"{way}: in MuJoCo 2 joints and 3.0 kg, in Pinocchio {joints} and {mass} kg, {off}")
assert seen == {
    "plain": (2, 3.0, 0.0),
    "axisangle": (2, 3.0, 12.36),
    "eulerseq": (2, 3.0, 0.93),
    "default masses": (2, 1.28, 0.0),
    "settotalmass": (2, 6.0, 0.0),
    "frame": (1, 2.0, None),
}
PYTHON
