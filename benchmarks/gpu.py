"""Everything that is measured on a GPU: independent parts, each in a process and within a time limit of its own.

Sized for fifteen minutes of one GPU with 80 GiB. It needs torch, diffusers, safetensors, numpy and the project's files;
``tests`` needs pytest and ``engine`` deepspeed besides, and both say so where it is missing. The file of results is
written as each part ends; what a part had measured when its time was up stays in it::

    make gpu
    python benchmarks/gpu.py --json benchmarks/results/gpu.json --part peak --part plan    # some of the parts
    python benchmarks/gpu.py --trial     # all of them at tiny sizes on a CPU, to try the parts themselves
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # runs without an install

Report = Callable[[str, Any], None]  #: keeps what a part found under a name


@dataclass(frozen=True)
class Part:
    """One measurement: ``function`` of ``module`` is called in a process that is ended after ``seconds``."""

    name: str
    seconds: float
    module: str
    function: str
    about: str


PARTS = (
    Part("peak", 25, "gpu_planning", "peak", "matrix products, which shares of the peak are of"),
    Part("plan", 240, "gpu_planning", "plan", "planning: baseline, eager and compiled; nothing compiled before"),
    Part("plan_warm", 70, "gpu_planning", "plan_warm", "the first compiled plans of a process that finds them on disk"),
    Part("train", 110, "gpu_training", "train", "training steps without an engine, not compiled: eager, recomputed"),
    Part("engine", 270, "gpu_training", "engine", "compiled training steps: DeepSpeed's, in turns with plain ones"),
    Part("exact", 60, "gpu_planning", "exact", "what companions in a batch and the precision change in a plan"),
    Part("tests", 110, "gpu_tests", "tests", "tests/gpu"),
)


def run_part(part: Part, arguments: Sequence[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; what it reported, with how it ended and how long it took."""
    with tempfile.TemporaryDirectory(prefix="wav-gpu-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(HERE / "gpu.py"), *arguments, "--inside", part.name, "--json", str(report)]
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = process.wait(seconds)
            ended = "done" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {seconds:g} s"
        finally:
            _end(process)
        found: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    return {"ended": ended, "seconds": round(time.perf_counter() - begun, 1), **found}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part, the processes that it started included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace a file of results whole: a part may be ended while it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def inside(part: Part, arguments: argparse.Namespace) -> None:
    """What the process of a part does."""
    found: dict[str, Any] = {}

    def report(name: str, value: Any) -> None:
        found[name] = value
        write(arguments.json, found)
        print(f"{part.name}: {name}: {json.dumps(value)[:600]}", flush=True)

    getattr(importlib.import_module(part.module), part.function)(arguments, report)


def main(parts: Sequence[Part] = PARTS, argv: Sequence[str] | None = None) -> int:
    """Run the parts, one after another; 1 where one of them did not end well."""
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{part.name:10} {part.seconds:4g} s  {part.about}" for part in parts),
    )
    parser.add_argument("--json", type=Path, help="file of results; parts that are not run now stay in it")
    parser.add_argument("--part", choices=names, action="append", help="run this part alone (may be repeated)")
    parser.add_argument("--row", action="append", help="of plan, train and engine: only rows whose name contains this")
    parser.add_argument("--limit", type=float, default=1.0, help="times the parts' time limits (default: 1)")
    parser.add_argument("--trial", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--batch", type=int, default=16, help="training samples of a step")
    parser.add_argument("--calls", type=int, default=20, help="planning calls that are timed")
    parser.add_argument("--inside", choices=names, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    if arguments.inside:
        inside(next(part for part in parts if part.name == arguments.inside), arguments)
        return 0
    from counting import machine

    result = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else {}
    result = {name: result[name] for name in names if name in result}
    result = {"machine": machine() | gpu_of(arguments.trial, parser), "trial": arguments.trial, **result}
    handed = ["--batch", str(arguments.batch), "--calls", str(arguments.calls), *["--trial"] * arguments.trial]
    handed += [text for row in arguments.row or () for text in ("--row", row)]
    with tempfile.TemporaryDirectory(prefix="wav-gpu-code-") as code:  # nothing compiled before, and then what was
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": code}
        for part in parts:
            if arguments.part and part.name not in arguments.part:
                continue
            print(f"{part.name}: {part.about}; at most {part.seconds * arguments.limit:g} s", flush=True)
            result[part.name] = run_part(part, handed, environment, part.seconds * arguments.limit)
            print(f"{part.name}: {result[part.name]['ended']}, {result[part.name]['seconds']} s", flush=True)
            if arguments.json:
                write(arguments.json, result)
    run = [result[name]["ended"] for name in arguments.part or names]
    return int(any(ended != "done" for ended in run))


def gpu_of(trial: bool, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The GPU's name and memory; ends the command where there is none and this is no trial."""
    import torch

    if trial:
        return {}
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --trial runs every part at tiny sizes on a CPU")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {"gpu": torch.cuda.get_device_name(), "gpu_memory_gib": round(memory, 1)}


if __name__ == "__main__":
    raise SystemExit(main())
