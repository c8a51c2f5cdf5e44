"""The reference of the command line, written from its parser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from wav.cli import app


def leaves(command: Any, words: tuple[str, ...] = ("wav",)) -> Iterator[tuple[str, Any]]:
    """Every command that runs something, with the words that call it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(words), command
        return
    for name, one in inner.items():
        if not one.hidden:
            yield from leaves(one, (*words, name))


def literals(annotation: Any) -> list[str]:
    """The values that a type hint lists."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in literals(part)]


def _row(parameter: Any) -> str:
    """A parameter of a command: how it is written, its default and what it is."""
    is_option = parameter.param_type_name == "option"
    spelled = ", ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else str(parameter.name).upper()
    choices = literals(parameter.type_descriptor.annotation)
    meant = [parameter.help or "", f"one of {', '.join(choices)}" if choices else ""]
    default = parameter.default
    unset = default is None or default is False or callable(default) or default in ((), [], "")
    plain = "" if unset else f"`{default}`"
    needed = "needed" if parameter.required else plain
    cells = (f"`{spelled}`", needed, "; ".join(part for part in meant if part))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in cells)} |"


def command_page() -> str:
    """Every command: what it does, examples, arguments and options."""
    lines = []
    for spoken, command in leaves(get_command(app)):
        lines += ["", f"## {spoken}", "", " ".join((command.help or "").split())]
        said = (command.epilog or "").replace("\\[", "[").splitlines()
        if examples := [line.strip() for line in said if line.strip() and line != "Examples:"]:
            lines += ["", "```sh", *examples, "```"]
        parameters = [one for one in command.params if not getattr(one, "hidden", False)]
        if parameters:
            lines += ["", "| | default | |", "|---|---|---|", *map(_row, parameters)]
    return "\n".join(lines) + "\n"
