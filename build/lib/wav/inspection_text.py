"""An :class:`~wav.inspection.Inspection` for people, for programs, as pictures, and as a preset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from wav.evaluation.pictures import join_views, write_png
from wav.inspection import Inspection, Undeclared
from wav.parameter_files import merge

_SHOWN = 10  # instructions, and reasons of quarantine
#: what ``source.json`` says of a dataset or of its first file -> (what it is, its parameters, how readers tell it)
_FOUND = {
    "rotation_stored": ("pictures are stored", ("image_rotation",), "attributes of the file"),
    "rows_reversed": ("rows of pictures reversed", (), "attributes of the file"),
    "gripper_stored": ("gripper commands", ("gripper",), "as the fingers move, and the format's rule"),
    "state_stored": (
        "state is stored as",
        ("rotation", "unit"),
        "names and width of its columns, numbers checked",
    ),
    "observation": ("a frame was recorded", ("alignment",), "the simulator's states beside the joints"),
    "actions_lead_steps": ("actions lead states by, in steps", ("shift",), "measured"),
    "grippers": ("ranges of grippers by column", ("raw_grippers",), "measured"),
    "channels": ("colours of pictures", ("channels",), "declared, or raw pictures"),
    "success": ("success", (), "a dataset of each demonstration"),
}


def lines(found: Inspection) -> Iterator[str]:
    """The report, line by line."""
    seen = found.survey
    yield f"{found.path}: {' '.join(filter(None, (seen.format, seen.version)))}" + (seen.robot and f", {seen.robot}")
    rate = f"{seen.rate:g} Hz, {seen.frames / seen.rate / 60:.1f} minutes" if seen.rate else "rate not recorded"
    yield f"  {seen.episodes} episodes, {seen.frames} frames, {rate}, {seen.arms} arm{'s' * (seen.arms > 1)}"
    yield "instructions (episodes)"
    for text, count in list(seen.instructions.items())[:_SHOWN]:
        yield f"  {count:6d}  {text or '(none recorded)'}"
    if len(seen.instructions) > _SHOWN:
        yield f"  and {len(seen.instructions) - _SHOWN} more"
    yield "cameras (height x width)"
    views = {camera: view for view, camera in found.views.items()}
    for camera, (height, width) in seen.cameras.items():
        yield f"  {camera}  {height} x {width}  " + (f"view {views[camera]}" if camera in views else "left out")
    for camera in seen.left_out:
        yield f"  {camera}  left out: one channel"
    for what, numbers in (("state", seen.state), ("action", seen.action)):
        named = " ".join(numbers.names) if numbers.names else "(no names)"
        yield f"{what}: {numbers.column}, {numbers.width} numbers: {named}"
    yield from _conventions(found)
    yield from _open(found)
    yield from _quarantine(found)
    for note in found.notes:
        yield f"note: {note}"


def _conventions(found: Inspection) -> Iterator[str]:
    if found.conventions is None:
        return
    source, store = found.conventions["source"], found.conventions["store"]
    source = source | (source.get("files") or [{}])[0]
    yield "conventions, and how they were told"
    for key, (what, options, how) in _FOUND.items():
        if key in source and source[key] not in ("", "absolute", {}):
            yield f"  {what}: {source[key]} ({_how(found, options, how)})"
    yield f"  actions: {store['action']} ({_how(found, ('action',), 'names and widths of state and action')})"
    yield f"  state in the store: {store['state_layout']}"


def _how(found: Inspection, options: tuple[str, ...], usual: str) -> str:
    """How a value was told: not at all, by the user, or as readers tell it."""
    names = {f"ingest.{found.survey.reader}.{option}" for option in options}
    if names & {one.field for one in found.undeclared}:
        return "NOT KNOWN: tried here with this"
    return "declared" if names & set(found.told) else usual


def _open(found: Inspection) -> Iterator[str]:
    if found.undeclared:
        yield "to be declared before ingest"
        for one in found.undeclared:
            yield f"  {one.field} (tried here with {one.stand_in!r})"
            yield f"      {one.why}"
    if found.problem:
        yield f"cannot be ingested: {found.problem}"


def _quarantine(found: Inspection) -> Iterator[str]:
    many = found.survey.episodes
    yield f"episodes read whole: {found.read} fit; {len(found.quarantined)} would be quarantined (of {many})"
    for rejection in found.quarantined[:_SHOWN]:
        yield f"  {rejection.reason}"
    if len(found.quarantined) > _SHOWN:
        yield f"  and {len(found.quarantined) - _SHOWN} more"


def as_json(found: Inspection) -> dict[str, Any]:
    """The same for a program."""
    seen = found.survey
    return {
        "path": str(found.path),
        "format": seen.format,
        "version": seen.version,
        "robot": seen.robot,
        "episodes": seen.episodes,
        "frames": seen.frames,
        "hz": seen.rate or None,
        "arms": seen.arms,
        "instructions": dict(seen.instructions),
        "cameras": {name: list(size) for name, size in seen.cameras.items()},
        "views": dict(found.views),
        "state": {"column": seen.state.column, "width": seen.state.width, "names": seen.state.names},
        "action": {"column": seen.action.column, "width": seen.action.width, "names": seen.action.names},
        "conventions": found.conventions,
        "undeclared": [{"field": o.field, "tried": o.stand_in, "why": o.why} for o in found.undeclared],
        "read": found.read,
        "quarantined": [{"episode": r.episode, "reason": r.reason} for r in found.quarantined],
        "problem": found.problem,
        "notes": found.notes,
        "ready": found.ready,
        "overlay": found.overlay,
    }


def write_pictures(found: Inspection, folder: Path) -> list[Path]:
    """First frames as PNG, one file a task, the views beside each other as ``ingest`` would store them."""
    paths = []
    for task, views in found.frames:
        path = folder / f"{task}.png"
        write_png(path, join_views(views, tuple(views)))
        paths.append(path)
    return paths


def overlay_text(found: Inspection) -> str:
    """A preset: it lies over params.yaml and ingests the dataset; what is to be declared is empty there."""
    text = [f"# {found.survey.format} at {found.path}, written by wav inspect.", ""]
    for section, values in found.overlay.items():
        text.append(f"{section}:")
        for name, value in values.items():
            text += _entry(found, section, name, value)
        text.append("")
    return "\n".join(text)


def _entry(found: Inspection, section: str, name: str, value: Any) -> Iterator[str]:
    if section != "ingest" or name != found.survey.reader:
        how = found.told.get(f"{section}.{name}", "")
        yield f"  {name}: {_value(value)}" + (f"  # {how}" if how else "")
        return
    options = dict(value)
    for one in found.undeclared:
        options = merge(options, {one.field.rpartition(".")[2]: _empty(one)})
    yield f"  {name}:" if options else f"  {name}: {{}}"
    reasons: dict[str, list[str]] = {}
    for one in found.undeclared:
        reasons.setdefault(one.field.rpartition(".")[2], []).append(one.why)
    for option, given in options.items():
        for why in reasons.get(option, []):
            yield f"    # TO BE DECLARED: {why}"
        yield f"    {option}: {_value(given)}"


def _empty(one: Undeclared) -> Any:
    """The value that declares nothing, in the form of one that would."""
    if isinstance(one.stand_in, Mapping):
        return dict.fromkeys(one.stand_in, "")
    return type(one.stand_in)()


def _value(value: Any) -> str:
    """A value in YAML on one line."""
    yaml, text = YAML(typ="safe"), StringIO()
    yaml.default_flow_style, yaml.width = True, 10_000
    yaml.dump(dict(value) if isinstance(value, Mapping) else value, text)
    return text.getvalue().removesuffix("...\n").strip()
