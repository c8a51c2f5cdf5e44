"""Reference pages written from the code: every parameter, every error sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from wav.config import Settings
from wav.io.readers import read_yaml
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


def parameters() -> str:
    """Tables of all parameters: meaning, limits, default, and what the presets say instead."""
    path = PROJECT / "params.yaml"
    said, given = comments(path.read_text()), read_parameters(path)
    presets = {file.stem: read_yaml(file, "correct the file") for file in sorted((PROJECT / "presets").glob("*.yaml"))}
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
    "wav.local": ("runbook", "../operations.md"),
    "wav.hub": ("LIBERO on eight GPUs", "../howto/libero.md"),
    "wav": ("parameters", "parameters.md"),
    "wav.cluster": ("a stage on several machines", "../cluster.md"),
    "wav.shards": ("a stage on several machines", "../cluster.md"),
    "wav.commands": ("command line", "commands.md"),
    "wav.new_project": ("your own dataset", "../howto/own-dataset.md"),
    "wav.starter": ("your own dataset", "../howto/own-dataset.md"),
    "wav.policy.sharing": ("the hub", "../hub.md"),
    "wav.prefect_api": ("runbook", "../operations.md"),
    "wav.promotion": ("runbook", "../operations.md"),
    "flows": ("runbook", "../operations.md"),
    "infra": ("runbook", "../operations.md"),
    "infra.kubernetes": ("pools, queues, Kubernetes", "../kubernetes.md"),
}


def sentence(node: ast.AST) -> str | None:
    """The text of a message, with NAMES in the place of what is filled in; None where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else _hole(part) for part in node.values]
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = sentence(node.left), sentence(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.IfExp):
        one, other = sentence(node.body), sentence(node.orelse)
        return f"({one} / {other})" if one and other else one or other
    return None


def _hole(node: ast.expr) -> str:
    """A word for what is filled in: the last name of the expression, in capitals."""
    names = re.findall(r"[A-Za-z_]{2,}", ast.unparse(node.value) if isinstance(node, ast.FormattedValue) else "")
    return (names[-1] if names else "value").strip("_").upper()


#: what makes an error
_MAKES = re.compile(r"(\w*Error|error|kind\(.*\))$")
_WORD = re.compile(r"\b[a-z]{2,}\b")


def told(tree: ast.Module) -> Iterator[tuple[ast.expr, list[str]]]:
    """What each error that a module makes is given as its message, and the sentences that this can hold.

    A class chosen as ``error`` or by ``kind`` counts as one. Where a message names a variable or calls a function of
    its module, the sentences that are assigned to that variable, or returned by that function, are among them.
    """
    elsewhere: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            elsewhere.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            returned = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
            elsewhere.setdefault(node.name, []).extend(returned)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _MAKES.match(ast.unparse(node.func)):
            names = [part.id for part in ast.walk(node.args[0]) if isinstance(part, ast.Name)]
            parts = [part for name in dict.fromkeys(names) for part in elsewhere.get(name, [])]
            own, others = sentence(node.args[0]) or "", filter(None, map(sentence, parts))
            texts = [own] * (len(_WORD.findall(own)) > 0) + [text for text in others if len(_WORD.findall(text)) > 2]
            yield node.args[0], [" ".join(text.split()) for text in texts]


def errors() -> dict[str, dict[str, list[str]]]:
    """Room -> module -> the sentences that its errors can print, in the order of the code."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(file for room in ("wav", "flows", "infra") for file in (PROJECT / room).rglob("*.py")):
        module = ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        room = max((name for name in EXPLAINED if f"{module}.".startswith(f"{name}.")), key=len)
        for _, sentences in told(ast.parse(path.read_text())):
            if sentences:
                found.setdefault(room, {}).setdefault(module, []).extend(sentences)
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
