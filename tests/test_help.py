"""``wav --help``: groups in the order of use, examples that fit in every command's help, completion."""

import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

from wav import cli

#: groups of wav --help
PANELS = ("Begin", "Data", "Parameters", "Pipeline", "Policies", "Evaluation", "Object store")


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def commands(parent=None, first=()):
    """Every command with its words."""
    for name, command in (parent or get_command(cli.app)).commands.items():
        words = (*first, name)
        yield from commands(command, words) if hasattr(command, "commands") else [(words, command)]


def test_help_lists_the_groups_in_the_order_of_use_and_every_command_has_examples_that_fit(capsys):
    assert run(capsys, "--help")[0] == 0
    every = list(commands())
    panels = list(dict.fromkeys(command.rich_help_panel for words, command in every if len(words) == 1))
    assert panels == [p for p in PANELS if p in panels]
    for words, command in every:
        status, out, _ = run(capsys, *words, "--help")
        lines = [line.strip() for line in command.epilog.replace("\\[", "[").splitlines()]
        examples = [line for line in lines if line.startswith("wav ")]
        assert status == 0
        assert examples, words
        assert "\x1b" not in out, "no colours where the output is no terminal"
        for example in examples:
            assert example in " ".join(out.split()), "shown as it is"
            typed = shlex.split(example)[1:]
            assert tuple(typed[: len(words)]) == words
            command.make_context("wav", typed[len(words) :])  # reads the command line, runs nothing


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell):
    """What a shell asks for at TAB, with wav's own completion script."""
    line = {"COMP_WORDS": "wav st", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "wav st"}
    asked = os.environ | line | {"_WAV_COMPLETE": f"complete_{shell}"}
    done = subprocess.run([sys.executable, "-m", "wav.cli"], env=asked, capture_output=True, text=True, check=False)
    assert "storage" in done.stdout
    assert "doctor" not in done.stdout


def test_help_has_colours_on_a_terminal_alone(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color"} | variables).items():
            monkeypatch.setenv(name, value)
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        assert cli.main(["config", "--help"]) == 0
        assert bool(re.search(r"\x1b\[(\d+;)*3\dm", screen.getvalue())) is coloured


def test_a_package_of_an_extra_that_is_missing_is_named(tmp_path):
    code = "import sys; sys.modules['h5py'] = None; from wav.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("wav inspect: h5py: this package is missing; simulators need `pip install")
    assert done.stderr.count("\n") == 1


@pytest.mark.integration
def test_json_is_alone_on_stdout(monkeypatch, capsys, tmp_path):
    (tmp_path / "params.yaml").write_text("model: {layers: 2}\n")
    status, out, err = run(capsys, "summary", tmp_path / "params.yaml", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["stages"]
