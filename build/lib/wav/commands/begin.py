"""Begin: is this machine ready, and where does a user's own work live?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wav.commands import Json, command, say

GROUP = "Begin"


@command(GROUP, "wav doctor", "wav doctor --json")
def doctor(as_json: Json = False) -> int:
    """Check renderer, versions, services and disk; each failure says what to do."""
    from wav.config import Runtime
    from wav.doctor import Check, run_checks
    from wav.doctor import as_json as text

    found: list[Check] = []

    def report(check: Check) -> None:
        found.append(check)
        if not as_json:
            say(check.line)

    good = run_checks(Runtime(), report)
    if as_json:
        say(text(found))
    return 0 if good else 1


@command(GROUP, "wav init my-project")
def init(folder: Annotated[Path, typer.Argument(help="new or empty folder")]) -> int:
    """Make a project outside the repository: parameters, presets, stages, an example reader."""
    from wav.new_project import make_project

    for name in make_project(folder):
        say(f"  {name}")
    say(f"{folder}: a project; next: cd {folder} && wav services up && wav repro --preset smoke")
    return 0
