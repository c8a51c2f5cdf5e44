"""Reference pages written from the code: every parameter, every error sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from wav.config import Settings
from wav.local import PROJECT
from wav.parameter_files import read_parameters
from wav.stages import TRAINING

_LINE = re.compile(r"^(?P<indent> *)(?P<name>\w+):(?P<rest>.*)$")
_SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def comments(text: str) -> dict[str, str]:
    """Dotted name -> what stands behind the parameter in a parameter file's text."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            path = [*path[: len(match["indent"]) // 2], match["name"]]
            _, mark, words = match["rest"].partition("  # ")
            if mark:
                found[".".join(path)] = words.strip()
    return found


def fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, FieldInfo]]:
    """Every parameter below a section, by its dotted name."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, (*path, name))
        else:
            yield ".".join((*path, name)), field


def meaning(name: str, field: FieldInfo, said: dict[str, str]) -> str:
    """What a parameter means: its description, else the comment in params.yaml, of a training stage's the first's."""
    section, _, last = name.partition(".")
    shared = said.get(f"{next(iter(TRAINING))}.{last}", "") if section in TRAINING else ""
    return said.get(name) or field.description or shared


def limits(field: FieldInfo) -> str:
    """What values a parameter takes, as far as its type says."""
    choices = _choices(field.annotation)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = [f"{words} {getattr(m, key)}" for m in field.metadata for key, words in _SIGNS.items() if hasattr(m, key)]
    return ", ".join(bounds)


def _choices(annotation: Any) -> list[str]:
    """The values that a type lists."""
    if get_origin(annotation) is Literal:
        return [str(choice) or '""' for choice in get_args(annotation)]
    found = [choice for part in get_args(annotation) for choice in _choices(part)]
    return list(dict.fromkeys(found)) if get_origin(annotation) is not dict else []


def value(raw: Any) -> str:
    """A value as a parameter file writes it."""
    if raw is None or raw is PydanticUndefined:
        return ""
    if isinstance(raw, bool):
        return f"`{str(raw).lower()}`"
    if isinstance(raw, dict):
        return "`{" + ", ".join(f"{key}: {item}" for key, item in raw.items()) + "}`"
    return '`""`' if raw == "" else f"`{list(raw)}`".replace("'", "") if isinstance(raw, list) else f"`{raw}`"


def at(tree: Any, name: str) -> Any:
    """What stands at a dotted name of nested mappings; None where nothing does."""
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def own(path: Path) -> dict[str, Any]:
    """What a preset itself says, without the params.yaml that it lies over."""
    whole, below = read_parameters(path), read_parameters(PROJECT / "params.yaml")

    def differing(one: Any, two: Any) -> Any:
        if isinstance(one, dict) and isinstance(two, dict):
            return {key: differing(item, two.get(key)) for key, item in one.items() if item != two.get(key)}
        return one

    return dict(differing(whole, below))


def parameters() -> str:
    """Tables of all parameters: meaning, limits, default, and what the presets say instead."""
    path = PROJECT / "params.yaml"
    said, given = comments(path.read_text()), read_parameters(path)
    presets = {file.stem: own(file) for file in sorted((PROJECT / "presets").glob("*.yaml"))}
    lines = []
    for section, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        lines += ["", f"## {section}", "", (model.__doc__ or "").split("\n\n")[0].replace("\n", " "), ""]
        lines += ["| parameter | default | meaning | values | presets |", "|---|---|---|---|---|"]
        for name, one in fields(model, (section,)):
            others = [
                f"{preset}: {value(at(tree, name))}" for preset, tree in presets.items() if at(tree, name) is not None
            ]
            cells = (value(at(given, name)), meaning(name, one, said), limits(one), "<br>".join(others))
            row = " | ".join(cell.replace("|", "\\|") for cell in cells)
            lines.append(f"| `{name.partition('.')[2]}` | {row} |")
    return "\n".join(lines) + "\n"


#: room of the code -> the page that explains what its errors speak of
EXPLAINED = {
    "wav.data": ("datasets", "../datasets.md"),
    "wav.ingest": ("datasets", "../datasets.md"),
    "wav.inspection": ("your own dataset", "../howto/own-dataset.md"),
    "wav.demo": ("the demo", "../demo.md"),
    "wav.rewards": ("rewards", "../rewards.md"),
    "wav.codec": ("formats on disk", "formats.md"),
    "wav.text": ("formats on disk", "formats.md"),
    "wav.io": ("runbook", "../operations.md"),
    "wav.model": ("the method", "../method.md"),
    "wav.planning": ("planning", "../planning.md"),
    "wav.inference": ("planning", "../planning.md"),
    "wav.policy": ("formats on disk", "formats.md"),
    "wav.serving": ("serving", "../serving.md"),
    "wav.training": ("runbook", "../operations.md"),
    "wav.sim": ("LIBERO and the simulators", "../libero.md"),
    "wav.evaluation": ("LIBERO and evaluation", "../libero.md"),
    "wav.hub": ("LIBERO on eight GPUs", "../howto/libero.md"),
    "wav": ("parameters", "parameters.md"),
    "flows": ("runbook", "../operations.md"),
    "infra": ("runbook", "../operations.md"),
}


def sentence(node: ast.expr) -> str | None:
    """The text of a message, with NAMES in the place of what is filled in; None where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else _hole(part) for part in node.values]
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = sentence(node.left), sentence(node.right)
        return None if left is None or right is None else left + right
    return None


def _hole(node: ast.expr) -> str:
    """A word for what is filled in: the last name of the expression, in capitals."""
    names = re.findall(r"[A-Za-z_]{2,}", ast.unparse(node.value) if isinstance(node, ast.FormattedValue) else "")
    return (names[-1] if names else "value").strip("_").upper()


def errors() -> dict[str, dict[str, list[str]]]:
    """Room -> module -> the sentences that its errors can print, in the order of the code."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(file for room in ("wav", "flows", "infra") for file in (PROJECT / room).rglob("*.py")):
        module = ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        room = max((name for name in EXPLAINED if f"{module}.".startswith(f"{name}.")), key=len)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
                continue
            kind = getattr(node.exc.func, "id", "")
            words = sentence(node.exc.args[0])
            if kind.endswith("Error") and words and " " in words:
                found.setdefault(room, {}).setdefault(module, []).append(" ".join(words.split()))
    return found


def error_page() -> str:
    """The list of error sentences, each group with the page that explains it."""
    lines = []
    for room, modules in sorted(errors().items()):
        title, page = EXPLAINED[room]
        lines += ["", f"## {room}", "", f"What they speak of: [{title}]({page})."]
        for module, sentences in modules.items():
            lines += ["", f"`{module}`", "", *(f"- ``{words}``" for words in dict.fromkeys(sentences))]
    return "\n".join(lines) + "\n"
