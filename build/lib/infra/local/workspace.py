"""A workspace for another parameter file: its own ``params.yaml``, ``dvc.yaml`` and ``dvc.lock``, the same code.

``python -m infra.local.workspace PRESET [DVC COMMAND]`` (``make repro PRESET=smoke``) makes ``workspaces/PRESET``
and runs ``dvc repro``, or the command that follows, there. The project's own parameters, lock file and results are not
touched. The code is linked, so DVC sees what runs; the DVC cache is the project's, so equal results are stored once.
A preset of a LIBERO suite is refused before anything runs where LIBERO or its assets are missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from wav.config import Settings, load_preset, load_settings, parameter_text
from wav.data.names import in_libero
from wav.errors import exit_status
from wav.local import project_folder

#: what a stage's command and dependencies name; linked, not copied
LINKED = ("wav", "flows")
COPIED = ("dvc.yaml", ".dvcignore", "prefect.toml")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def make_workspace(preset: str, folder: Path | None = None, cache: Path | None = None) -> Path:
    """Create or refresh the workspace of a preset; its results and lock file stay.

    Args:
        preset: name of a file in ``presets/``, without ``.yaml``.
        folder: where, instead of ``workspaces/PRESET``.
        cache: DVC cache, instead of the project's.

    Raises:
        ConfigError: no such preset, or it holds bad parameters.
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
    """Find now, not after the services are up and the stages begun, that a LIBERO suite cannot be simulated here.

    Raises:
        ServiceError: LIBERO is not installed, has other versions than needed, or has no assets; names the command.
    """
    if in_libero(load_settings(folder / "params.yaml").data.suite):
        from wav.sim.libero import assets as libero_assets

        libero_assets.check_versions()
        sys.stdout.write(f"LIBERO assets {libero_assets.find_assets()}\n")


def with_project() -> dict[str, str]:
    """The environment in which stages find modules of the user's own beside the project's params.yaml."""
    found = filter(None, (str(project_folder()), os.environ.get("PYTHONPATH", "")))
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(found)}


def main(arguments: list[str] | None = None) -> int:
    """Make the workspace and run ``dvc`` in it (``repro`` unless told otherwise)."""
    parser = argparse.ArgumentParser(prog="infra.local.workspace", description="run the pipeline with a preset")
    parser.add_argument("--folder", type=Path, help="instead of workspaces/PRESET")
    parser.add_argument("--cache", type=Path, help="DVC cache instead of the project's")
    parser.add_argument("preset")
    parser.add_argument("dvc", nargs=argparse.REMAINDER, help="dvc command and arguments; repro if there are none")
    chosen = parser.parse_args(arguments)

    def run() -> int:
        folder = make_workspace(chosen.preset, chosen.folder, chosen.cache)
        if not chosen.dvc:
            require_simulator(folder)
        sys.stdout.write(f"workspace {folder}\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "dvc", *(chosen.dvc or ["repro"])]
        return subprocess.run(command, cwd=folder, env=with_project(), check=False).returncode

    return exit_status(run)


if __name__ == "__main__":
    raise SystemExit(main())
