"""``pytest --record FILE``: how each slow test ended, kept in one JSON file that partial runs bring up to date.

``make check-long`` writes ``benchmarks/results/check-long.json``, which is committed. A row holds outcome, seconds,
date, commit, machine and what the test itself recorded (``record_property``); rows of tests that were not run stay.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
MARK = "long"
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "prefect", "dvc", "mujoco")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that switches this on, and the seed of the generated cases that it records (tests/fuzz)."""
    parser.addoption("--seed", type=int, default=0, help="seed of the cases that tests/fuzz generates")
    parser.addoption("--record", type=Path, help=f"JSON file that gets a row for every {MARK} test that ran")


def pytest_configure(config: pytest.Config) -> None:
    """Listen, where there is something to write."""
    path = config.getoption("--record")
    if path is not None:
        config.pluginmanager.register(Recorder(path, config), "wav-record")


class Recorder:
    """Collects reports and merges them into the file at the end."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self.path, self.root, self.known = path, config.rootpath, set[str]()
        self.rows: dict[str, dict[str, Any]] = {}
        self.whole_files = not any("::" in str(argument) for argument in config.invocation_params.args)
        self.facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
        }

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Names that exist, so that rows of renamed tests go."""
        self.known.add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test: the call decides, a failing set-up or tear-down overrules."""
        if MARK not in report.keywords:
            return
        row = self.rows.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, **self.facts})
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        if report.outcome != "passed":
            row["outcome"] = report.outcome
            row["why"] = " ".join(reason(report).split())[-300:]
        row |= dict(report.user_properties)

    def pytest_sessionfinish(self) -> None:
        """Merge and write."""
        if self.rows:
            old = json.loads(self.path.read_text())["tests"] if self.path.is_file() else {}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(summary(self.kept(old) | self.rows), indent=1) + "\n")

    def kept(self, old: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Rows of the file whose tests still exist, as far as this run can tell."""
        if not self.whole_files:
            return old
        files = {name.partition("::")[0] for name in self.known}
        here = {name: row for name, row in old.items() if (self.root / name.partition("::")[0]).is_file()}
        return {name: row for name, row in here.items() if name in self.known or name.partition("::")[0] not in files}


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the file holds: totals, versions, rows by name."""
    kills = [row for row in rows.values() if "victim" in row]
    generated = [row for row in rows.values() if "silent_wrongs" in row]
    return {
        "summary": {
            **Counter(row["outcome"] for row in rows.values()),
            "seconds": round(sum(row["seconds"] for row in rows.values())),
            "kills": len(kills),
            **{name: sum(row[name] for row in generated) for name in ("cases", "tracebacks", "silent_wrongs")},
            "kills_survived": sum(bool(row.get("survived")) and row["outcome"] == "passed" for row in kills),
        },
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "tests": dict(sorted(rows.items())),
    }


def reason(report: pytest.TestReport) -> str:
    """Why a test was skipped or failed, in a line."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message).splitlines()[0] if crash is not None else str(report.longrepr)


def commit() -> str:
    """The commit that is tested, with ``+`` where tracked files differ from it; empty outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def machine() -> str:
    """System, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
