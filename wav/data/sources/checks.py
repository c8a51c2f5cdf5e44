"""What the numbers of a demonstration mean: checked against what they do, never taken on trust.

A gripper of the other sign, a state in another order or a wrong control rate trains without an error and then solves
nothing, so each is read from the metadata, measured in the data, or declared in ``params.yaml``; a contradiction is
refused with the setting that resolves it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wav.data.sources.options import AlohaHdf5Options, DatasetOptions, LeRobotOptions

Floats = NDArray[np.floating]

CANONICAL_GRIPPER = "-1 open, +1 close"
#: option ``gripper`` of a reader -> (value that opens, value that closes)
GRIPPERS = {
    CANONICAL_GRIPPER: (-1.0, 1.0),
    "+1 open, -1 close": (1.0, -1.0),
    "0 open, 1 close": (0.0, 1.0),
    "1 open, 0 close": (1.0, 0.0),
}
#: |a[:6]| below which a step with an unchanged gripper does nothing (OpenVLA's filter of LIBERO)
NOOP_NORM = 1e-4
MAX_FINGER = 0.2  # m from the middle
RATE_TOLERANCE = 0.005  # share by which a recorded rate may miss data.control_hz: cameras of 29.97 frames run at 30
#: option ``unit`` of a reader -> what makes radians of a joint's numbers; a gripper's 0 to 100 becomes 0 to 1
UNITS = {"radian": 1.0, "degree": np.pi / 180, "percent": np.pi / 100}
FULL_TURN = 2 * np.pi + 0.5  # rad; joints that turn further are declared
_MOTION = 0.01  # m of summed finger motion before the gripper's sign counts as seen
_LAG = 4  # steps a gripper takes to follow visibly


def gripper_evidence(command: Floats, opening: Floats) -> float:
    """Summed finger motion (m) in the direction of the command: negative where high commands close.

    Args:
        command: (T,) gripper actions, action t executed on frame t.
        opening: (T,) distance of the fingers (m).
    """
    low, high = float(command.min()), float(command.max())
    if len(command) <= _LAG or high - low < 0.5:
        return 0.0
    moved = opening[_LAG:] - opening[:-_LAG]
    sign = np.where(command[:-_LAG] > (low + high) / 2, 1.0, -1.0)
    steady = sign == np.where(command[_LAG:] > (low + high) / 2, 1.0, -1.0)
    return float((sign * moved)[steady].sum() / _LAG)


def detect_gripper(samples: Iterable[tuple[Floats, Floats]]) -> str:
    """The gripper convention that (command, opening) samples show; empty where none, DataError where several.

    Samples whose fingers are further apart than any gripper's are left out; reading the episode refuses them by name.
    """
    along = against = low = 0.0
    for command, opening in samples:
        if np.abs(opening).max() <= 2 * MAX_FINGER:
            evidence = gripper_evidence(command, opening)
            along, against = along + max(evidence, 0.0), against + max(-evidence, 0.0)
            low = min(low, float(command.min()))
    if max(along, against) < _MOTION:
        return ""
    if min(along, against) > 0.25 * max(along, against):
        raise DataError(
            "gripper: high commands close the gripper in some demonstrations and open it in others; "
            "split the dataset by convention and ingest the parts separately"
        )
    closes = against > along
    if low < -0.5:
        return CANONICAL_GRIPPER if closes else "+1 open, -1 close"
    return "0 open, 1 close" if closes else "1 open, 0 close"


def resolve_gripper(options: DatasetOptions, detected: str, usual: str, where: str) -> str:
    """The convention out of what is declared, what the fingers show and what the format prescribes (``usual``).

    ConfigError where nothing says which, or two of them contradict each other.
    """
    declared, field = options.gripper, f"{options.section}.gripper"
    said = declared or usual
    if not said and not detected:
        raise ConfigError(
            f"{where}: neither the metadata nor the fingers' motion tell the gripper's sign; declare {field} "
            f"(one of {', '.join(repr(name) for name in GRIPPERS)})"
        )
    if said and detected and said != detected:
        source = field if declared else "the format's convention"
        raise ConfigError(
            f"{where}: {source} is {said!r}, but the fingers move as under {detected!r}; set {field}: {detected!r}"
        )
    return said or detected


def canonical_gripper(command: Floats, convention: str) -> Floats:
    """Commands (T,) of a convention as -1 open, +1 close; DataError for one outside its range."""
    opened, closed = GRIPPERS[convention]
    low, high = min(opened, closed), max(opened, closed)
    if command.min() < low - 1e-3 or command.max() > high + 1e-3:
        worst = int(np.abs(command - (low + high) / 2).argmax())
        raise DataError(
            f"gripper action is {float(command[worst]):g} at step {worst}, outside [{low:g}, {high:g}] of "
            f"{convention!r}; correct the reader's option gripper or the recording"
        )
    if convention == CANONICAL_GRIPPER:
        return command
    return (command - opened) / (closed - opened) * 2 - 1


def check_deltas(actions: Floats) -> None:
    """Refuse actions (T, A) whose motion part is not an OSC_POSE delta in [-1, 1].

    Raises:
        DataError: names the first step and column that lies outside.
    """
    motion = np.abs(actions[:, :-1])
    if motion.max(initial=0.0) > 1.0 + 1e-3:
        step, column = (int(i) for i in np.unravel_index(motion.argmax(), motion.shape))
        raise DataError(
            f"actions[{step}, {column}] = {float(actions[step, column]):g} lies outside [-1, 1] of OSC_POSE deltas; "
            "convert the actions at the source"
        )


def check_state_layout(state: Floats) -> None:
    """Refuse states (T, 8) that cannot be end-effector position (m), axis-angle (rad), two finger positions (m).

    The two fingers move along one axis in opposite directions, so their signs differ.

    Raises:
        DataError: positions, angles or fingers are too large, columns look like a quaternion, or the fingers have one
            sign.
    """
    rotation = np.linalg.norm(state[:, 3:6], axis=1).max()
    fingers = np.abs(state[:, 6:8]).max()
    reach = np.abs(state[:, :3]).max()
    means = "data.state_dim = 8 means eef_pos(3) axis_angle(3) gripper_qpos(2)"
    if reach > 5 or rotation > 2 * np.pi + 0.01 or fingers > MAX_FINGER:
        raise DataError(
            f"state reaches {reach:.3g} m, {rotation:.3g} rad and fingers at {fingers:.3g} m; {means}, so convert "
            "millimetres, degrees, quaternions or normalised grippers at the source"
        )
    length = np.linalg.norm(state[:, 3:7], axis=1)
    if np.abs(length - 1).max() < 1e-3:
        raise DataError(
            f"columns 3 to 6 of the state have length 1 at every step, as a quaternion has; {means}, so name its "
            "columns in the metadata, or convert it at the source"
        )
    if state[:, 6].min() < -0.01 or state[:, 7].max() > 0.01:
        raise DataError(
            f"the state's last two numbers reach {state[:, 6].min():.3g} and {state[:, 7].max():.3g}, where fingers "
            f"(m) lie on either side of 0: first >= 0, second <= 0; {means}, so convert them at the source"
        )


def check_instructions(instructions: Iterable[str], tokens: int) -> None:
    """Refuse instructions that no T5 fits into ``tokens`` (data.text_tokens): each word and the end is one or more.

    Said before anything is read: ``encode``, which counts exactly, comes hours later.

    Raises:
        ConfigError: names the instruction and how many tokens it has at least.
    """
    for instruction in instructions:
        least = len(instruction.split()) + 1
        if least > tokens:
            raise ConfigError(
                f"data.text_tokens = {tokens}: instruction {instruction!r} has at least {least} tokens; "
                f"set data.text_tokens to {-(-5 * least // 4)} or so, or shorten the instruction"
            )


def gripper_columns(names: tuple[str, ...], width: int) -> list[int]:
    """Columns of joint states that are grippers: by name; of two arms without names the last of each seven."""
    if len(names) == width:
        return [column for column, name in enumerate(names) if "gripper" in name.lower()]
    return [6, 13] if width == 14 else []


def to_radians(rows: Floats, names: tuple[str, ...], options: LeRobotOptions, what: str) -> Floats:
    """Joint states or targets (T, D) in radians; ConfigError where they cannot be, and no unit is declared."""
    if options.unit:
        factors = np.full(rows.shape[1], UNITS[options.unit])
        if options.unit != "radian":
            factors[gripper_columns(names, rows.shape[1])] = 0.01
        converted: Floats = rows * factors
        return converted
    if len(rows) and np.abs(rows).max() > FULL_TURN:
        column = int(np.abs(rows).max(axis=0).argmax())
        name = names[column] if len(names) == rows.shape[1] else str(column)
        raise ConfigError(
            f"{what} reaches {float(rows[np.abs(rows[:, column]).argmax(), column]):.4g} in column {name}, which is no "
            f"angle in radians; declare {options.section}.unit: degree, percent (LeRobot's -100 to 100) or, if it is "
            "right, radian"
        )
    return rows


def check_control_hz(recorded: float, options: DatasetOptions | AlohaHdf5Options, wanted: int, where: str) -> None:
    """ConfigError where the recording's rate is unknown or another than ``wanted`` (data.control_hz).

    ``recorded`` is 0 where the metadata tell nothing; ``where`` names file and field.
    """
    declared, field = options.control_hz, f"{options.section}.control_hz"
    rate = declared or recorded
    if not rate:
        raise ConfigError(f"{where}: the control rate is not recorded; declare {field} (LIBERO runs at 20)")
    if abs(rate - wanted) <= RATE_TOLERANCE * wanted:
        return
    ways = []
    if abs(rate - round(rate)) <= RATE_TOLERANCE * round(rate):
        ways.append(f"set data.control_hz: {round(rate)}")
    if not declared:
        ways.append(
            "where the metadata is wrong (LeRobot forms of LIBERO declare 10 but ran at 20), or nearly right, declare "
            f"{field}: {wanted}"
        )
    raise ConfigError(f"{where} = {rate:g} where data.control_hz = {wanted}; {', or, '.join(ways)}")


def declared_rotation(options: DatasetOptions, recorded: str, where: str) -> str:
    """The rotation the stored frames carry: "none" (raw OpenGL buffer), "180" or "camera" (upright, a real camera).

    ConfigError where it is neither recorded nor declared, or the two differ.
    """
    declared, field = options.image_rotation, f"{options.section}.image_rotation"
    if declared and recorded and declared != recorded:
        raise ConfigError(
            f"{where}: the frames are recorded as rotated {recorded!r} where {field} = {declared!r}; "
            "remove the declaration, or correct the metadata"
        )
    if not (declared or recorded):
        raise ConfigError(
            f"{where}: nothing tells how the frames are rotated; declare {field}: 'none' (the "
            "simulator's raw OpenGL buffer, upside down), '180' (rotated already, as lerobot/libero) or "
            "'camera' (a real camera)"
        )
    return declared or recorded


def keep_steps(actions: Floats) -> NDArray[np.bool_]:
    """(T,) bool: steps that do something, the last one always.

    The no-op filter of OpenVLA's LIBERO: a no-op has |a[:6]| < 1e-4 and the gripper of the last step kept.
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < NOOP_NORM
    keep = np.ones(len(actions), bool)
    last: Any = None
    for step in range(len(actions) - 1):
        if still[step] and (last is None or actions[step, -1] == last):
            keep[step] = False
        else:
            last = actions[step, -1]
    return keep


def shifted_actions(actions: Floats) -> Floats:
    """Actions for frames recorded AFTER their action: row t gets action t + 1, the last row a hold."""
    hold = np.concatenate([np.zeros_like(actions[-1:, :-1]), actions[-1:, -1:]], axis=1)
    return np.concatenate([actions[1:], hold])
