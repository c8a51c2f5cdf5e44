"""A workspace for one run of one stage: its inputs linked, its outputs its own, so that DVC's are never written over.

``runs/<flow-run-id>/`` holds ``params.yaml`` (the workspace's, with the run's changes), links to the stage's inputs
(:mod:`wav.stages`), ``run.json`` (where the inputs came from) and what the run makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wav.config import Settings, parameter_text, parse_settings
from wav.errors import DataError
from wav.io.files import write_json
from wav.io.readers import read_json, understood
from wav.parameter_files import merge, read_parameters
from wav.stages import stage as find_stage

RUN_FILE = "run.json"


def prepare(stage: str, workspace: Path, folder: Path, settings: Settings) -> Path:
    """Make ``folder`` with its ``params.yaml`` and ``run.json``; what a run made there before stays."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(parameter_text(settings))
    write_json(folder / RUN_FILE, {"stage": stage, "workspace": str(workspace)})
    return folder


def isolate(
    stage: str,
    workspace: Path,
    folder: Path,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    instead: Mapping[str, Path] | None = None,
) -> Path:
    """Make ``folder`` a workspace in which ``stage`` reads the inputs of ``workspace``.

    ``changes`` are by section and parameter. ``instead`` says which folder takes the place of an input folder
    (``models/joint`` -> another checkpoint). ConfigError: a bad parameter. DataError: an input is missing.
    """
    params = workspace / "params.yaml"
    changed = merge(read_parameters(params), changes or {})
    prepare(stage, workspace, folder, parse_settings(changed, f"{params} with the run's parameters"))
    for path in find_stage(stage).inputs:
        source = workspace / path
        for original, other in (instead or {}).items():
            if path == original or path.startswith(original + "/"):
                source = other / path[len(original) :].lstrip("/")
        if not source.exists():
            raise DataError(f"{source}: {stage} needs it; run `dvc pull` or `dvc repro` in {workspace} first")
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    return folder


def source_workspace(folder: Path) -> Path:
    """The workspace whose inputs an isolated run reads; any other folder is its own."""
    if not (folder / RUN_FILE).is_file():
        return folder
    path, remedy = folder / RUN_FILE, "start the run again"
    with understood(path, remedy):
        return Path(read_json(path, remedy)["workspace"])
