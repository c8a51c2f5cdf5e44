"""What pages name exists: links, paths, modules, presets, make targets. The papers of the project agree.

Read-only and fast. ``docs/fidelity.md`` has a test of its own (``tests/test_fidelity.py``), the walks of
``docs/extending/`` as well.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml
from typer.main import get_command

import wav
from wav.cli import app
from wav.config import Runtime

PROJECT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p.relative_to(PROJECT).as_posix()
    for p in [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), *(PROJECT / "examples").rglob("*.md")]
)
#: what speaks of things as they are: a changelog names what is gone, the walks name the files that they make
CURRENT = [page for page in PAGES if page != "CHANGELOG.md" and not page.startswith("docs/extending/")]
#: first folders of paths that are in the tree (others, such as data/ and reports/, are what a pipeline makes)
ROOMS = ("wav", "findings", "flows", "tests", "docs", "infra", "benchmarks", "presets", "examples", "clients")


def read(page: str) -> str:
    return (PROJECT / page).read_text()


def code(text: str) -> str:
    """What stands in code spans and code blocks of a page, one piece a line, comments left out."""
    blocks = re.findall(r"^```.*?\n(.*?)^```|^((?:    .*\n)+)", text, flags=re.M | re.S)
    lines = "".join(part for block in blocks for part in block).splitlines()
    return "\n".join([*(re.sub(r"(^|\s)#.*", "", line) for line in lines), *re.findall(r"`([^`\n]+)`", text)])


def heading_names(text: str) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def defined(module: Path) -> set[str]:
    """Names that a module defines or imports at its top, and the methods of its classes as Class.method."""
    found: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


def is_known(dotted: str) -> bool:
    """Whether ``wav.a.b.Name`` is a module, or a name that a module defines."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        base = PROJECT.joinpath(*parts[:length])
        module = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if module.is_file():
            rest = ".".join(parts[length:])
            return not rest or rest in defined(module)
    return False


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (PROJECT / page).parent / file if file else PROJECT / page
        assert path.exists(), f"{page}: link to {target}, which does not exist"
        if anchor and path.suffix == ".md":
            assert anchor in heading_names(path.read_text()), f"{page}: {path.name} has no heading for #{anchor}"


@pytest.mark.parametrize("page", CURRENT)
def test_named_paths_and_modules_exist(page: str) -> None:
    text = read(page)
    for path in re.findall(rf"(?<![\w/.~-])((?:{'|'.join(ROOMS)})/[\w./-]*\w)(?![\w*])", code(text)):
        if "NAME" in path:
            continue
        assert (PROJECT / path).exists(), f"{page}: names {path}, which does not exist"
    for dotted in re.findall(r"(?<![\w/.-])(wav(?:\.\w+)+)(?![\w*-])", code(text)):
        assert is_known(dotted), f"{page}: names {dotted}, which is neither a module nor a name of one"


@pytest.mark.parametrize("page", CURRENT)
def test_named_presets_and_make_targets_exist(page: str) -> None:
    presets = {p.stem for p in (PROJECT / "presets").glob("*.yaml")}
    targets = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), flags=re.M))
    for name in re.findall(r"PRESET=([\w-]+)", read(page)):
        assert name in presets | {"name", "NAME", "x"}, f"{page}: PRESET={name}, no such file in presets/"
    for name in re.findall(r"presets/([\w-]+)\.yaml", read(page)):
        assert name in presets | {"NAME"}, f"{page}: presets/{name}.yaml, which does not exist"
    for line in re.findall(r"(?:^|[;&|] *)make ((?: *[a-z][a-z-]*(?![\w=./-]))+)", code(read(page)), flags=re.M):
        for name in line.split():
            assert name in targets, f"{page}: make {name}, which is no target"


@pytest.mark.parametrize("page", CURRENT)
def test_named_parameters_exist(page: str) -> None:
    sections = yaml.safe_load(read("params.yaml"))
    for section, field in re.findall(rf"(?<![\w/.])({'|'.join(sections)})\.([a-z_]+)(?![\w(/])", code(read(page))):
        assert field in {*sections[section], "py", "json"}, (
            f"{page}: {section}.{field}, which params.yaml does not have"
        )


def test_named_environment_variables_are_read_somewhere() -> None:
    files = [p for room in ("wav", "flows", "infra", "tests", "benchmarks") for p in (PROJECT / room).rglob("*.py")]
    known = set(re.findall(r"WAV_[A-Z][A-Z0-9_]*", "".join(p.read_text() for p in [*files, PROJECT / "Makefile"])))
    runtime = {f"WAV_{name.upper()}" for name in Runtime.model_fields}
    for page in CURRENT:
        for name in re.findall(r"WAV_[A-Z][A-Z0-9_]*", read(page)):
            assert name in known | runtime, f"{page}: {name}, which nothing reads"


def test_named_commands_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for page in PAGES:
        for line in re.findall(r"^(?:\s*|.*&& )wav ([a-z].*)$", code(read(page)), flags=re.M):
            words, command = shlex.split(line), get_command(app)
            try:
                while hasattr(command, "commands"):
                    command = command.commands[words.pop(0)]
                command.make_context("wav", words)  # reads the command line, runs nothing
            except Exception as error:
                pytest.fail(f"{page}: wav {line}: {error}")


def test_no_file_names_a_place_on_one_machine() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    pattern = re.compile("|".join([r"(?<![\w.])/" + r"work/", r"/home/" + r"\w", r"\.\./" + "shared"]))
    for name in files.split():
        path = PROJECT / name
        if path.suffix in {".png", ".html", ".gz", ".safetensors", ".npz"} or not path.is_file():
            continue
        for line in path.read_text(errors="replace").splitlines():
            assert not pattern.search(line), f"{name}: names a place on one machine: {line.strip()[:100]}"


def test_nothing_advises_what_destroys() -> None:
    """``dvc gc`` in one folder empties the cache of the others; a message once named it as the way to free the disk."""
    advised = {}
    for folder in ("wav", "flows", "infra"):
        for path in (PROJECT / folder).rglob("*.py"):
            if "dvc gc" in path.read_text():
                advised[path.name] = "dvc gc"
    assert not advised
    assert "Do not run `dvc gc`" in read("docs/operations.md")


def test_papers_agree_with_the_package() -> None:
    package = tomllib.loads(read("pyproject.toml"))["project"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["license"] == package["license"] == "Apache-2.0"
    assert "Apache License" in read(package["license-files"][0])
    assert citation["version"] == wav.__version__
    assert f"## {wav.__version__} " in read("CHANGELOG.md")
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2604.14732"


def test_the_workflow_runs_what_the_project_runs() -> None:
    sys.path.insert(0, str(PROJECT / "infra" / "local"))
    try:
        from system import missing_packages
    finally:
        sys.path.pop(0)
    steps = [s["run"] for s in yaml.safe_load(read(".github/workflows/ci.yaml"))["jobs"]["test"]["steps"] if "run" in s]
    assert steps[-1] == ".ci/run"
    assert (PROJECT / ".ci" / "run").is_file()
    for package in missing_packages("egl", loads=lambda library: False):
        assert package in steps[0], f"ci.yaml does not install {package}, which infra/local/system.py asks for"


FACTS = re.findall(r"^\|.*\| `(tests/[\w/]+\.py)(?:::(\w+))?` \|$", read("docs/facts.md"), flags=re.M)


def test_every_fact_is_held_by_a_test_that_exists() -> None:
    rows = [line for line in read("docs/facts.md").splitlines() if re.match(r"\| (?!program)\w", line)]
    assert len(rows) == len(FACTS) > 0
    for file, name in FACTS:
        assert not name or f"def {name}(" in read(file), f"docs/facts.md: {file} has no test {name}"


@pytest.mark.parametrize("script", sorted((PROJECT / "findings").glob("*.sh")), ids=lambda script: script.stem)
def test_a_finding_states_what_it_shows_and_runs_without_our_code(script: Path) -> None:
    text = script.read_text()
    head = text.split("\nset -euo pipefail\n")[0]
    assert re.match(r"#!/usr/bin/env bash\n# .*\d+\.\d+", head), "the second line names program and version"
    for word in ("Guess", "Seen", "Met by"):
        assert f"\n# {word}: " in head, word
    packages = [word for line in re.findall(r"pip\" install -q (.*)", text) for word in line.split()]
    assert packages
    assert all("==" in word for word in packages), packages
    assert not re.search(r"\b(?:import|from) (?:wav|flows|tests)\b", text)
    assert "assert " in text
    assert f"findings/{script.name}" in read("docs/facts.md")
    assert script.stat().st_mode & 0o111
