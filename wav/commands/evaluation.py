"""Evaluation beyond the stage: LIBERO's table, and a recorded episode again."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from wav.commands import ExecuteSteps, Json, Seed, Workers, answer, busy, command, say, simulators, tell

GROUP = "Evaluation"


class OneVariant(Enum):
    """Values of an option that may be repeated, which typer takes as an Enum alone."""

    PLANNED = "planned"
    UNPLANNED = "unplanned"
    TEMPERATURE = "temperature"


@command(GROUP, "wav libero-table export", "wav libero-table export --suite libero_spatial --episodes 10 --json")
def libero_table(
    export: Annotated[Path, typer.Argument(help="the policy")] = Path("export"),
    suite: Annotated[list[str] | None, typer.Option(help="may be repeated; default: all four")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a trial on one task (of several suites SUITE/TASK); default: all")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="initial states per task")] = 50,
    variant: Annotated[list[OneVariant] | None, typer.Option(help="may be repeated; default: all three")] = None,
    execute_steps: ExecuteSteps = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="episodes planned together")] = 8,
    budget: Annotated[Literal["protocol", "reference"], typer.Option(help="reference: +1000 steps")] = "protocol",
    seed: Seed = 7,
    workers: Workers = 0,
    demonstrations: Annotated[Path, typer.Option(help="compared with, where the policy was trained on them")] = Path(
        "data/episodes"
    ),
    out: Annotated[Path, typer.Option(help="records and tables")] = Path("reports/libero-table"),
    as_json: Json = False,
) -> int:
    """Evaluate on LIBERO's four suites and print the table beside the published figures."""
    from wav.config import Runtime
    from wav.evaluation.extras.published import SUITES
    from wav.evaluation.extras.table import as_json as numbers
    from wav.evaluation.extras.table import libero_table as make
    from wav.evaluation.extras.table import markdown

    protocol = {
        "episodes_per_task": episodes,
        "variants": tuple(dict.fromkeys(one.value for one in variant or OneVariant)),
        "execute_steps": execute_steps,
        "batch_size": batch_size,
        "budget": budget,
        "swapped_episodes": 0,
        "videos": 0,
        "seed": seed,
    }
    table = make(
        export,
        out,
        tuple(dict.fromkeys(suite or SUITES)),
        tuple(dict.fromkeys(task or ())),
        protocol,
        workers=simulators(workers),
        device=Runtime().device,
        demonstrations=demonstrations,
        report=tell if as_json else say,
    )
    return answer(as_json, numbers(table), ["\n" + markdown(table) + f"\n{out / 'table.md'}, {out / 'table.json'}"])


@command(
    GROUP,
    "wav eval --replay reports/eval/episodes/planned/lift_red_cube-000.json",
    "wav eval --replay EPISODE.json --export export --json",
    name="eval",
)
def evaluate(
    record: Annotated[Path, typer.Option("--replay", metavar="EPISODE.json", help="record of the episode")],
    export: Annotated[Path, typer.Option(help="the policy")] = Path("export"),
    as_json: Json = False,
) -> int:
    """Run a recorded episode again; status 1 where it comes out otherwise."""
    from wav.config import Runtime
    from wav.evaluation.extras.rerun import rerun_episode

    with busy(f"{record}: the episode runs again"):
        found = rerun_episode(record, export, device=Runtime().device)
    told = {"same": found.same, "differences": found.differences}
    told |= {"success": found.again.success, "steps": found.again.steps}
    return answer(as_json, told, found.lines, found.same)
