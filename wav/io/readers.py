"""Reading what people and other programs wrote: every failure is one sentence with file, cause and remedy.

One reader per kind of file. Content that a reader hands on may still not be what its caller wants; the caller looks
into it inside :func:`understood`, which turns what goes wrong there into the same sentence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wav.errors import DataError, WavError, cut

if TYPE_CHECKING:
    from ruamel.yaml import YAML

#: bounds of a file that a person may have written; far above any real one
TEXT_BYTES, YAML_BYTES, YAML_DEPTH, YAML_VALUES = 1 << 28, 1 << 20, 20, 100_000
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
#: what Python raises where content is not as expected
_SURPRISES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def understood(where: str | Path, remedy: str, error: type[WavError] = DataError) -> Iterator[None]:
    """Work on content that was read: whatever does not fit is ``error``, which names ``where`` and the remedy.

    Errors of the project pass unchanged.
    """
    try:
        yield
    except WavError:
        raise
    except KeyError as problem:
        raise error(f"{where}: lacks {cut(problem)}, or is not of this version; {remedy}") from problem
    except _SURPRISES as problem:
        raise error(f"{where}: damaged, edited or not of this version ({cut(problem)}); {remedy}") from problem


def read_text(path: str | Path, remedy: str, error: type[WavError] = DataError, limit: int = TEXT_BYTES) -> str:
    """A file of UTF-8 text, with or without a byte order mark; ``error`` where it is none, or larger than ``limit``."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise error(f"{cut(path)}: missing; {remedy}") from None
    except (OSError, ValueError) as problem:  # ValueError: a name with a null byte
        raise error(f"{cut(path)}: cannot be read ({getattr(problem, 'strerror', '') or problem}); {remedy}") from None
    if len(data) > limit:
        raise error(f"{path}: {max(size, len(data))} bytes where at most {limit} are expected; {remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise error(f"{path}: line {line} is not UTF-8 text ({problem.reason}); {remedy}") from None


def read_json(path: str | Path, remedy: str, error: type[WavError] = DataError, limit: int = TEXT_BYTES) -> Any:
    """A JSON file of at most ``limit`` bytes; ``error`` where it is missing or not JSON, ending in ``remedy``."""
    return parse_json(read_text(path, remedy, error, limit), str(path), remedy, error)


def parse_json(text: str | bytes, where: str, remedy: str, error: type[WavError] = DataError) -> Any:
    """What JSON text says; ``error`` as from :func:`read_json`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON ({cut(problem)}); {remedy}") from None


def read_yaml(path: str | Path, remedy: str, error: type[WavError] = DataError) -> Any:
    """Read a YAML file exactly as DVC does (YAML 1.2), so that a run uses the values that ``dvc.lock`` records.

    Raises:
        DataError (or ``error``): it is missing, is not YAML, or holds what DVC refuses or what no such file needs: a
            key twice, an unquoted date, tags, more than a few levels or values. The message names the line.
    """
    from ruamel.yaml import YAML  # stores and models are read without it
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    text = read_text(path, remedy, error, YAML_BYTES)
    yaml = YAML(typ="safe")
    try:
        _check_yaml(yaml, text, str(path), error)
        value = YAML(typ="safe").load(text)
        _count(value, {})
    except MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise error(f"{path}: {line}not valid YAML ({cut(problem.problem or problem.context)}); fix the file") from None
    except (YAMLError, *_SURPRISES) as problem:
        if isinstance(problem, WavError):
            raise
        raise error(f"{path}: not valid YAML ({cut(problem)}); fix the file") from None
    return value


def _check_yaml(yaml: YAML, text: str, path: str, error: type[WavError]) -> None:
    """Refuse what is YAML and yet no parameter, by its line, before anything is built from it."""
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
    from ruamel.yaml.nodes import ScalarNode

    depth = 0
    for event in yaml.parse(text):
        line = f"{path}: line {event.start_mark.line + 1}"
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > YAML_DEPTH:
            raise error(f"{line}: more than {YAML_DEPTH} levels; fix the file")
        if isinstance(event, AliasEvent) or not isinstance(event, (ScalarEvent, CollectionStartEvent)):
            continue
        if event.tag not in (None, "!"):
            raise error(f"{line}: tag {cut(event.tag)}; write the value without a tag")
        plain = event.value if isinstance(event, ScalarEvent) and event.implicit[0] else None  # without quotes
        if plain and yaml.resolver.resolve(ScalarNode, plain, (True, False)) == _TIMESTAMP:
            raise error(f"{line}: {cut(plain)} is a date, which DVC refuses; put it in quotes")


def _count(value: Any, seen: dict[int, int]) -> int:
    """Values in ``value``, those behind an alias at every place; ValueError where they are too many or a circle."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in seen:
        seen[id(value)] = YAML_VALUES + 1  # until it is known: a circle meets this
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        seen[id(value)] = 1 + sum(_count(item, seen) for item in inner)
    if seen[id(value)] > YAML_VALUES:
        raise ValueError(f"aliases make more than {YAML_VALUES} values of it")
    return seen[id(value)]
