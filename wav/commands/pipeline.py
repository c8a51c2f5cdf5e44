"""Parameters: is a file valid, and what does it cost? Pipeline: the local services, and all stages of a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from wav.commands import Json, answer, command, family, say

PARAMETERS, PIPELINE = "Parameters", "Pipeline"
File = Annotated[Path, typer.Argument(help="parameter file, or a preset in a folder presets/")]


@command(PARAMETERS, "wav summary", "wav summary presets/libero.yaml --gpus 8", "wav summary --json")
def summary(
    path: File = Path("params.yaml"),
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that ZeRO shards over")] = 8,
    as_json: Json = False,
) -> int:
    """Layers, parameters, operations and memory of a parameter file."""
    from wav.config import load_settings
    from wav.summary import lines, summarise

    settings = load_settings(path)
    found = summarise(settings, gpus)
    return answer(as_json, found, [str(path), *lines(settings, found)])


config = family(PARAMETERS, "config", "Parameter files.")


@command(PARAMETERS, "wav config check", "wav config check presets/smoke.yaml", parent=config)
def check(path: File = Path("params.yaml")) -> int:
    """Check a parameter file: unknown names, bad values, values that contradict each other."""
    from wav.config import load_settings

    load_settings(path)
    say(f"{path}: valid")
    return 0


@command(PIPELINE, "wav services up", "wav services status", "wav services down")
def services(
    action: Annotated[Literal["up", "down", "status", "ui"], typer.Argument(help="ui: open Prefect's, and sign in")],
) -> int:
    """Start or stop Prefect and the S3 server on this machine (127.0.0.1); their data stays in .local/."""
    from wav.local import services as local

    return local.main([action])


@command(PIPELINE, "wav repro", "wav repro --preset smoke", "wav repro --preset smoke --stage ingest")
def repro(
    preset: Annotated[str, typer.Option(help="a file of presets/, run in workspaces/PRESET")] = "",
    stage: Annotated[str, typer.Option(help="this stage and those before it; default: all")] = "",
) -> int:
    """Run the project's pipeline (dvc repro): the stages whose inputs, parameters or code have changed."""
    from wav.local import project_folder, workspace

    folder = workspace.make_workspace(preset) if preset else project_folder()
    if preset and not stage:
        workspace.require_simulator(folder)
    return workspace.repro(folder, [stage] if stage else [])
