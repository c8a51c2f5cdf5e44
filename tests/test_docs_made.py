"""What of the docs is made from the code says what it says; the README is a report card; the site knows its pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from infra.docs import commands, diagrams, reference, results
from wav import errors
from wav.cli import app
from wav.config import Runtime, Settings

PROJECT = Path(__file__).resolve().parents[1]
DOCS = PROJECT / "docs"


@pytest.mark.parametrize("name", ["architecture.svg", "pipeline.svg"])
def test_pictures_show_the_code_as_it_is(name: str) -> None:
    drawn = diagrams.drawings()[name]
    assert (DOCS / "images" / name).read_text() == drawn, "draw them again: python -m infra.docs.diagrams"


def test_the_readme_quotes_its_json_and_fits_a_screen_or_three() -> None:
    text = (PROJECT / "README.md").read_text()
    assert results.put_in(text) == text, "write the table again: python -m infra.docs.results"
    assert results.table() in text
    assert len(text.splitlines()) <= 150
    assert (DOCS / "images" / "imagined.gif").stat().st_size < 1.5e6


def test_every_parameter_has_a_meaning() -> None:
    said = reference.comments((PROJECT / "params.yaml").read_text())
    empty = [name for name, field in reference.fields(Settings) if not reference.meaning(name, field, said)]
    assert not empty, "say what these are behind their values in params.yaml"


def test_the_parameters_page_has_defaults_limits_and_presets() -> None:
    page = reference.parameters()
    for name, _ in reference.fields(Settings):
        section, _, rest = name.partition(".")
        assert f"| `{rest}` |" in page.split(f"## {section}\n")[1].split("\n## ")[0], name
    assert "libero: `28`" in page
    assert "`cosine`" in page
    assert "at least 1" in page


def test_every_command_has_its_help_examples_and_options() -> None:
    page = commands.command_page()
    for spoken, command in commands.leaves(get_command(app)):
        part = page.split(f"## {spoken}\n")[1].split("\n## ")[0]
        assert " ".join(command.help.split()) in part, spoken
        assert f"```sh\n{spoken}" in part, spoken
    assert "| `--size` | `256` | pixels per side |" in page
    assert "| `--index` | `0` | initial state |" in page


def test_every_environment_variable_has_its_row() -> None:
    page = (DOCS / "reference" / "environment.md").read_text()
    rows = set(re.findall(r"`(WAV_\w+)`", "".join(re.findall(r"^\| (`WAV_.*?) \|", page, flags=re.M))))
    files = [file for room in ("wav", "flows", "infra") for file in (PROJECT / room).rglob("*.py")]
    read = set(re.findall(r"(?<!\w)WAV_[A-Z][A-Z0-9_]*[A-Z](?![A-Z_{])", "".join(file.read_text() for file in files)))
    assert rows == read | {f"WAV_{name.upper()}" for name in Runtime.model_fields}
    for name, field in Runtime.model_fields.items():
        default = "." if name == "workspace" else str(field.default)
        cell = f"`{default}`" if default else ""
        assert re.search(rf"^\| `WAV_{name.upper()}` \| {re.escape(cell)} ?\|", page, flags=re.M), name


def test_every_error_sentence_leads_to_a_page() -> None:
    found, page = reference.errors(), reference.error_page()
    assert sum(len(sentences) for modules in found.values() for sentences in modules.values()) > 600
    for room in found:
        target = reference.EXPLAINED[room][1]
        assert (DOCS / "reference" / target).is_file(), room
    assert "`wav.stages`" in page
    assert "unknown; the stages are" in page
    assert "SOURCE: FIELD: unknown parameter" in page, "an error that a function returns"
    assert "truncated or damaged KIND" in page, "an error that another module raises"
    assert "the server refused the credentials" in page, "a sentence put into another"


def test_every_error_says_what_the_page_shows_or_passes_on_another() -> None:
    passed_on = {"error", "result", "text", "entry", "problem", "message"}
    for path in (file for room in ("wav", "flows", "infra") for file in (PROJECT / room).rglob("*.py")):
        for given, sentences in reference.told(ast.parse(path.read_text())):
            names = {part.id for part in ast.walk(given) if isinstance(part, ast.Name)}
            where = f"{path.relative_to(PROJECT)}:{given.lineno}"
            assert sentences or names & passed_on, f"{where}: what it says is on no page; write it where it is raised"


def test_what_the_api_page_shows_is_there() -> None:
    targets = re.findall(r"^::: ([\w.]+)", (DOCS / "reference" / "api.md").read_text(), flags=re.M)
    assert len(targets) > 20
    for target in targets:
        parts = target.split(".")
        base = PROJECT / ("clients/wav-client" if target.startswith("wav_client") else ".")
        assert any(
            base.joinpath(*parts[:n]).with_suffix(".py").is_file() or base.joinpath(*parts[:n], "__init__.py").is_file()
            for n in (len(parts), len(parts) - 1)
        ), target


@pytest.mark.parametrize("room", ["wav", "flows", "infra", "clients/wav-client"])
def test_what_is_public_is_described_with_the_errors_that_it_raises(room: str) -> None:
    kinds = {kind.__name__ for kind in errors.WavError.__subclasses__()}

    def look(node: ast.Module | ast.ClassDef, outer: str, where: str) -> None:
        for inner in node.body:
            if not isinstance(inner, ast.FunctionDef | ast.ClassDef) or inner.name.startswith("_"):
                continue
            words = ast.get_docstring(inner) or ""
            assert words, f"{where}: {inner.name} has no docstring"
            if isinstance(inner, ast.ClassDef):
                look(inner, words, where)
                continue
            made = [part.exc for part in ast.walk(inner) if isinstance(part, ast.Raise)]
            for name in {getattr(call.func, "id", "") for call in made if isinstance(call, ast.Call)} & kinds:
                assert name in words + outer, f"{where}: {inner.name} raises {name}, which its docstring does not say"

    for path in (PROJECT / room).rglob("*.py"):
        if path.parent.name != "commands":  # whose docstrings are what --help says
            look(ast.parse(path.read_text()), "", str(path.relative_to(PROJECT)))


def test_the_site_knows_every_page() -> None:
    def pages(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for inner in (part.values() if isinstance(part, dict) else part) for page in pages(inner)]  # type: ignore[attr-defined]

    named = pages(yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
