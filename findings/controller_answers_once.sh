#!/usr/bin/env bash
# simple-pid 2.0.1 in MuJoCo 3.3.2: a controller that is told the simulator's time step answers once and never again.
#
# Guess: pid(x, dt=0.002) counts simulated time instead of the clock's, so it computes at every call, or at every fifth,
#   because its sample_time is 0.01 s where nobody sets it.
# Seen: each call's own dt is compared with sample_time and nothing adds up, so every call after the first one returns
#   the first output. A cart that should stop at 1 m is pushed with the first 50 N for ever and is 100 m away after 2 s,
#   without a word. With sample_time=None, or with time_fn=lambda: data.time and no dt, it stops at 1 m.
# Met by: loops at MuJoCo's own 2 ms, or at any step under 10 ms, that script demonstrations or run below a policy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q simple-pid==2.0.1 mujoco==3.3.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import mujoco
from simple_pid import PID

CART = """<mujoco><worldbody><body><joint name="x" type="slide" axis="1 0 0"/><geom size="0.1" mass="1"/></body></worldbody>
<actuator><motor joint="x"/></actuator></mujoco>"""


def drive(told, **options):
    """Two seconds toward 1 m: where the cart is then, and how many different forces it was given."""
    model = mujoco.MjModel.from_xml_string(CART)
    data = mujoco.MjData(model)
    if not told:
        options["time_fn"] = lambda: data.time
    pid = PID(50, 0, 14, setpoint=1.0, **options)
    forces = set()
    for _ in range(1000):
        data.ctrl[0] = pid(data.qpos[0], dt=model.opt.timestep) if told else pid(data.qpos[0])
        forces.add(data.ctrl[0])
        mujoco.mj_step(model, data)
    assert model.opt.timestep == 0.002 and abs(data.time - 2) < 1e-9
    return data.qpos[0], len(forces)


usual, every, clock = drive(True), drive(True, sample_time=None), drive(False)
print(f"dt=0.002: the cart is at {usual[0]:.1f} m and was given {usual[1]} force")
print(f"dt=0.002 and sample_time=None: at {every[0]:.3f} m, {every[1]} forces")
print(f"time_fn of the simulator and no dt: at {clock[0]:.3f} m, {clock[1]} forces")
assert usual[1] == 1 and usual[0] > 90
assert every[1] > 900 and abs(every[0] - 1) < 0.01
assert 150 < clock[1] < 250 and abs(clock[0] - 1) < 0.01
PYTHON
