"""Parameter files as they are on the disk: reading them, laying a preset over params.yaml, saying what is wrong.

A preset (``presets/NAME.yaml``) states only what differs from ``params.yaml``. Mappings are merged, however deep; lists
and everything else replace what params.yaml says.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from wav.errors import ConfigError, cut, shown
from wav.io.readers import read_yaml

PRESETS = "presets"
_LOG = logging.getLogger(__name__)


def read_parameters(path: Path) -> dict[str, Any]:
    """The sections that a parameter file means; a file in a folder ``presets`` lies over the ``params.yaml`` beside it.

    Raises:
        ConfigError: the file is missing, is not YAML or holds no sections.
    """
    overlay = _read(path)
    if path.absolute().parent.name != PRESETS:
        return overlay
    return merge(_read(path.absolute().parent.parent / "params.yaml"), overlay)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ``data.suite`` of earlier versions as ``data.suites``, so that it lies over that."""
    raw = read_yaml(path, "run inside the project folder or give the path of a parameter file", ConfigError)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold sections such as data: and model:, found {type(raw).__name__}; fix it")
    data = raw.get("data")
    if not isinstance(data, dict) or "suite" not in data or "suites" in data:
        return raw
    _told(path)
    return {**raw, "data": {"suites" if name == "suite" else name: value for name, value in data.items()}}


@functools.cache
def _told(path: Path) -> None:
    """Say once that a file has the earlier name."""
    _LOG.warning("%s: data.suite is a list now and called data.suites; write data: {suites: [...]}", path)


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``overlay`` over it; neither is changed."""
    merged = dict(base)
    for name, value in overlay.items():
        below = base.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def preset_path(project: Path, name: str) -> Path:
    """File of the preset ``name``.

    Raises:
        ConfigError: there is none; names the nearest and all others.
    """
    path = project / PRESETS / f"{name}.yaml"
    known = sorted(found.stem for found in path.parent.glob("*.yaml"))
    if name not in known:
        raise ConfigError(
            f"PRESET = {name!r}: no presets/{name}.yaml{nearest(name, known)}; there are {', '.join(known)}"
        )
    return path


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'that'?`` with the known name nearest to ``name``; empty where none is known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; did you mean {near[0]!r}?" if near else ""


def _known_names(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at ``location``."""
    current: Any = model
    for part in location:
        current = current.model_fields[part].annotation
    return list(current.model_fields)


def explain(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """First of pydantic's complaints as our error, of one sentence: field, value, remedy."""
    first = error.errors()[0]
    location = tuple(first["loc"])
    field = cut(".".join(str(part) for part in location))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        try:
            names = _known_names(model, location[:-1])
        except (KeyError, AttributeError, TypeError):
            names = []
        return ConfigError(f"{source}: {field}: unknown parameter{nearest(str(location[-1])[:80], names)}{more}")
    message, given = first["msg"].removeprefix("Value error, "), first["input"]
    if not field:
        return ConfigError(f"{source}: {message}{more}")
    if isinstance(given, dict):
        return ConfigError(f"{source}: {field}: {message}{more}")
    quoted = isinstance(given, (int, float)) and (first["type"] == "string_type" or f"'{given}'" in message)
    hint = f"; put it in quotes: '{cut(given)}'" if quoted else ""
    return ConfigError(f"{source}: {field} = {shown(given)}: {message[:1].lower() + message[1:]}{hint}{more}")
