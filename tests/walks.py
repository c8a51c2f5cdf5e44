"""The walks of ``docs/extending/``: which files a page changes, and the change made on a copy of the project.

How a page is written stands in ``docs/extending/README.md``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROJECT = Path(__file__).resolve().parents[1]
PAGES = PROJECT / "docs" / "extending"
TIMEOUT_S = 240

_STEP = re.compile(
    r"^`(?P<path>[^`\s]+)`, (?P<action>new file|append|change):\n+```\w*\n(?P<code>.*?)^```$", re.M | re.S
)
_COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Step:
    """What a page does to one file: ``code`` is the file, what is appended to it, or a diff without line numbers."""

    path: str
    action: Literal["new file", "append", "change"]
    code: str

    def apply(self, root: Path) -> None:
        """Change the file under ``root``.

        Raises:
            ValueError: a new file exists already, or the old lines of a diff do not stand in the file exactly once.
        """
        file = root / self.path
        if self.action == "new file":
            if file.exists():
                raise ValueError(f"{self.path}: exists already; the page says that it is new")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.code)
            return
        text = file.read_text()
        if self.action == "append":
            between = "\n\n\n" if file.suffix == ".py" else "\n"
            file.write_text(text.rstrip("\n") + between + self.code)
            return
        lines = [line or " " for line in self.code.splitlines()]
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        places = [found.start() for found in re.finditer(rf"^(?={re.escape(old)})", text, flags=re.M)]
        if len(places) != 1:
            raise ValueError(f"{self.path}: the old lines stand there {len(places)} times, not once:\n{old}")
        file.write_text(text[: places[0]] + new + text[places[0] + len(old) :])


@dataclass(frozen=True)
class Walk:
    """A page: its steps in order, and the commands that show their effect."""

    steps: tuple[Step, ...]
    commands: tuple[str, ...]

    @classmethod
    def read(cls, page: str) -> Walk:
        """The walk that a page's text describes."""
        steps = [Step(**found.groupdict()) for found in _STEP.finditer(page)]
        return cls(tuple(steps), tuple(_COMMANDS.findall(page)))

    @property
    def files(self) -> list[str]:
        """The files that are made or changed, each once."""
        return list(dict.fromkeys(step.path for step in self.steps))

    def run(self, root: Path) -> str:
        """Apply all steps under ``root``, then run the commands there; what they wrote.

        Raises:
            AssertionError: a command failed, or ruff objects to the files as they are now.
        """
        for step in self.steps:
            step.apply(root)
        python = [file for file in self.files if file.endswith(".py")]
        said = _call(["ruff", "check", *python], root) + _call(["ruff", "format", "--check", *python], root)
        return said + "".join(_call(["bash", "-euo", "pipefail", "-c", command], root) for command in self.commands)


def copy_project(root: Path) -> None:
    """The tree as it is, without what git ignores."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, root / name)


def _call(argv: list[str], root: Path) -> str:
    """Run in ``root`` with the copy's own packages; what was written."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=root, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
