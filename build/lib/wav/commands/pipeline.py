"""Pipeline: the local services, and all stages of a project."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from wav.commands import command

GROUP = "Pipeline"


@command(GROUP, "wav services up", "wav services status", "wav services down")
def services(
    action: Annotated[Literal["up", "down", "status", "ui"], typer.Argument(help="ui: open Prefect's, and sign in")],
) -> int:
    """Start or stop Prefect and the S3 server on this machine (127.0.0.1); their data stays in .local/."""
    from infra.local import services as local

    return local.main([action])


@command(GROUP, "wav repro", "wav repro --preset smoke", "wav repro --preset smoke --stage ingest")
def repro(
    preset: Annotated[str, typer.Option(help="a file of presets/, run in workspaces/PRESET")] = "",
    stage: Annotated[str, typer.Option(help="this stage and those before it; default: all")] = "",
) -> int:
    """Run the project's pipeline (dvc repro): the stages whose inputs, parameters or code have changed."""
    import subprocess
    import sys

    from infra.local.workspace import main, with_project
    from wav.local import project_folder

    names = [stage] if stage else []
    if preset:
        return main([preset, "repro", *names])
    run = [sys.executable, "-m", "dvc", "repro", *names]
    return subprocess.run(run, cwd=project_folder(), env=with_project(), check=False).returncode
