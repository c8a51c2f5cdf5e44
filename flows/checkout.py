"""The dedicated checkout that a retrain works in: a clone with its own branch and results, and the project's DVC cache.

The project's folder is only read. What a retrain may change in git is ``dvc.lock`` and the metrics; anything else that
differs there was made by somebody else, and the retrain refuses to start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import Field

from wav.errors import ConfigError, ServiceError
from wav.io.readers import read_yaml, understood
from wav.processes import Group

REMOTE = "local"  # name of the DVC remote in .dvc/config
LAST_LINES = 12
#: addresses of git that hold no password or token: before an @ only a path, or a user of ssh; no query with a value
NO_SECRET = r"^(?=[^@]*$|[./]|ssh://[^/@:]*@[^@]*$|[^/@:]*@[^@/]*:)(?!.*\?.*=)"
#: a parameter that is such an address: Prefect's server refuses another one before it is written down anywhere
GitAddress = Annotated[str, Field(json_schema_extra={"pattern": NO_SECRET})]


def without_secret(address: str, field: str) -> None:
    """Refuse (ConfigError) an address with a password or token, which would stand in a database, log and artefact."""
    if not re.match(NO_SECRET, address):
        raise ConfigError(f"{field}: holds a password or token; keep it in git's credential store, or push by ssh")


@dataclass(frozen=True)
class Finished:
    """How a command ended: its status and the lines it printed."""

    status: int
    lines: tuple[str, ...]

    @property
    def tail(self) -> str:
        """The last thing it said."""
        return " | ".join(line.strip() for line in self.lines[-LAST_LINES:] if line.strip())


class Checkout:
    """A clone of ``source`` in ``folder``; ``say`` gets every line that a command prints.

    ``environment`` is that of the commands; credentials stay in it and are written nowhere.
    """

    def __init__(self, source: Path, folder: Path, environment: dict[str, str], say: Callable[[str], None]) -> None:
        self.source, self.folder, self._say = source.resolve(), folder.resolve(), say
        inherited = {name: value for name, value in environment.items() if not name.startswith(("PREFECT__", "GIT_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        self._environment = {**inherited, "PATH": path, "PYTHONUNBUFFERED": "1", "GIT_TERMINAL_PROMPT": "0"}

    def follow(self, say: Callable[[str], None]) -> None:
        """Send the lines of the next commands to ``say``."""
        self._say = say

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other retrains out of this checkout; ServiceError where one is in there."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.folder.with_name(self.folder.name + ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ServiceError(f"{self.folder}: another retrain works there; wait for it or cancel it") from None
            self._forget_dead_dvc()
            yield

    def _forget_dead_dvc(self) -> None:
        """Remove the read-write lock of a ``dvc`` that was killed.

        DVC tells a dead owner by its pid alone, so that after a reboot any process of that pid would block it for ever.
        """
        path = self.folder / ".dvc" / "tmp" / "rwlock"
        pids = {int(pid) for pid in re.findall(r'"pid": (\d+)', path.read_text())} if path.is_file() else set()
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                if any("dvc" in word for word in psutil.Process(pid).cmdline()):
                    return
        path.unlink(missing_ok=True)

    def git(self, *arguments: str, folder: Path | None = None) -> str:
        """Output of a git command in the checkout; ServiceError, with what it said, where git refused."""
        done = subprocess.run(
            ["git", "-c", "commit.gpgsign=false", *arguments],
            cwd=folder or self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())
            raise ServiceError(f"git {' '.join(arguments[:3])} in {folder or self.folder}: {said}; look there by hand")
        return done.stdout.rstrip()

    def run(self, name: str, *command: str) -> Finished:
        """Run a command in the checkout, in a process group that ends with this process or an exception."""
        lines: list[str] = []
        with Group(name) as group:
            child = group.start(command, self._environment, self.folder)
            for line in group.lines():
                lines.append(line)
                self._say(line)
        return Finished(int(child.process.returncode), tuple(lines))

    def python(self, name: str, *arguments: str) -> Finished:
        """Run a Python module of the checkout (``-m MODULE ...``) with this interpreter."""
        return self.run(name, sys.executable, *arguments)

    def dvc(self, *arguments: str) -> Finished:
        """Run a dvc command in the checkout."""
        return self.python(f"dvc {arguments[0]}", "-m", "dvc", *arguments)

    def own_files(self) -> list[str]:
        """What a retrain may change and commit: ``dvc.lock`` and the outputs that DVC leaves to git."""
        found, path = ["dvc.lock"], self.folder / "dvc.yaml"
        remedy = "make it again (`python -m wav.stages > dvc.yaml`)"
        with understood(path, remedy):
            for stage in read_yaml(path, remedy)["stages"].values():
                for item in [*stage.get("outs", []), *stage.get("metrics", [])]:
                    if isinstance(item, dict):
                        found += [path for path, options in item.items() if (options or {}).get("cache") is False]
        return found

    def dirt(self) -> list[str]:
        """Changed or unknown files that are not a retrain's own."""
        own = set(self.own_files())
        listed = self.git("status", "--porcelain", "--untracked-files=all", "-z").split("\0")
        return [entry[3:] for entry in listed if entry[3:] and entry[3:] not in own]

    def prepare(self, base: str, date: str) -> str:
        """Clone or fetch, refuse dirt, switch to ``retrain/<date>`` at ``base``; results of earlier retrains stay.

        ``base`` is a commit, branch or tag of the source, ``date`` YYYY-MM-DD. Returns the branch's name.

        Raises:
            ConfigError: the checkout is the project itself, or holds changes that no retrain made.
            ServiceError: git refused.
        """
        if self.folder == self.source:
            raise ConfigError(f"checkout = {self.folder}: is the project, whose branch stays; give a folder of its own")
        if not (self.folder / ".git").exists():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.git("clone", "--quiet", str(self.source), str(self.folder), folder=self.folder.parent)
        if dirt := self.dirt():
            raise ConfigError(
                f"{self.folder}: {dirt[0]} and {len(dirt) - 1} more files differ from git; the retrain's checkout must "
                "be clean: commit them to the project or remove them"
            )
        commit = self.git("rev-parse", "--verify", f"{base}^{{commit}}", folder=self.source)
        self.git("fetch", "--quiet", "--tags", str(self.source), "+refs/heads/*:refs/remotes/origin/*", "HEAD")
        kept = {name: (self.folder / name).read_bytes() for name in self.own_files() if (self.folder / name).is_file()}
        branch, start = self._branch(date, commit)
        self.git("checkout", "--quiet", "--force", "-B", branch, start)
        for name, content in kept.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        return branch

    def _branch(self, date: str, commit: str) -> tuple[str, str]:
        """Name and start of today's branch: the one that grew from ``commit`` by results alone, else a new one."""
        number = 1
        while True:
            name = f"retrain/{date}" + (f"-{number}" if number > 1 else "")
            if not self.git("branch", "--list", name):
                return name, commit
            grew = not self.git("rev-list", "--max-count=1", commit, f"^{name}")
            if grew and set(self.git("diff", "--name-only", commit, name).splitlines()) <= set(self.own_files()):
                return name, name
            number += 1

    def configure_dvc(self, endpoint: str) -> None:
        """The project's cache, this machine's S3 address; credentials come from the environment."""
        text = f"[cache]\n    dir = {self.source / '.dvc' / 'cache'}\n"
        if endpoint:
            text += f"['remote \"{REMOTE}\"']\n    endpointurl = {endpoint}\n"
        (self.folder / ".dvc" / "config.local").write_text(text)

    def commit(self, message: str) -> str:
        """Commit ``dvc.lock`` and the metrics; returns the commit, or empty where nothing changed."""
        present = [name for name in self.own_files() if (self.folder / name).is_file()]
        self.git("add", "--force", "--", *present)
        if not self.git("diff", "--cached", "--name-only"):
            return ""
        identity = ("-c", "user.name=wav retrain", "-c", "user.email=retrain@localhost")
        self.git(*identity, "commit", "--quiet", "--no-verify", "-m", message)
        return self.git("rev-parse", "HEAD")
