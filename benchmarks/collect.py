"""Put what `make repro` measured into one JSON: results with intervals, seconds per stage, machine, versions, seeds.

Run in the project folder (or give a workspace) after the pipeline has finished:

    python benchmarks/collect.py --json benchmarks/results/tabletop-default.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from wav.config import STAGE_SECTIONS, load_settings

VERSIONS = ("torch", "deepspeed", "diffusers", "transformers", "prefect", "dvc", "mujoco", "robosuite", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": name, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "python": platform.python_version()}


def commit() -> str:
    """Commit of the checkout, marked where the tree differs from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def stage_times(workspace: Path) -> dict[str, Any]:
    """Seconds and peak memory of every stage that has run."""
    times = {}
    for stage in STAGE_SECTIONS:
        path = workspace / "reports" / "stages" / f"{stage}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            times[stage] = {key: record[key] for key in ("seconds", "peak_memory_gib") if key in record}
    return times


def collect(workspace: Path) -> dict[str, Any]:
    """Everything the README quotes; raises FileNotFoundError where the pipeline has not finished."""
    settings = load_settings(workspace / "params.yaml")
    training = {
        stage: json.loads((workspace / "models" / stage / "metrics.json").read_text())
        for stage in ("video", "value", "joint")
    }
    return {
        "command": "make repro",
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in VERSIONS},
        "parameters": yaml.safe_load(settings.model_dump_json()),
        "stages": stage_times(workspace),
        "training": training,
        "encode": json.loads((workspace / "reports" / "encode" / "metrics.json").read_text()),
        "evaluation": json.loads((workspace / "reports" / "eval" / "metrics.json").read_text()),
    }


def main() -> None:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", nargs="?", type=Path, default=Path())
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    result = collect(arguments.workspace)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for condition in (c for c in ("planned", "unplanned", "temperature") if c in result["evaluation"]):
        row = result["evaluation"][condition]
        print(f"{condition:12} {row['success_rate']:.3f} [{row['wilson_low']:.3f}, {row['wilson_high']:.3f}]")
    for stage, row in result["stages"].items():
        print(f"{stage:15} {row['seconds']:8.0f} s  {row.get('peak_memory_gib', 0):.1f} GiB")


if __name__ == "__main__":
    main()
