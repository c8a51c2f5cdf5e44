"""Parameters: is a file valid, and what does it cost?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wav.commands import Json, command, family, say, say_json

GROUP = "Parameters"
File = Annotated[Path, typer.Argument(help="parameter file, or a preset in a folder presets/")]


@command(GROUP, "wav summary", "wav summary presets/libero.yaml --gpus 8", "wav summary --json")
def summary(
    path: File = Path("params.yaml"),
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that ZeRO shards over")] = 8,
    as_json: Json = False,
) -> int:
    """Layers, parameters, operations and memory of a parameter file."""
    from wav.config import load_settings
    from wav.summary import lines, summarise

    settings = load_settings(path)
    if as_json:
        say_json(summarise(settings, gpus))
        return 0
    for line in (str(path), *lines(settings, gpus)):
        say(line)
    return 0


config = family(GROUP, "config", "Parameter files.")


@command(GROUP, "wav config check", "wav config check presets/smoke.yaml", parent=config)
def check(path: File = Path("params.yaml")) -> int:
    """Check a parameter file: unknown names, bad values, values that contradict each other."""
    from wav.config import load_settings

    load_settings(path)
    say(f"{path}: valid")
    return 0
