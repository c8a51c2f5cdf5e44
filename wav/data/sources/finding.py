"""What every reader looks for: the files at ``ingest.path``, the tasks of ``data.tasks``, a camera for each view."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from wav.errors import ConfigError

#: view -> usual names of its camera, in order of preference
CAMERAS = {
    "agentview": ("agentview_rgb", "agentview_image", "image"),
    "wrist": ("eye_in_hand_rgb", "robot0_eye_in_hand_image", "wrist_image", "image2"),
    "top": ("cam_high", "top_head", "head", "head_camera"),
    "left_wrist": ("cam_left_wrist", "hand_left", "left_camera"),
    "right_wrist": ("cam_right_wrist", "hand_right", "right_camera"),
}
_PREFIXES = ("observation.images.", "observation.image.", "")


def hdf5_files(path: str, what: str) -> list[Path]:
    """The HDF5 file at ``ingest.path``, or those below it; ConfigError where ``what`` should be there is not."""
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise ConfigError(f"ingest.path = {path!r}: no such file or folder; give {what}")
    if root.is_file():
        return [root]
    below = {found: found.relative_to(root).parts for found in root.rglob("*.hdf5")}
    # hidden files and folders are nobody's: a Mac's "._" twin, a notebook's checkpoints
    found = sorted(file for file, parts in below.items() if not any(part.startswith(".") for part in parts))
    if not found:
        raise ConfigError(f"ingest.path = {path!r}: holds no *.hdf5 file; give {what}")
    return found


def check_tasks(wanted: Iterable[str], known: Iterable[str], path: str | Path, told: Iterable[str] = ()) -> None:
    """ConfigError for a task of ``data.tasks`` that is not known at ``path``; ``told``: what it is said to hold."""
    have = set(known)
    missing = next((task for task in wanted if task not in have), None)
    if missing is not None:
        names = sorted(set(told) or have)
        raise ConfigError(f"data.tasks: {missing!r} is not in {path}; it holds {', '.join(names[:50])}")


def camera_for(view: str, have: Collection[str], declared: Mapping[str, str]) -> str:
    """The camera among ``have`` that serves a view: the declared one, or one of a usual name; empty for none."""
    usual = (view, *CAMERAS.get(view, ()), f"{view}_rgb", f"cam_{view}")
    names = [declared[view]] if view in declared else [prefix + name for name in usual for prefix in _PREFIXES]
    return next((name for name in names if name in have), "")


def no_camera(where: str | Path, view: str, have: Iterable[str], section: str) -> ConfigError:
    """The error for a view without a camera; ``section`` is that of the reader's options."""
    return ConfigError(
        f"{where}: has no camera for {view!r} of data.views; it has {', '.join(have) or 'none'}; name the right one in "
        f"{section}.cameras.{view}"
    )
