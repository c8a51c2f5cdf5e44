"""How often the scripted expert solves each LIBERO task from evaluation's initial states, within its step limits.

python benchmarks/libero_expert.py --json benchmarks/results/libero-expert.json     # all: over an hour of one core

Ten initial states of every task first, then the others; the file is written after each task: run it again to go on
where it stopped. Outcomes of other expert code are measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from wav.config import DataSettings
from wav.evaluation.intervals import wilson
from wav.sim.demonstrations import solves
from wav.sim.registry import simulator_versions, task_specs
from wav.sim.workers import map_in_processes

STATES = {"libero_object": 50, "libero_spatial": 50, "libero_goal": 10, "libero_10": 10}
"""Initial states of evaluation (0, 1, ...) that are tried, by suite."""
ROUNDS = (10, 50)
"""A round goes over all tasks before the next: building a scene costs as much as an episode."""
COLUMNS = (
    "states",
    "solved",
    "wilson_low",
    "wilson_high",
    "median_steps",
    "seconds",
    "failed",
    "errors",
    "steps",
    "code",
)


def code_digest(suite: str) -> str:
    """Identity of the expert's code that tasks of ``suite`` run."""
    folder = Path(__file__).parents[1] / "wav" / "sim"
    names = ["arm", "demonstrations", "libero/expert", "libero/expert_goals", "libero/expert_place", "libero/grasps"]
    if suite in ("libero_goal", "libero_10"):  # the others have no drawer to open and no knob to turn
        names.append("libero/expert_parts")
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names)).hexdigest()[:12]


def summary(steps: list[int | None], errors: dict[str, str], seconds: float, code: str) -> dict[str, Any]:
    """One task's row; ``steps`` by initial state, None where the expert failed."""
    solved = [count for count in steps if count is not None]
    rate = wilson(len(solved), len(steps))
    values = (
        len(steps), len(solved), round(rate.wilson_low, 4), round(rate.wilson_high, 4),
        statistics.median(solved) if solved else None, round(seconds, 2),
        [state for state, count in enumerate(steps) if count is None], errors, steps, code,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def advance(suite: str, task: str, row: dict[str, Any], upto: int, code: str, workers: int) -> dict[str, Any]:
    """Measure initial states of ``task`` up to ``upto``, those of ``row`` not again."""
    data = DataSettings(suite=suite, tasks=(), image_height=32, image_width=32)
    steps, errors = list(row.get("steps", [])), dict(row.get("errors", {}))
    first, seconds = len(steps), row.get("seconds", 0.0) * len(steps)
    jobs = [(suite, task, index, data, 0.0, 0.0, 0) for index in range(first, upto)]
    results = dict(map_in_processes(solves, jobs, workers))
    for job in range(len(jobs)):
        result = results[job]
        if isinstance(result, Exception) and "ConfigError" not in str(result):
            raise result  # no failure of the expert
        if isinstance(result, Exception):
            errors[str(first + job)] = str(result)
            steps.append(None)
            continue
        steps.append(result.steps if result.success else None)
        seconds += result.seconds
    return summary(steps, errors, seconds / len(steps), code)


def write(path: Path, table: dict[str, dict[str, Any]]) -> None:
    """Write the file atomically, one line per task."""
    suites = ",\n".join(
        f'  "{suite}": {{\n' + ",\n".join(f'   "{task}": {json.dumps(row)}' for task, row in rows.items()) + "\n  }"
        for suite, rows in table.items()
    )
    about = json.dumps({
        "about": "Scripted expert from evaluation's initial states 0, 1, ...; success is LIBERO's predicate within the "
        "protocol's step limit; no noise, nothing rendered but the first frame; seconds are of one core per episode. "
        "libero_goal and libero_10 are tried from 10 states only. errors: why the expert does not try.",
        "versions": simulator_versions("libero_object"),
    })  # fmt: skip
    text = f'{about[:-1]},\n "suites": {{\n{suites}\n }}\n}}\n'
    json.loads(text)
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    """Measure what is missing, print and write task by task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suites", nargs="+", default=list(STATES), choices=list(STATES))
    parser.add_argument("--states", type=int, help="initial states per task, in place of 50 (object, spatial) and 10")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="go on from outcomes of other expert code")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    path, codes = arguments.json, {suite: code_digest(suite) for suite in STATES}
    table: dict[str, dict[str, Any]] = json.loads(path.read_text())["suites"] if path.exists() else {}
    if not arguments.keep:
        table = {s: {t: row for t, row in rows.items() if row["code"] == codes[s]} for s, rows in table.items()}
    for upto in ROUNDS:
        for suite in arguments.suites:
            wanted = min(upto, arguments.states or STATES[suite])
            for task in task_specs(suite):
                row = table.setdefault(suite, {}).get(task, {})
                if row.get("states", 0) >= wanted:
                    continue
                row = table[suite][task] = advance(suite, task, row, wanted, codes[suite], arguments.workers)
                write(path, table)
                print(f"{suite:15} {task[:60]:60} {row['solved']:3} of {row['states']:3}", flush=True)


if __name__ == "__main__":
    main()
