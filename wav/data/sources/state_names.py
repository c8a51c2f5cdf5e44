"""What the columns of a recorded end-effector state are, told by their names: position, rotation, gripper.

Conversions to the state of :mod:`wav.data.state` where the names are certain. Names that say roll, pitch and yaw are
not: the LIBERO conversions of the hub name axis-angles so. Then, and where names say something else, the option
``rotation`` of the reader decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wav.data.state import axis_angle_from_quat
from wav.errors import ConfigError, DataError

Rotation = Literal["axis_angle", "quat_xyzw", "quat_wxyz", "euler_xyz"]
_WIDTHS = {"axis_angle": 3, "euler_xyz": 3, "quat_xyzw": 4, "quat_wxyz": 4}
_PREFIX = re.compile(r"^(observation|state|robot\d*|eef|ee|tcp|end_effector|right|left|arm)[._ ]+")
_SAID = (
    ("position", re.compile(r"(?:pos|position|p)?[._ ]?([xyz])")),
    ("quaternion", re.compile(r"(?:q|quat|quaternion|r|rot|ori|orientation)[._ ]?([xyzw])")),
    ("axis_angle", re.compile(r"(?:axis_?angle|aa|rotvec|rot_vec)[._ ]?([xyz\d])")),
    ("euler", re.compile(r"(?:euler|rot|ori)?[._ ]?(roll|pitch|yaw)")),
    ("gripper", re.compile(r".*(?:gripper|finger).*()")),
    ("pad", re.compile(r"(?:pad|padding)()")),
)
#: names that say nothing: a number, or one word for every column
_SILENT = re.compile(r"(state|dim|s|obs|feature|motor|observation)?[._ ]?\d*")


@dataclass(frozen=True)
class StateColumns:
    """Which columns of a recorded state are what."""

    position: tuple[int, ...]
    rotation: tuple[int, ...]
    kind: Rotation
    gripper: tuple[int, ...]
    """Two fingers (m, of opposite sign), or the width between them (m)."""

    def __call__(self, rows: NDArray[np.floating]) -> NDArray[np.floating]:
        """(T, 8) position (m), axis-angle (rad), two fingers (m) of rows (T, D); DataError for no quaternions."""
        fingers = rows[:, self.gripper]
        if len(self.gripper) == 1:
            fingers = np.concatenate([fingers / 2, -fingers / 2], axis=1)
        return np.concatenate([rows[:, self.position], self._axis_angle(rows[:, self.rotation]), fingers], axis=1)

    def _axis_angle(self, turn: NDArray[np.floating]) -> NDArray[np.floating]:
        if self.kind == "axis_angle":
            return turn
        if self.kind == "euler_xyz":
            from scipy.spatial.transform import Rotation as Turn

            turn = Turn.from_euler("xyz", turn).as_quat()
        if self.kind == "quat_wxyz":
            turn = turn[:, [1, 2, 3, 0]]
        length = np.linalg.norm(turn, axis=1)
        if np.abs(length - 1).max() > 0.01:
            step = int(np.abs(length - 1).argmax())
            raise DataError(
                f"the state's quaternion has length {length[step]:.3g} at step {step}; correct the names of its "
                "columns or the recording"
            )
        return axis_angle_from_quat(_continuous(turn / length[:, None]))

    def describe(self) -> str:
        """For the store's ``source.json``."""
        hand = "gripper_qpos(2)" if len(self.gripper) == 2 else "gripper_width(1)"
        return f"eef_pos{list(self.position)} {self.kind}{list(self.rotation)} {hand}{list(self.gripper)}"


def _continuous(quat: NDArray[np.floating]) -> NDArray[np.floating]:
    """The same rotations (T, 4) without jumps from a quaternion to its antipode, the first with its largest > 0."""
    signs = np.where((quat[1:] * quat[:-1]).sum(axis=1) < 0, -1.0, 1.0)
    first = np.sign(quat[0, np.abs(quat[0]).argmax()])
    result: NDArray[np.floating] = quat * (first * np.concatenate([[1.0], np.cumprod(signs)]))[:, None]
    return result


def state_columns(names: tuple[str, ...], width: int, declared: Rotation | str, field: str, where: str) -> StateColumns:
    """The columns of an end-effector state of ``width`` numbers; ConfigError where the names leave them open.

    ``names`` are none where the metadata are silent; ``declared`` is the reader's option ``field``.
    """
    silent = len(names) != width or all(_SILENT.fullmatch(name.lower()) for name in names)
    roles = [_role(name) for name in names]
    if not silent and not declared:
        found = _columns(roles)
        if found is not None:
            return found
        turn = {role for role, _ in roles} & {"euler", "quaternion"}
        raise ConfigError(
            f"{where}: its names {list(names)} "
            + ("leave open what its rotation is" if turn else "are not those of an end-effector state")
            + f"; declare {field}, one of {', '.join(_WIDTHS)} (LIBERO's conversions say roll, pitch, yaw and hold "
            "axis_angle), or convert the dataset to eef_pos(3) axis_angle(3) gripper_qpos(2)"
        )
    kind: Rotation = declared or "axis_angle"  # type: ignore[assignment]
    end = 3 + _WIDTHS[kind]
    pads = {i for i, (role, _) in enumerate(roles) if role == "pad"} if not silent else set()
    gripper = tuple(i for i in range(end, width) if i not in pads)
    if len(gripper) not in (1, 2):
        raise ConfigError(
            f"{where}: {width} numbers are not a position (3), {kind} ({_WIDTHS[kind]}) and one or two numbers of a "
            f"gripper; declare another {field}, or convert the dataset"
        )
    return StateColumns((0, 1, 2), tuple(range(3, end)), kind, gripper)


def named_pose(names: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether names of a state say beyond doubt that it is an end-effector pose with a gripper."""
    return shape == (len(names),) and _columns([_role(name) for name in names]) is not None


def _role(name: str) -> tuple[str, str]:
    """(what a column is, which of its parts)."""
    name = name.lower()
    while (short := _PREFIX.sub("", name)) != name:
        name = short
    for role, pattern in _SAID:
        found = pattern.fullmatch(name)
        if found:
            return role, found.group(1)
    return "", ""


def _columns(roles: list[tuple[str, str]]) -> StateColumns | None:
    """Columns where every name says what it is, beyond doubt."""
    places: dict[str, dict[str, int]] = {}
    gripper = []
    for column, (role, part) in enumerate(roles):
        if role == "gripper":
            gripper.append(column)
        elif role != "pad" and places.setdefault(role, {}).setdefault(part, column) != column:
            return None
    position = places.pop("position", {})
    if sorted(position) != ["x", "y", "z"] or len(gripper) not in (1, 2) or len(places) != 1:
        return None
    (role, parts), where = next(iter(places.items())), tuple(position[part] for part in "xyz")
    if role == "quaternion" and sorted(parts) == ["w", "x", "y", "z"]:
        return StateColumns(where, tuple(parts[part] for part in "xyzw"), "quat_xyzw", tuple(gripper))
    if role == "axis_angle" and len(parts) == 3:
        return StateColumns(where, tuple(parts[part] for part in sorted(parts)), "axis_angle", tuple(gripper))
    return None
