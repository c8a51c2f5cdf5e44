"""Options of the readers of datasets: what a dataset does not tell of itself (``ingest.NAME`` of ``params.yaml``)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from wav.section import Section


class DatasetOptions(Section):
    """What a dataset does not tell of itself, or tells wrongly: options of every reader of datasets."""

    section: ClassVar[str] = ""
    cameras: dict[str, str] = Field({}, description="view -> camera of the dataset, where the usual names do not fit")
    drop_noops: bool = Field(False, description="drop steps that neither move nor change the gripper")
    control_hz: int = Field(0, ge=0, le=10000, description="true control rate, where the metadata is silent or wrong")
    image_rotation: Literal["", "none", "180", "camera"] = Field(
        "", description="rotation of the stored frames: none (raw OpenGL), 180, camera; empty: recorded"
    )
    gripper: Literal["", "-1 open, +1 close", "+1 open, -1 close", "0 open, 1 close", "1 open, 0 close"] = Field(
        "", description="gripper convention; empty: as recorded or as the fingers move"
    )

    @field_validator("image_rotation", mode="before")
    @classmethod
    def _degrees(cls, value: object) -> object:
        """YAML, and ``dvc exp run -S``, read 180 as a number."""
        return "180" if type(value) is int and value == 180 else value


class LiberoHdf5Options(DatasetOptions):
    """Options of the reader of LIBERO's HDF5 files."""

    section: ClassVar[str] = "ingest.libero_hdf5"
    alignment: Literal["", "before_action", "after_action"] = Field(
        "", description="frame t was recorded before or after action t; empty: as the states show"
    )


class LeRobotOptions(DatasetOptions):
    """Options of the reader of LeRobot datasets."""

    section: ClassVar[str] = "ingest.lerobot"
    action: Literal["", "osc_pose_delta", "joint_absolute"] = Field(
        "", description="kind of action; empty: as recorded"
    )
    unit: Literal["", "radian", "degree", "percent"] = Field(
        "", description="of joints; degree, percent (-100 to 100) become radians; empty: radians, checked"
    )
    rotation: Literal["", "axis_angle", "quat_xyzw", "quat_wxyz", "euler_xyz"] = Field(
        "", description="of an end-effector state; empty: as its names say"
    )
    depth: dict[str, tuple[Annotated[float, Field(ge=0)], float]] = Field(
        {}, description="view of a depth camera -> [near, far] in metres: near becomes white, far black"
    )

    @field_validator("depth", mode="after")
    @classmethod
    def _near_first(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        odd = next((view for view, (near, far) in value.items() if near >= far), None)
        if odd is not None:
            raise ValueError(f"{odd}: {list(value[odd])}: must be [near, far] in metres, the smaller first")
        return value


class RobomimicHdf5Options(DatasetOptions):
    """Options of the reader of robomimic's HDF5 files."""

    section: ClassVar[str] = "ingest.robomimic_hdf5"
    instructions: dict[str, str] = Field({}, description="environment (env_name) -> its command, not in the files")
    mask: str = Field("", description="demonstrations to read: a name below mask/, such as train; empty: all")


class AlohaHdf5Options(Section):
    """Options of the reader of ALOHA-style HDF5 files, which tell little about themselves."""

    section: ClassVar[str] = "ingest.aloha_hdf5"
    cameras: dict[str, str] = Field({}, description="view -> camera of the dataset, where the usual names do not fit")
    control_hz: int = Field(0, ge=0, description="rate of the recording: 50 by act's recorders, 30 by AgileX'")
    instructions: dict[str, str] = Field({}, description="folder of episodes, . for ingest.path -> its command")
    channels: Literal["", "rgb", "bgr"] = Field("", description="of the decoded pictures; has to be said for JPEGs")
    shift: int = Field(0, ge=0, description="frame t is paired with the action stored this many rows later")
    raw_grippers: bool = Field(False, description="grippers are neither metres nor a share of their way")
    base: Literal["", "ignore", "append"] = Field("", description="base_action of a mobile robot that moves")
