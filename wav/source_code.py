"""Which modules decide a stage's result, and digests of them that comments do not change.

Imports are followed in the text of the modules, at any depth of their code, from the modules that the table of stages
names. Not followed are imports for type checkers alone, what the table says a stage never runs, and
:data:`PLUMBING`: settings (their values are parameters), services, logs and pictures, which cannot change a result.
A registry's ``"wav.module:name"`` is an import too, and so is the name of a file that is no module (C, templates).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wav.stages import stage

PLUMBING = (
    "flows/__init__.py",
    "flows/common.py",
    "flows/artifacts.py",
    "wav/__init__.py",
    "wav/cluster.py",
    "wav/config.py",
    "wav/data/sources/options.py",
    "wav/errors.py",
    "wav/io/storage/",
    "wav/local/",
    "wav/parameter_files.py",
    "wav/plots.py",
    "wav/processes.py",
    "wav/section.py",
    "wav/sections.py",
    "wav/source_code.py",
    "wav/stages.py",
    "wav/training/launch.py",
    "wav/training/tracking.py",
)
#: imports that no stage reaches: only for_simulator() needs the simulator, called where wav.sim is imported too;
#: replay looks for the dataset's files under `wav replay` alone, never in an evaluation
NOT_FOLLOWED = (("wav/data/conventions.py", "wav/sim/"), ("wav/evaluation/extras/replay.py", "wav/data/sources/"))
#: libraries whose releases may change a result, if only in its last digits: name of the import -> of the package
LIBRARIES = {
    name: name for name in ("numpy", "scipy", "torch", "diffusers", "mujoco", "robosuite", "h5py", "av", "pyarrow")
} | {"PIL": "pillow"}
_PACKAGES = ("wav", "flows")
_OTHER = (".c", ".h", ".j2")
_C_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def stage_modules(name: str) -> tuple[str, ...]:
    """Files, relative to the project, that decide what stage ``name`` makes; ConfigError for an unknown stage."""
    row = stage(name)
    return modules(row.entries, tuple(module.replace(".", "/") for module in row.unused))


def digests(files: Iterable[str]) -> dict[str, str]:
    """File -> digest of its code, for files as :func:`stage_modules` and :func:`modules` name them."""
    return {path: code_digest(_root() / path) for path in files}


def own_module(name: str) -> dict[str, str]:
    """File -> digest of a module outside this project that a parameter names as ``module:Class``; else nothing."""
    module, colon, _ = name.partition(":")
    try:
        spec = importlib.util.find_spec(module) if colon else None
    except (ImportError, ValueError):  # the stage says that there is none
        spec = None
    return {Path(spec.origin).name: code_digest(Path(spec.origin))} if spec and spec.origin else {}


def module_digests(entries: tuple[str, ...]) -> dict[str, str]:
    """File -> digest of its code for every file that ``entries`` import, they included."""
    return digests(modules(entries))


def library_versions(entries: tuple[str, ...], unused: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of those of :data:`LIBRARIES` that :func:`modules` of the same arguments import and are installed."""
    texts = [(_root() / path).read_text() for path in modules(entries, unused) if path.endswith(".py")]
    imported = {name.partition(".")[0] for text in texts for name in _imports(ast.parse(text))}
    found: dict[str, str] = {}
    for name in sorted(imported & LIBRARIES.keys()):
        with contextlib.suppress(PackageNotFoundError):
            found[LIBRARIES[name]] = version(LIBRARIES[name])
    return found


@cache
def modules(entries: tuple[str, ...], unused: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Files of this project that ``entries`` import, they included, sorted.

    Paths that begin with one of ``unused`` (``wav/rewards``) are not followed.
    """
    todo: list[str] = []
    for name in entries:
        found = _file(name)
        assert found is not None, f"{name}: no such module; correct the stage's row in wav/stages.py"
        todo.append(found)
    seen: set[str] = set()
    while todo:
        path = todo.pop()
        if path in seen or path.startswith((*PLUMBING, *unused)):
            continue
        seen.add(path)
        todo += [p for p in _named(path) if not any(path == ours and p.startswith(far) for ours, far in NOT_FOLLOWED)]
    return tuple(sorted(seen))


def code_digest(path: Path) -> str:
    """Digest of a file's code, without comments, docstrings, blank lines and spaces at line ends."""
    return _text_digest(path.suffix, path.read_text())


@cache
def _text_digest(suffix: str, text: str) -> str:
    """The same of a file's text: most files decide several stages."""
    if suffix in (".c", ".h"):
        text = _C_COMMENT.sub("", text)
    lines = _python_lines(text) if suffix == ".py" else text.splitlines()
    code = "\n".join(line for line in (line.rstrip() for line in lines) if line)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _root() -> Path:
    return Path(__file__).parent.parent


def _file(name: str) -> str | None:
    """Path, relative to the project, of a module of this project; None for anything else."""
    base = _root().joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if name.split(".")[0] in _PACKAGES and candidate.is_file():
            return candidate.relative_to(_root()).as_posix()
    return None


@cache
def _named(path: str) -> tuple[str, ...]:
    """Files of this project that one file names: modules it imports, and files beside it that are no modules."""
    file = _root() / path
    text = file.read_text()
    beside = (f for f in file.parent.rglob("*") if f.suffix in _OTHER and f.name in text and f != file)
    others = tuple(f.relative_to(_root()).as_posix() for f in beside)
    if file.suffix != ".py":
        return others
    names = set(_imports(ast.parse(text)))
    names |= {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 1)}
    return tuple(found for name in sorted(names) if (found := _file(name))) + others


def _imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module may import when it runs."""
    tests = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    guarded = (line for node in tests if "TYPE_CHECKING" in ast.unparse(node.test) for line in node.body)
    skipped = {id(inner) for line in guarded for inner in ast.walk(line)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, _ = node.value.partition(":")
            if colon and module.startswith("wav.") and " " not in node.value:
                yield module


def _python_lines(text: str) -> list[str]:
    """Lines of a Python file, comments and docstrings blank."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in _docstrings(ast.parse(text)):
        assert node.end_lineno is not None
        for row in range(node.lineno - 1, node.end_lineno):
            lines[row] = ""
    return lines


def _docstrings(tree: ast.Module) -> Iterable[ast.expr]:
    """Strings that stand alone as a statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value
