"""Settings: ``params.yaml`` (what changes a result) and the ``WAV_*`` environment (where and with what to run).

One frozen class per section of ``params.yaml``; a stage sees only the sections that its row lists
(:mod:`wav.stages`, :meth:`Settings.for_stage`), so that DVC's idea of what a stage depends on stays true.

Run ``python -m wav.config params.yaml`` to check a file.
"""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from ruamel.yaml import YAML

from wav.errors import ConfigError, cut, exit_status, shown
from wav.local import project_folder
from wav.parameter_files import explain, preset_path, read_parameters
from wav.section import Section
from wav.sections import (
    CouplingSettings,
    DataSettings,
    EncodeSettings,
    EvalLiberoSettings,
    ExportSettings,
    IngestSettings,
    LabelRewardsSettings,
    ModelSettings,
    PlannerSettings,
    PretrainVideoSettings,
    TrainJointSettings,
    TrainValueSettings,
)
from wav.sections import TrainSettings as TrainSettings
from wav.stages import stage as find_stage

#: Sources that tell several suites apart.
OF_SEVERAL = ("scripted", "libero_hdf5", "lerobot")


class Settings(Section):
    """All of params.yaml."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    ingest: IngestSettings = IngestSettings()
    label_rewards: LabelRewardsSettings = LabelRewardsSettings()
    encode: EncodeSettings = EncodeSettings()
    pretrain_video: PretrainVideoSettings = PretrainVideoSettings()
    train_value: TrainValueSettings = TrainValueSettings()
    train_joint: TrainJointSettings = TrainJointSettings()
    coupling: CouplingSettings = CouplingSettings()
    planner: PlannerSettings = PlannerSettings()
    eval_libero: EvalLiberoSettings = EvalLiberoSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        data, encode = self.data, self.encode
        if (data.future_frames - 1) % encode.temporal:
            raise ValueError(
                f"data.future_frames = {data.future_frames}: must be 1 + k * encode.temporal ({encode.temporal}); "
                f"try {1 + encode.temporal * max(1, round((data.future_frames - 1) / encode.temporal))}"
            )
        for name in ("image_height", "image_width"):
            if getattr(data, name) % encode.patch:
                raise ValueError(
                    f"data.{name} = {getattr(data, name)}: must be a multiple of encode.patch = {encode.patch}"
                )
        if len(data.views) > self.model.max_views:
            raise ValueError(
                f"data.views = {list(data.views)}: {len(data.views)} views, model.max_views = {self.model.max_views}; "
                "name fewer views or raise model.max_views"
            )
        if len(data.suites) > 1 and self.ingest.source not in OF_SEVERAL:
            raise ValueError(
                f"data.suites = {list(data.suites)}: {self.ingest.source} does not tell which suite an episode is of; "
                f"set ingest.source to one of {', '.join(OF_SEVERAL)}, or name one suite"
            )
        if self.eval_libero.execute_steps > data.action_chunk:
            raise ValueError(
                f"eval_libero.execute_steps = {self.eval_libero.execute_steps}: must be at most "
                f"data.action_chunk = {data.action_chunk}"
            )
        return self

    def for_stage(self, stage: str) -> Settings:
        """This object limited to the sections ``stage`` may read; any other raises ConfigError on access."""
        return _StageView(self, stage)  # type: ignore[return-value]


class _StageView:
    """Settings as one stage may see them."""

    def __init__(self, settings: Settings, stage: str) -> None:
        self._settings, self._stage, self._sections = settings, stage, find_stage(stage).sections

    def __getattr__(self, name: str) -> Any:
        if name not in self._sections:
            raise ConfigError(
                f"stage {self._stage} read section {name!r}, which wav/stages.py does not list for it; add it there"
            )
        return getattr(self._settings, name)

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """The visible sections as plain data."""
        return self._settings.model_dump(include=set(self._sections), **kwargs)


class Runtime(BaseSettings):
    """Where and with what to run: never changes a result. Read from ``WAV_*`` environment variables; empty is unset.

    Raises:
        ConfigError: a variable holds a bad value.
    """

    model_config = SettingsConfigDict(
        env_prefix="WAV_", frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True
    )

    store: str = Field("s3://wav", description="checkpoints and metrics: s3://bucket[/prefix] or file:///folder")
    s3_endpoint: str = Field("", description="endpoint of the S3 server; empty: AWS")
    s3_region: str = Field(
        "",
        validation_alias=AliasChoices("WAV_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
        description="region of the S3 server; empty: the AWS profile's, else us-east-1",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto: cuda where there is one")
    threads: int = Field(0, ge=0, le=4096, description="torch threads of a stage of one process; 0: the cores")
    workers: int = Field(0, ge=0, le=4096, description="simulator processes; 0: the machine's cores")
    workspace: Path = Field(Path(), description="folder that holds params.yaml and the stages' outputs")
    dask: str = Field("", description="where data and evaluation run: empty: here; local; tcp://host:8786 (Dask)")
    track: Literal["", "tensorboard", "wandb", "mlflow"] = Field(
        "", description="tracker of training metrics beside dvclive: tensorboard, wandb or mlflow"
    )
    launcher: str = Field("", description="several nodes: starts a module on all of them, as deepspeed and srun do")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = f"WAV_{str(first['loc'][0]).removeprefix('WAV_').upper()}"
            message = f"{name} = {shown(first['input'])}: {first['msg'][:1].lower() + first['msg'][1:]}"
            raise ConfigError(f"{message}; correct or unset {name}") from None


def load_settings(path: str | Path = "params.yaml") -> Settings:
    """Read and check a parameter file, or a preset together with the params.yaml that it lies over.

    Raises:
        ConfigError: the file is missing, is not YAML, names an unknown parameter or holds a bad value.
    """
    return parse_settings(read_parameters(Path(path)), str(path))


def load_preset(name: str) -> Settings:
    """The project's params.yaml with ``presets/NAME.yaml`` over it; ConfigError as from :func:`load_settings`."""
    return load_settings(preset_path(project_folder(), name))


def parse_settings(raw: dict[str, Any], source: str = "parameters") -> Settings:
    """Check a mapping of sections; raises ConfigError as :func:`load_settings` does."""
    try:  # as JSON, whose strict check takes lists for tuples and yet no "8" or true for a number
        return Settings.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise explain(error, Settings, source) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: no parameters ({cut(error)}); use texts, numbers, lists and sections") from None


def parameter_text(settings: Settings) -> str:
    """A whole parameter file that holds ``settings``, in the dialect in which it is read again."""
    yaml, text = YAML(typ="safe"), StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(settings.model_dump(mode="json"), text)
    return text.getvalue()


def main() -> int:
    """Check the parameter file named on the command line."""
    path = sys.argv[1] if len(sys.argv) > 1 else "params.yaml"

    def run() -> None:
        load_settings(path)
        sys.stdout.write(f"{path}: valid\n")

    return exit_status(run)


if __name__ == "__main__":
    raise SystemExit(main())
