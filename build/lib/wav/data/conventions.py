"""Conventions: what the pixels and numbers of a dataset mean.

Written with the data, copied into checkpoints and compared before evaluation, because a picture upside down or a
gripper of the other sign gives 0 % success without any error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from wav.data.state import STATE_LAYOUT
from wav.errors import DataError, shown

if TYPE_CHECKING:
    from wav.config import DataSettings

#: How actions continue past an episode's end: deltas stop (zero motion), absolute targets repeat.
DELTA_ACTIONS = "osc_pose_delta"
ABSOLUTE_ACTIONS = "joint_absolute"
#: Parts of a view's name that say that an arm carries the camera.
WRIST_NAMES = ("wrist", "hand", "eye_in_hand", "gripper")


def wrist_views(views: Sequence[str]) -> tuple[str, ...]:
    """The views that an arm carries, in their order: one per arm, whatever its number of joints."""
    return tuple(view for view in views if any(name in view.lower() for name in WRIST_NAMES))


@dataclass(frozen=True)
class Conventions:
    """What an episode store's arrays mean."""

    suite: str
    views: tuple[str, ...]
    image_height: int
    image_width: int
    render: str
    """"fast" (decimated meshes, no reflections) or "full"."""
    image_rotation: str
    """Rotation applied to the simulator's raw buffer: "none" or "180" (degrees); "none" for real cameras as well."""
    gripper: str
    """Sign of the gripper action."""
    state_layout: str
    control_hz: int
    action: str
    """"osc_pose_delta" or "joint_absolute"."""
    simulator: Mapping[str, str]
    """Distribution -> version of what made the physics and the pixels; empty where a dataset does not tell."""

    @classmethod
    def for_simulator(cls, data: DataSettings, simulator: Mapping[str, str] | None = None) -> Conventions:
        """What the simulators of :mod:`wav.sim` produce under ``data`` (with this machine's versions by default)."""
        if simulator is None:
            from wav.sim.registry import simulator_versions

            simulator = simulator_versions(data.suite)
        return cls.recorded(
            data, image_rotation="180", gripper="-1 open, +1 close", render=data.render, simulator=simulator
        )

    @classmethod
    def recorded(
        cls,
        data: DataSettings,
        *,
        image_rotation: str,
        gripper: str,
        state_layout: str = STATE_LAYOUT,
        action: str = DELTA_ACTIONS,
        render: str = "full",
        simulator: Mapping[str, str] | None = None,
    ) -> Conventions:
        """Those of episodes in the suite, views, sizes and rate of ``data``; the rest is what their source tells."""
        return cls(
            suite=data.suite,
            views=tuple(data.views),
            image_height=data.image_height,
            image_width=data.image_width,
            render=render,
            image_rotation=image_rotation,
            gripper=gripper,
            state_layout=state_layout,
            control_hz=data.control_hz,
            action=action,
            simulator=dict(simulator or {}),
        )

    def difference(self, other: Conventions) -> list[str]:
        """One line per field where the two differ, such as ``image_height: 64 against 128``; empty when equal.

        ``simulator`` is compared where both sides know theirs: recorded datasets often do not tell.
        """
        mine, theirs = asdict(self), asdict(other)
        if not (self.simulator and other.simulator):
            del mine["simulator"]
        return [f"{name}: {mine[name]!r} against {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "views": list(self.views), "simulator": dict(self.simulator)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], source: str = "conventions") -> Conventions:
        """Inverse of :meth:`to_json`; DataError names a missing or unknown field of ``source``."""
        kinds = {"views": list, "image_height": int, "image_width": int, "control_hz": int, "simulator": dict}
        names = {field.name for field in fields(cls)}
        if not isinstance(raw, Mapping):
            raise DataError(f"{source}: holds {type(raw).__name__}, not conventions; make the folder again")
        wrong = sorted(names.symmetric_difference(raw))
        if wrong:
            raise DataError(
                f"{source}: conventions.{wrong[0]} is {'unknown' if wrong[0] in raw else 'missing'}; "
                "make the folder again with this version"
            )
        for name, value in raw.items():
            if type(value) is not kinds.get(name, str):
                raise DataError(f"{source}: conventions.{name} = {shown(value)}: no such value; make the folder again")
        return cls(**{**raw, "views": tuple(raw["views"]), "simulator": dict(raw["simulator"])})
