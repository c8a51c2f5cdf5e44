"""What is wrong with a bad parameter, as the one sentence that people can act on."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    pass


def _known_names(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at ``location``."""
    current: Any = model
    for part in location:
        current = current.model_fields[part].annotation
    return list(current.model_fields)


def explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """First of pydantic's complaints as one sentence: field, value, remedy.

    Args:
        error: what ``model`` raised.
        model: names the parameters that exist.
        source: the file or command that the values came from.
    """
    first = error.errors()[0]
    location = tuple(first["loc"])
    field = ".".join(str(part) for part in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        try:
            names = _known_names(model, location[:-1])
        except (KeyError, AttributeError, TypeError):
            names = []
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{source}: {field}: unknown parameter{hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        return f"{source}: {message}{more}"
    if isinstance(first["input"], dict):
        return f"{source}: {field}: {message}{more}"
    return f"{source}: {field} = {first['input']!r}: {message[:1].lower() + message[1:]}{more}"
