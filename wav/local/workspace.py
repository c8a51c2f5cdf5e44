"""A workspace for another parameter file: its own ``params.yaml``, ``dvc.yaml`` and ``dvc.lock``, the same code.

``wav repro --preset PRESET`` (``make repro PRESET=smoke``) makes ``workspaces/PRESET`` and runs ``dvc repro`` there.
The project's own parameters, lock file and results are not touched. The code is linked, so DVC sees what runs; the DVC
cache is the project's, so equal results are stored once. A preset of a LIBERO suite is refused before anything runs
where LIBERO or its assets are missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from wav.config import Settings, load_preset, load_settings, parameter_text
from wav.data.names import in_libero
from wav.local import project_folder
from wav.processes import guarded

#: what a stage's command and dependencies name; linked, not copied
LINKED = ("wav", "flows")
COPIED = ("dvc.yaml", ".dvcignore", "prefect.toml")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def make_workspace(preset: str, folder: Path | None = None, cache: Path | None = None) -> Path:
    """Create or refresh the workspace of a preset, in ``workspaces/PRESET``; its results and lock file stay.

    ``folder`` and the DVC ``cache`` may lie elsewhere. ConfigError: no such preset, or it holds bad parameters.
    """
    note = f"# params.yaml with presets/{preset}.yaml over it, by make repro PRESET={preset}: edit those.\n"
    return fill_workspace(folder or project_folder() / "workspaces" / preset, load_preset(preset), note, cache)


def fill_workspace(folder: Path, settings: Settings, note: str, cache: Path | None = None) -> Path:
    """Create or refresh ``folder`` as a workspace of ``settings``; ``note`` heads its params.yaml. The whole path."""
    folder, project = folder.absolute(), project_folder()
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    _write_if_changed(folder / "params.yaml", note + parameter_text(settings))
    for name in COPIED:
        _write_if_changed(folder / name, (project / name).read_text())
    cache = (cache or project / ".dvc" / "cache").absolute()
    text = (project / ".dvc" / "config").read_text()
    if "no_scm" not in text:
        text = text.replace("[core]\n", "[core]\n    no_scm = true\n", 1)
    text = text.replace("../infra", f"{project}/infra")
    text += f"[cache]\n    dir = {cache}\n"
    _write_if_changed(folder / ".dvc" / "config", text)
    secrets = project / ".dvc" / "config.local"
    if secrets.is_file() and not (folder / ".dvc" / "config.local").exists():
        (folder / ".dvc" / "config.local").symlink_to(secrets)
    for name in LINKED:
        link = folder / name
        if not link.is_symlink() and (project / name).is_dir():  # a project of wav init has the package's
            link.symlink_to(os.path.relpath(project / name, folder), target_is_directory=True)
    return folder


def require_simulator(folder: Path) -> None:
    """Find now, not after the services are up and the stages begun, that a LIBERO suite cannot be simulated here."""
    if in_libero(load_settings(folder / "params.yaml").data.suite):
        from wav.sim.libero import assets as libero_assets

        libero_assets.check_versions()
        sys.stdout.write(f"LIBERO assets {libero_assets.find_assets()}\n")
        sys.stdout.flush()


def repro(folder: Path, names: list[str]) -> int:
    """Status of ``dvc repro`` in ``folder``, of all stages or those named; they find the project's own modules.

    It ends with this process, whatever ends that: a stage that went on would be in the next run's way.
    """
    found = filter(None, (str(project_folder()), os.environ.get("PYTHONPATH", "")))
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(found)}
    command = [sys.executable, "-m", "dvc", "repro", *names]
    return subprocess.run(guarded(command), cwd=folder, env=environment, check=False).returncode
