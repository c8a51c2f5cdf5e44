"""``pytest --record FILE``: how each slow test ended, kept in one JSON file that partial runs bring up to date.

``make check-long`` writes ``benchmarks/results/check-long.json``, which is committed. A row holds outcome, seconds,
date, commit, machine and what the test itself recorded (``record_property``). The file is written after every test, and
rows of tests that were not run stay, those of other seeds too; ``--resume`` leaves out what passed at this very commit.
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
    parser.addoption("--resume", action="store_true", help="leave out what passed at this commit, as --record tells")


def pytest_configure(config: pytest.Config) -> None:
    """Listen, where there is something to write."""
    path = config.getoption("--record")
    if path is not None:
        config.pluginmanager.register(Recorder(path, config), "wav-record")


class Recorder:
    """Merges what each test did into the file as soon as it has ended."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self.path, self.root, self.known = path, config.rootpath, set[str]()
        self.running: dict[str, dict[str, Any]] = {}
        self.whole_files = not any("::" in str(argument) for argument in config.invocation_params.args)
        self.resumes = bool(config.getoption("--resume"))
        self.facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(path),
            "machine": machine(),
        }

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Names that exist, so that rows of renamed tests go."""
        self.known.add(item.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is done, where this run resumes one; a commit with changes is never the same again."""
        if not self.resumes or self.facts["commit"].endswith("+"):
            return
        done = {
            name
            for name, row in self.rows().items()
            if row["outcome"] == "passed" and row["commit"] == self.facts["commit"]
        }
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test: the call decides, a failing set-up or tear-down overrules."""
        if MARK not in report.keywords:
            return
        row = self.running.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, **self.facts})
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        if report.outcome != "passed":
            row["outcome"] = report.outcome
            row["why"] = " ".join(reason(report).split())[-300:]
        row |= dict(report.user_properties)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Merge and write; a test that was interrupted has no row."""
        if nodeid in self.running:
            self.write(self.rows() | {nodeid: self.running.pop(nodeid)})

    def pytest_sessionfinish(self) -> None:
        """Take out the rows of tests that are gone."""
        rows = self.rows()
        if (kept := self.kept(rows)) != rows:
            self.write(kept)

    def rows(self) -> dict[str, dict[str, Any]]:
        """What the file holds."""
        return json.loads(self.path.read_text())["tests"] if self.path.is_file() else {}

    def write(self, rows: dict[str, dict[str, Any]]) -> None:
        """Replace the file in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.part")
        beside.write_text(json.dumps(summary(rows), indent=1) + "\n")
        beside.replace(self.path)

    def kept(self, old: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Rows of the file whose tests still exist, as far as this run can tell; of other seeds: whose functions do."""
        if not self.whole_files:
            return old
        functions = {name.partition("[")[0] for name in self.known}
        files = {name.partition("::")[0] for name in self.known}
        found = {}
        for name, row in old.items():
            file, function = name.partition("::")[0], name.partition("[")[0]
            there = function in functions if "seed" in row else name in self.known
            if (self.root / file).is_file() and (there or file not in files):
                found[name] = row
        return found


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the file holds: totals, versions, rows by name."""
    chains = [row for row in rows.values() if "kills" in row]
    kills = Counter(kill.partition(" after ")[0] for row in chains for kill in row["kills"])
    generated = [row for row in rows.values() if "silent_wrongs" in row]
    return {
        "summary": {
            **Counter(row["outcome"] for row in rows.values()),
            "seconds": round(sum(row["seconds"] for row in rows.values())),
            "kills": kills.total(),
            "kills_survived": sum(len(row["kills"]) for row in chains if row["outcome"] == "passed"),
            "killed": dict(sorted(kills.items())),
            **{name: sum(row[name] for row in generated) for name in ("cases", "tracebacks", "silent_wrongs")},
            "seeds": sorted({row["seed"] for row in generated}),
            "seeds_of_kills": sorted({row["seed"] for row in chains}),
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


def commit(record: Path) -> str:
    """The commit that is tested, with ``+`` where tracked files but the record differ from it; empty outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    tracked, name = ["status", "--porcelain", "--untracked-files=no", "--", "."], record.resolve()
    if name.is_relative_to(PROJECT):
        tracked.append(f":(exclude){name.relative_to(PROJECT)}")
    changed = git(*tracked)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def machine() -> str:
    """System, cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
