"""Put what `make repro` measured into one JSON: results with intervals, seconds per stage, machine, versions, seeds.

Run in the project folder (or give a preset, or a workspace) after the pipeline has finished:

    python benchmarks/collect.py --json benchmarks/results/tabletop-default.json
    python benchmarks/collect.py --preset libero-cpu --json benchmarks/results/libero-cpu.json
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

from wav.config import load_settings
from wav.data.names import in_libero
from wav.data.store import EpisodeStore
from wav.stages import STAGES

#: what a preset's numbers are and are not, so that nobody quotes them for something else
NOTES = {
    "libero-cpu": "One task of libero_object (40 in LIBERO's four suites), whose object stands in the same place in "
    "all of LIBERO's 50 initial states (the basket varies by about a centimetre); demonstrations of our own scripted "
    "expert with execution noise instead of LIBERO's human ones; render: fast (decimated meshes, no reflections) at 64 "
    "x 64 pixels, on the folder of assets named here; a model of 2.5 million parameters trained from nothing for "
    "minutes on a CPU. It shows that simulator, protocol, data, training, planning and evaluation work together on "
    "LIBERO. It is not comparable with LIBERO tables in the literature, which average ten tasks a suite with LIBERO's "
    "own demonstrations, pictures and assets."
}
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


def simulator(workspace: Path) -> dict[str, Any]:
    """What the demonstrations were simulated with; for LIBERO also the name of its assets, where they have one."""
    conventions = EpisodeStore.open(workspace / "data" / "episodes").conventions
    found: dict[str, Any] = dict(conventions.simulator)
    if in_libero(conventions.suite):
        from wav.sim.libero.assets import assets_digest, find_assets

        folder = find_assets()
        if assets_digest(folder) != found["libero-assets"]:
            raise SystemExit(f"{folder}: is not the folder the demonstrations were made with; set WAV_LIBERO_ASSETS")
        kit = folder / "KIT.json"
        if kit.is_file():  # a reduced kit says what was shrunk or replaced; the hub's folder has no such file
            description = json.loads(kit.read_text())
            found["reduced kit"] = {k: v if isinstance(v, int) else len(v) for k, v in description.items()}
    return found


def stage_times(workspace: Path) -> dict[str, Any]:
    """Seconds and peak memory of every stage that has run."""
    times = {}
    for stage in STAGES:
        path = workspace / "reports" / "stages" / f"{stage}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            times[stage] = {key: record[key] for key in ("seconds", "peak_memory_gib") if key in record}
    return times


def collect(workspace: Path, preset: str, variants: str = "") -> dict[str, Any]:
    """Everything the README quotes; raises FileNotFoundError where the pipeline has not finished."""
    stages = stage_times(workspace)
    settings = load_settings(workspace / "params.yaml")
    training = {
        stage: json.loads((workspace / "models" / stage / "metrics.json").read_text())
        for stage in ("video", "value", "joint")
    }
    return {
        "command": f"make repro PRESET={preset}" if preset else "make repro",
        **({"note": NOTES[preset]} if preset in NOTES else {}),
        **({"measured": variants} if variants else {}),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in VERSIONS},
        "simulator": simulator(workspace),
        "parameters": yaml.safe_load(settings.model_dump_json()),
        "stages": stages,
        "total_seconds": round(sum(row["seconds"] for row in stages.values()), 2),
        "ingest": json.loads((workspace / "reports" / "ingest" / "metrics.json").read_text()),
        "training": training,
        "encode": json.loads((workspace / "reports" / "encode" / "metrics.json").read_text()),
        "evaluation": json.loads((workspace / "reports" / "eval" / "metrics.json").read_text()),
    }


def main() -> None:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", nargs="?", type=Path, help="default: the project folder, or the preset's")
    parser.add_argument("--preset", default="", help="name of a file in presets/ that was run with make repro PRESET=")
    parser.add_argument("--variants", default="", help="what else the machine did meanwhile, in words")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    default = Path("workspaces") / arguments.preset if arguments.preset else Path()
    result = collect(arguments.workspace or default, arguments.preset, arguments.variants)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for variant in (c for c in ("planned", "unplanned", "temperature") if c in result["evaluation"]):
        row = result["evaluation"][variant]
        print(f"{variant:12} {row['success_rate']:.3f} [{row['wilson_low']:.3f}, {row['wilson_high']:.3f}]")
    for stage, row in result["stages"].items():
        print(f"{stage:15} {row['seconds']:8.0f} s  {row.get('peak_memory_gib', 0):.1f} GiB")


if __name__ == "__main__":
    main()
