"""How often the scripted expert solves each tabletop task from the demonstrations' initial states.

python benchmarks/expert.py --json benchmarks/results/expert.json     # 100 episodes a task, clean and noisy
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from wav.config import DataSettings, IngestSettings
from wav.evaluation.intervals import wilson
from wav.sim.demonstrations import solves
from wav.sim.registry import simulator_versions
from wav.sim.tabletop.tasks import TASKS
from wav.sim.workers import map_in_processes


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ingest, data = IngestSettings(), DataSettings()
    kinds = {"clean": (0.0, 0.0), "as recorded": (ingest.noise, ingest.detour)}
    table: dict[str, dict[str, object]] = {}
    for kind, (noise, detour) in kinds.items():
        for task in TASKS:
            indices = range(ingest.first_index, ingest.first_index + arguments.episodes)
            jobs = [("tabletop", task, index, data, noise, detour, ingest.seed) for index in indices]
            solved = {indices[job]: result for job, result in map_in_processes(solves, jobs)}
            failed = sorted(i for i, result in solved.items() if isinstance(result, Exception) or not result.success)
            count = arguments.episodes - len(failed)
            rate = wilson(count, arguments.episodes)
            low, high = rate.wilson_low, rate.wilson_high
            table.setdefault(kind, {})[task] = {
                "solved": count, "episodes": arguments.episodes, "wilson_low": low, "wilson_high": high,
                "failed": failed,
            }  # fmt: skip
            print(f"{kind:12} {task:28} {count:4} of {arguments.episodes}  [{low:.3f}, {high:.3f}]", flush=True)
    if arguments.json:
        record = {"noise": ingest.noise, "detour": ingest.detour, "versions": simulator_versions(), "results": table}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
