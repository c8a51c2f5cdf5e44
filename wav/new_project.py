"""``wav init``: a project outside the repository, so that users need not fork it.

Copied is what lies in the package's folder ``starter``: parameters, presets, an example reader. ``dvc.yaml`` is what
the installed package's table of stages means. The code of the stages stays in the package: DVC's first step, ``code``,
writes down its digests as it does in the repository.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from wav.errors import ConfigError
from wav.stages import dvc_yaml

STARTER = Path(__file__).parent / "starter"
_DVC = "[core]\n    analytics = false\n    check_update = false\n    no_scm = true\n"
_DVCIGNORE = "/.venv/\n/.local/\n/.wav/\n/workspaces/\n"


def make_project(folder: Path) -> list[str]:
    """Make a new project in ``folder``; names of its files. ConfigError where the folder exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; name a new or an empty folder")
    for path in sorted(STARTER.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            target = folder / path.relative_to(STARTER)
            target = target.with_name(".gitignore") if target.name == "gitignore" else target
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (folder / ".dvc").mkdir(parents=True)
    for name, text in ((".dvc/config", _DVC), (".dvcignore", _DVCIGNORE), ("dvc.yaml", dvc_yaml())):
        (folder / name).write_text(text)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
