"""Begin: is this machine ready, and where does a user's own work live?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wav.commands import Json, answer, command, say

GROUP = "Begin"


@command(GROUP, "wav doctor", "wav doctor --json")
def doctor(as_json: Json = False) -> int:
    """Check renderer, versions, services and disk; each failure says what to do."""
    from dataclasses import asdict

    from wav.config import Runtime
    from wav.doctor import Check, run_checks

    found: list[Check] = []
    good = run_checks(Runtime(), found.append if as_json else lambda check: say(check.line))
    return answer(as_json, [asdict(check) for check in found], (), good)


@command(GROUP, "wav init my-project")
def init(folder: Annotated[Path, typer.Argument(help="new or empty folder")]) -> int:
    """Make a project outside the repository: parameters, presets, stages, an example reader."""
    from wav.new_project import make_project

    for name in make_project(folder):
        say(f"  {name}")
    say(f"{folder}: a project; next: cd {folder} && wav services up && wav repro --preset smoke")
    return 0
