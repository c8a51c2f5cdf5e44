"""What ``wav inspect FOLDER`` finds: what a dataset is, what must be declared, what would be quarantined.

The readers of :mod:`wav.data.sources` are asked, not imitated. Settings are proposed from what the metadata say; where
a reader refuses because something must be declared, that is noted, a stand-in takes its place in this trial alone, and
the reader is asked again. Then a few episodes are read as ``ingest`` reads them::

    found = inspect(Path("my-data"), {}, {"ingest.lerobot.image_rotation": "camera"})
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.config import Settings, parse_settings
from wav.data.conventions import wrist_views
from wav.data.episode import Episode
from wav.data.names import LIBERO_SUITES, task_name
from wav.data.sources import open_source
from wav.data.sources.damage import unreadable
from wav.data.sources.finding import CAMERAS
from wav.data.sources.libero_hdf5 import suite_folder
from wav.data.sources.open_files import files_closed
from wav.data.sources.recognise import recognise, refuse_unknown
from wav.data.sources.staging import DatasetSource
from wav.data.store import Rejection
from wav.data.survey import Survey, choose_views, survey
from wav.errors import ConfigError, DataError
from wav.io.readers import understood
from wav.parameter_files import merge
from wav.sim.registry import has_simulator

#: pixels of the longer side of the pictures, at most
PICTURE = 256
#: option that a reader may want declared -> stand-ins for the trial, in the order in which they are tried
STAND_INS: dict[str, tuple[Any, ...]] = {
    "image_rotation": ("camera",),
    "gripper": ("-1 open, +1 close", "0 open, 1 close"),
    "unit": ("degree",),
    "action": ("joint_absolute",),
    "rotation": ("axis_angle", "quat_xyzw"),
    "alignment": ("after_action",),
    "control_hz": (20,),
    "instructions": ("do the task",),
    "channels": ("rgb",),
    "base": ("ignore",),
    "raw_grippers": (True,),
    "shift": (1,),
}
#: a number of section ``data`` that the data tell, as readers say it
_FACT = re.compile(r"^data\.(\w+) = .*?has shape \[(\d+)\]|set data\.(\w+):? (?:to )?(\d+)")
_FOLDER = re.compile(r"\{\"?([^{}:\"]+)\"?: \.\.\.\}")
_MOST = 100  # questions to a reader


@dataclass(frozen=True)
class Undeclared:
    """Something that the data do not tell."""

    field: str
    """Full name of the parameter, such as ``ingest.lerobot.image_rotation``."""
    stand_in: Any
    """What was tried here; no advice."""
    why: str
    """The reader's sentence."""


@dataclass(frozen=True)
class Inspection:
    """What was found; ``problem`` says why no episode can be read, where none can."""

    path: Path
    survey: Survey
    views: Mapping[str, str]
    """View -> camera."""
    overlay: Mapping[str, Any]
    """Sections of a parameter file that ingests it, without what is to be declared."""
    told: Mapping[str, str]
    """Parameter -> how its value was told."""
    undeclared: tuple[Undeclared, ...] = ()
    conventions: Mapping[str, Any] | None = None
    """What the readers say of the episodes (``source.json``), and the store's conventions."""
    read: int = 0
    """Episodes that were read whole and are fit."""
    quarantined: tuple[Rejection, ...] = ()
    frames: tuple[tuple[str, Mapping[str, NDArray[np.uint8]]], ...] = ()
    """(task, view -> first frame) of an episode of each of the first tasks, as ingest would store them."""
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the overlay ingests it as it stands."""
        return not (self.problem or self.undeclared) and self.read > 0


def inspect(
    path: Path,
    base: Mapping[str, Any],
    declared: Mapping[str, Any],
    *,
    episodes: int = 20,
    progress: Callable[[int], None] = lambda count: None,
) -> Inspection:
    """Look at the dataset at ``path``.

    ``base`` is the parameter file that the overlay will lie over, ``declared`` what the user gives, by full name.
    ``episodes`` are spread over the dataset (0: all); ``progress`` is told how many were dealt with.

    Raises:
        ConfigError: there is nothing, no robot data, or data that no reader takes (with what to do); ``declared``
            names an unknown parameter or holds a bad value.
        DataError: its metadata are missing or damaged.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; give the folder of a dataset")
    found = recognise(path)
    if found is None:
        for file in [path] if path.is_file() else islice(path.rglob("*.hdf5"), 1):
            refuse_unknown(file)
            raise unreadable(file, "file of a known format", ValueError("unknown to every reader"))
        raise ConfigError(
            f"{path}: holds no robot data that is known by its content; give the folder that holds meta/ (LeRobot) or "
            "the HDF5 files (LIBERO, robomimic, ALOHA), or convert it to LeRobot v3.0"
        )
    if not found.reader:
        raise ConfigError(f"{path}: holds {found.name}, which no reader takes; {found.remedy}")
    seen = survey(path, found)
    views = choose_views(seen)
    settings = parse_settings(dict(base))
    overlay, told = _propose(path, seen, views, settings)
    for name, value in declared.items():
        overlay, told = merge(overlay, _nested(name, value)), told | {name: "declared"}
    parse_settings(merge(base, overlay), "--set")
    made = Inspection(path, seen, views, overlay, told, notes=_notes(seen, views, settings))
    return _asked(made, base, declared, episodes or seen.episodes, progress)


def _propose(
    path: Path, seen: Survey, views: Mapping[str, str], base: Settings
) -> tuple[dict[str, Any], dict[str, str]]:
    """Sections that follow from the survey, and how each value was told."""
    name = seen.suite or (task_name(path.stem.replace("-", " ")) or "robot")[:40]
    if not seen.suite and has_simulator(name):
        name = f"{name}_data"
    suites = [suite for suite in LIBERO_SUITES if seen.reader == "libero_hdf5" and suite_folder(path, suite)] or [name]
    name = name if len(suites) == 1 else "libero"
    longest = max(len(text.split()) + 1 for text in seen.instructions)
    height, width = next((seen.cameras[camera] for camera in views.values()), (0, 0))
    most = max(seen.instructions.values())
    end_effector = seen.reader in ("libero_hdf5", "robomimic_hdf5")
    data: dict[str, Any] = {
        "suites": suites,
        "tasks": [],
        "views": list(views) or list(base.data.views),
        **dict(zip(("image_height", "image_width"), _size(height, width, base), strict=True)),
        "render": "full",
        "state_dim": 8 if end_effector else seen.state.width,
        "action_dim": seen.action.width,
        "control_hz": max(1, round(seen.rate)) if seen.rate else base.data.control_hz,
        "text_tokens": max(base.data.text_tokens, -(-5 * longest // 4)),
    }
    named = {view: camera for view, camera in views.items() if not _usual(view, camera, seen.reader)}
    ingest: dict[str, Any] = {"source": seen.reader, "path": str(path.absolute()), "episodes_per_task": most}
    ingest[seen.reader] = {"cameras": named} if named else {}
    overlay: dict[str, Any] = {"data": data, "ingest": ingest, "export": {"name": f"wav-{name}"}}
    if seen.arms == 2:
        overlay["label_rewards"] = {"arms": 2, "weight": "1/16"}
    told = {
        "data.suites": "the dataset's" if seen.suite else "the folder's name; a robot without a simulator",
        "data.tasks": "all",
        "data.views": "one third-person view, and the wrist of each arm, left before right",
        "data.image_height": f"recorded {height} x {width}" if height else "",
        "data.control_hz": "as recorded" if seen.rate else "not recorded",
        "ingest.episodes_per_task": "all",
    }
    return overlay, told


def _usual(view: str, camera: str, reader: str) -> bool:
    """Whether the reader finds the camera by itself: LIBERO's files may name it otherwise from one to another."""
    return reader in ("libero_hdf5", "robomimic_hdf5") and camera in CAMERAS.get(view, ())


def _size(height: int, width: int, base: Settings) -> tuple[int, int]:
    """(height, width) of the base's longer side in the camera's shape, in whole cells of the codec."""
    longer, patch = max(base.data.image_height, base.data.image_width), base.encode.patch
    if not (height and width):
        return base.data.image_height, base.data.image_width
    cells = [max(1, round(longer * side / max(height, width) / patch)) for side in (height, width)]
    return max(16, cells[0] * patch), max(16, cells[1] * patch)


def _notes(seen: Survey, views: Mapping[str, str], base: Settings) -> tuple[str, ...]:
    """What later stages will say."""
    notes = []
    wrists = wrist_views(list(views))
    if len(wrists) != seen.arms or len(views) - len(wrists) != 1:
        notes.append(
            f"the reward of {seen.arms} arm(s) needs one third-person camera and {seen.arms} at the wrist (stage "
            f"label_rewards); found {', '.join(seen.cameras) or 'none'}. Where another camera serves, name it: "
            f"--set ingest.{seen.reader}.cameras='{{wrist: CAMERA}}' with --set data.views='[agentview, wrist]'"
        )
    if seen.rate and abs(seen.rate - base.data.control_hz) > 1:
        notes.append(
            f"times in params.yaml are steps at {base.data.control_hz} Hz; at {seen.rate:g} Hz look at data."
            "action_chunk, frame_stride and memory_horizon"
        )
    return tuple(notes)


def _nested(name: str, value: Any) -> dict[str, Any]:
    """``a.b.c`` as sections."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def _asked(
    made: Inspection,
    base: Mapping[str, Any],
    declared: Mapping[str, Any],
    count: int,
    progress: Callable[[int], None],
) -> Inspection:
    """The inspection with what the reader said, asked until it asks for nothing more."""
    tried: dict[str, int] = {}
    noted: dict[str, Undeclared] = {}
    for _ in range(_MOST):
        trial = merge(base, made.overlay)
        for one in noted.values():
            trial = merge(trial, _nested(one.field, one.stand_in))
        try:
            settings = parse_settings(_pictured(trial, made), "inspect")
            with understood(made.path, "repair the dataset"), files_closed():
                made = _read(replace(made, problem=""), settings, count, progress)
            question = "" if made.read else next((r.reason for r in made.quarantined), "no episode is left")
        except (ConfigError, DataError, OSError) as error:
            made = replace(made, problem=" ".join(str(error).split()))
            question = made.problem
        if not question:
            break
        fact = _FACT.search(question)
        field, number = (fact[1] or fact[3], int(fact[2] or fact[4])) if fact else ("", 0)
        if field and f"data.{field}" not in declared and made.overlay["data"].get(field) != number:
            made = replace(made, overlay=merge(made.overlay, {"data": {field: number}}))
            continue
        name = _asks_for(question, made.survey.reader, declared)
        options = STAND_INS.get(name.split(".")[2].split("|")[0], ()) if name else ()
        place = tried.get(name, 0)
        if place >= len(options):
            break
        tried[name] = place + 1
        why = noted[name].why if name in noted else question
        parameter, _, folder = name.partition("|")  # of instructions, one folder's
        noted[name] = Undeclared(parameter, {folder: options[place]} if folder else options[place], why)
    state = made.survey.state
    how = f"names of {state.column}" if state.names else f"width of {state.column}"
    told = dict(made.told) | {"data.state_dim": how, "data.action_dim": ""}
    return replace(made, undeclared=tuple(noted.values()), told=told)


def _asks_for(question: str, reader: str, declared: Mapping[str, Any]) -> str:
    """The option of the reader that a sentence asks for and the user has not given; empty where it asks for none."""
    for option in re.findall(rf"ingest\.{reader}\.(\w+)", question):
        name = f"ingest.{reader}.{option}"
        if option in STAND_INS and name not in declared:
            folder = _FOLDER.search(question) if option == "instructions" else None
            return f"{name}|{folder[1]}" if folder else name
    return "ingest.lerobot.gripper" if "reader's option gripper" in question and reader == "lerobot" else ""


def _pictured(trial: Mapping[str, Any], made: Inspection) -> dict[str, Any]:
    """The trial's parameters at a size at which people can see something."""
    height, width = next((made.survey.cameras[camera] for camera in made.views.values()), (0, 0))
    share = min(1.0, PICTURE / max(height, width, 1))
    patch = Settings().encode.patch
    sides = [max(patch, round(side * share / patch) * patch) for side in (height or PICTURE, width or PICTURE)]
    encode = {"patch": patch, "codec": "pca"}
    return merge(trial, {"data": {"image_height": sides[0], "image_width": sides[1]}, "encode": encode})


def _read(made: Inspection, settings: Settings, count: int, progress: Callable[[int], None]) -> Inspection:
    """Open the reader and read a few episodes."""
    source = open_source(settings.data, settings.ingest)
    assert isinstance(source, DatasetSource)
    rejected: dict[str, Rejection] = {}
    for entry in getattr(source, "entries", ()):  # what the metadata alone tell, of all episodes
        if entry.fault:
            reason = f"episode {entry.index}: {' '.join(entry.fault.split())}"
            rejected[reason] = Rejection(f"episode_{entry.index:06d}", "", reason)
    read = 0
    frames: dict[str, Mapping[str, NDArray[np.uint8]]] = {}
    for number, outcome in enumerate(_spread(source), 1):
        progress(number)
        if isinstance(outcome, Rejection):
            rejected.setdefault(outcome.reason, outcome)
            if not read and _asks_for(outcome.reason, made.survey.reader, {}):
                break  # every other episode would ask the same
        else:
            read += 1
            if len(frames) < 4:
                frames.setdefault(outcome.task, {view: np.array(shot[0]) for view, shot in outcome.images.items()})
        if number >= count:
            break
    told = {"source": source.describe(), "store": source.conventions().to_json()}
    return replace(
        made, conventions=told, read=read, quarantined=tuple(rejected.values()), frames=tuple(frames.items())
    )


def _spread(source: DatasetSource) -> Iterator[Episode | Rejection]:
    """Episodes of all jobs in turn, so that the first few come from all over the dataset."""
    running = [job.read(*job.arguments) for job in source.jobs()]
    while running:
        left = []
        for reader in running:
            outcome = next(reader, None)
            if outcome is not None:
                left.append(reader)
                yield outcome
        running = left


def parse_declared(settings: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as full name -> value, read as YAML; ConfigError for a text that is none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.[\w-]+)+", name):
            raise ConfigError(f"--set {text}: must be NAME=VALUE, such as ingest.lerobot.image_rotation=camera")
        try:
            found[name] = YAML(typ="safe").load(value)
        except (YAMLError, ValueError) as error:
            raise ConfigError(
                f"--set {text}: {' '.join(str(error).split())}; write the value as in params.yaml"
            ) from None
    return found
