"""hf-libero made usable: versions, configuration and assets, before its modules are imported.

``import libero.libero`` asks a question on standard input where it finds no configuration, never reads ``assets`` from
that configuration, and needs robosuite 1.4 with a MuJoCo that draws its floor as published. :func:`bootstrap` settles
all three: it checks the versions, writes the configuration into this project's local folder, and hands over the
assets, found in this order: ``WAV_LIBERO_ASSETS``, the installed package, the folder of an earlier download, a
download from the hub (announced with its size). ``make libero`` installs what is needed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from wav.errors import ServiceError, SimulationError
from wav.hub import silence_ends
from wav.io.files import canonical_digest, write_text
from wav.local import local_folder

log = logging.getLogger(__name__)

REQUIRED = {"hf-libero": "0.1.4", "robosuite": "1.4.0", "mujoco": "3.3.2"}
"""Versions LIBERO runs with: newer robosuite breaks it, newer MuJoCo (3.3.3 on) draws its floor darker."""
ASSETS_REPO = "lerobot/libero-assets"
ASSETS_VARIABLE = "WAV_LIBERO_ASSETS"
FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures")
"""What a folder of assets must hold (turbosquid_objects too, but not every kit needs it)."""
INSTALL = "make libero"


def package_folder() -> Path:
    """Folder of the module ``libero.libero``, found without importing it.

    Raises:
        ServiceError: hf-libero is not installed; names the command.
    """
    spec = importlib.util.find_spec("libero")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "libero"
        if (folder / "bddl_files").is_dir():
            return folder
    raise ServiceError(f"LIBERO: the package hf-libero is not installed; install it with `{INSTALL}`")


def check_versions() -> dict[str, str]:
    """Installed versions of :data:`REQUIRED`.

    Raises:
        ServiceError: one is missing or another than required; names both versions and the command.
    """
    found: dict[str, str] = {}
    for name, wanted in REQUIRED.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ServiceError(f"LIBERO: {name} is not installed; install it with `{INSTALL}`") from None
        if found[name] != wanted:
            raise ServiceError(
                f"LIBERO: {name} = {found[name]}: needs exactly {wanted}, others change physics or pictures; "
                f"`{INSTALL}` installs it"
            )
    return found


def write_configuration(folder: Path, package: Path) -> Path:
    """Write LIBERO's ``config.yaml`` into ``folder`` (atomically, the same content every time); its path.

    ``datasets`` is a name that LIBERO wants and this project never reads.
    """
    lines = {
        "assets": package / "assets",
        "bddl_files": package / "bddl_files",
        "benchmark_root": package,
        "datasets": folder / "datasets",
        "init_states": package / "init_files",
    }
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{name}: {str(place)!r}\n" for name, place in lines.items()))
    return path


def missing_folders(folder: Path) -> list[str]:
    """Folders of :data:`FOLDERS` that ``folder`` lacks."""
    return [name for name in FOLDERS if not (folder / name).is_dir()]


def download_folder() -> Path:
    """Where a download goes: the place hf-libero itself looks in."""
    return Path.home() / ".cache" / "libero" / "assets"


@functools.cache
def find_assets() -> Path:
    """Folder of LIBERO's assets; downloaded if need be and possible.

    Raises:
        ServiceError: none exist and none can be had, or ``WAV_LIBERO_ASSETS`` names a folder without them.
    """
    return assets_here() or _download(download_folder())


def assets_here() -> Path | None:
    """Folder of the assets on this machine, None where there are none; nothing is downloaded.

    Raises:
        ServiceError: ``WAV_LIBERO_ASSETS`` names a folder without them.
    """
    named = os.environ.get(ASSETS_VARIABLE, "")
    if named:
        folder = Path(named).expanduser().absolute()
        if missing := missing_folders(folder):
            raise ServiceError(
                f"{ASSETS_VARIABLE} = {named}: has no folder {missing[0]!r}; set it to the folder of LIBERO's assets "
                "(the one with scenes/ and textures/), or unset it"
            )
        return folder
    whole = (folder for folder in (package_folder() / "assets", download_folder()) if not _unfinished(folder).exists())
    return next((folder for folder in whole if not missing_folders(folder)), None)


def _unfinished(folder: Path) -> Path:
    """A file beside ``folder`` while it is downloaded: what an interrupted download leaves has all folders, too."""
    return folder.with_name(f"{folder.name}.unfinished")


def _download(folder: Path) -> Path:
    """Fetch the assets from the hub into ``folder``, saying how much that is."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        with silence_ends():
            info: Any = HfApi().repo_info(ASSETS_REPO, repo_type="dataset", files_metadata=True, timeout=20)
            size = sum(file.size or 0 for file in info.siblings or [])
            log.warning("LIBERO assets: downloading %.0f MB from %s to %s", size / 1e6, ASSETS_REPO, folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _unfinished(folder).touch()
            snapshot_download(ASSETS_REPO, repo_type="dataset", revision=info.sha, local_dir=folder)
        _unfinished(folder).unlink()
    except Exception as error:  # the hub's own error classes differ between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServiceError(
            f"LIBERO assets: none in {ASSETS_VARIABLE}, {package_folder() / 'assets'} or {folder}, and the hub does "
            f"not give them ({reason}); on a connected machine run `hf download --repo-type dataset {ASSETS_REPO} "
            f"--local-dir FOLDER`, then set {ASSETS_VARIABLE}=FOLDER"
        ) from error
    if missing := missing_folders(folder):
        raise ServiceError(
            f"LIBERO assets: {ASSETS_REPO} was downloaded to {folder}, which has no folder {missing[0]!r}; "
            f"set {ASSETS_VARIABLE} to a complete folder"
        )
    return folder


@functools.cache
def assets_digest(folder: Path) -> str:
    """Identity of a folder of assets (names and sizes of its files): scores on other pictures do not compare.

    Hidden folders are left out: a download keeps its own notes in one, which differ from machine to machine.
    """
    names = [top for top in sorted(folder.iterdir()) if top.is_dir() and not top.name.startswith(".")]
    files = [file for top in names for file in sorted(top.rglob("*")) if file.is_file()]
    return canonical_digest([[file.relative_to(folder).as_posix(), file.stat().st_size] for file in files])[:16]


def simulator_versions() -> dict[str, str]:
    """Versions and assets that decide LIBERO's physics and pixels; raises ServiceError as :func:`bootstrap` does."""
    return {**check_versions(), "libero-assets": assets_digest(find_assets())}


@functools.cache
def bootstrap() -> Any:
    """Import ``libero.libero`` without a question and with its assets; the module.

    Raises:
        ServiceError: hf-libero or its assets are missing, or a version is another than required.
        SimulationError: the import fails for another reason.
    """
    check_versions()
    package, assets = package_folder(), find_assets()
    configuration = write_configuration(local_folder() / "libero", package)
    os.environ["LIBERO_CONFIG_PATH"] = str(configuration.parent)
    os.environ[ASSETS_VARIABLE] = str(assets)  # processes started from here use the same
    try:
        import libero.libero as module
    except ImportError as error:
        raise SimulationError(f"import libero.libero: {error}; install what is missing with `{INSTALL}`") from error
    module._assets_path_cache = str(assets)
    return module
