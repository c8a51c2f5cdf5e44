"""Part ``tests`` of ``benchmarks/gpu.py``: ``tests/gpu`` with pytest, where it is installed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu import Report

ROOT = Path(__file__).resolve().parents[1]


def tests(arguments: argparse.Namespace, report: Report) -> None:
    """Run them; a trial runs a few, on the CPU."""
    if find_spec("pytest") is None:
        report("summary", "not run: pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "--confcutdir=tests/gpu", "tests/gpu", "-rs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if arguments.trial:
        command += ["-k", "elites or bfloat16_plans or finite"]
        environment["WAV_GPU_TESTS_DEVICE"] = "cpu"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest said nothing"]
    report("summary", lines[-1])
    if done.returncode:
        report("failures", lines[-40:])
        raise SystemExit(done.returncode)
