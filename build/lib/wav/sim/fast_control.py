"""A robosuite arm stepped with less Python, to the same state bit for bit.

Every control step is 25 steps of physics, and robosuite 1.4 looks names, limits and gripper ranges up again in each and
computes every Jacobian twice. :func:`use_fast_control` replaces those two methods on one robot; every number is
computed by the same operations from the same operands, and the same calls of ``mj_forward`` and ``mj_step`` are made.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np


def use_fast_control(robot: Any) -> None:
    """Replace ``control`` of a single-arm robot and ``update`` of its controller; call it after each reset.

    A reset gives the robot a new controller, and may give it a new model.
    """
    import mujoco  # not before the renderer has been chosen

    sim, gripper = robot.sim, robot.gripper
    fingers = [sim.model.actuator_name2id(actuator) for actuator in gripper.actuators]
    span = sim.model.actuator_ctrlrange[fingers]
    low, high = robot.torque_limits
    known = SimpleNamespace(
        fingers=fingers,
        bias=0.5 * (span[:, 1] + span[:, 0]),
        weight=0.5 * (span[:, 1] - span[:, 0]),
        low=low,
        high=high,
    )
    controller = robot.controller
    controller.update = partial(_update, mujoco, controller, sim.model.site_name2id(controller.eef_name))
    robot.control = partial(_control, robot, known)


def _control(robot: Any, known: SimpleNamespace, action: Any, policy_step: bool = False) -> None:
    """``SingleArm.control``: the first step of an action is robosuite's own, which also keeps recent values."""
    if policy_step:
        type(robot).control(robot, action, policy_step=True)
        return
    torques = robot.controller.run_controller()
    robot.torques = np.clip(torques, known.low, known.high)
    wanted = robot.gripper.format_action(action[robot.controller.control_dim :])
    control = robot.sim.data._data.ctrl
    control[known.fingers] = known.bias + known.weight * wanted
    control[robot._ref_joint_actuator_indexes] = robot.torques


def _update(mujoco: Any, controller: Any, site: int, force: bool = False) -> None:
    """``Controller.update`` with one call for both Jacobians of the end effector's ``site``."""
    if not (controller.new_update or force):
        return
    model, data, columns = controller.sim.model._model, controller.sim.data._data, controller.qvel_index
    mujoco.mj_forward(model, data)
    along, about = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    mujoco.mj_jacSite(model, data, along, about, site)
    controller.ee_pos = np.array(data.site_xpos[site])
    controller.ee_ori_mat = np.array(data.site_xmat[site].reshape([3, 3]))
    controller.ee_pos_vel, controller.ee_ori_vel = np.dot(along, data.qvel), np.dot(about, data.qvel)
    controller.joint_pos, controller.joint_vel = data.qpos[controller.qpos_index], data.qvel[columns]
    controller.J_pos, controller.J_ori = np.array(along[:, columns]), np.array(about[:, columns])
    controller.J_full = np.vstack([controller.J_pos, controller.J_ori])
    mass = np.ndarray(shape=(model.nv, model.nv), dtype=np.float64)
    mujoco.mj_fullM(model, mass, data.qM)
    controller.mass_matrix = mass[columns, :][:, columns]
    controller.new_update = False
