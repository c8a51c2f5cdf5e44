"""Examples that stand in docstrings and pages, run as they stand there."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving import message, serving
from tests.helpers.stage_folders import DATA, make_export
from wav.policy.policy import Observation, Policy

PROJECT = Path(__file__).resolve().parents[1]
MODULES = [path for path in sorted((PROJECT / "wav").rglob("*.py")) if "\n    >>> " in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_docstrings(path: Path) -> None:
    name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("examples"), batch_size=1)


def ran(page: str, replaced: dict[str, str], **names: Any) -> dict[str, Any]:
    """A page's one Python example after it was run, with other names for what is elsewhere here."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (PROJECT / page).read_text(), flags=re.M | re.S)
    for old, new in replaced.items():
        assert old in code, page
        code = code.replace(old, new)
    exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.integration
def test_pages_that_act_in_process(exported: Path) -> None:
    seen = message()
    images = dict(zip(DATA.views, (seen["observation/image"], seen["observation/wrist_image"]), strict=True))
    observation = Observation(images, seen["observation/state"], seen["prompt"])
    acted = ran("docs/method.md", {"export": str(exported)}, observation=observation)
    assert acted["actions"].shape == (DATA.action_chunk, DATA.action_dim)
    assert ran("docs/hub.md", {"USER/NAME": str(exported)})["policy"].execute_steps == DATA.action_chunk


@pytest.mark.integration
def test_pages_that_call_a_server(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen = message()
    with serving(Policy.load(exported)) as server:
        here = {"8000": str(server.port)}
        robot = ran("docs/howto/own-robot.md", here, observation=seen)
        assert robot["plan"]["actions"].shape == (DATA.action_chunk, DATA.action_dim)
        parts = {"image": seen["observation/image"], "wrist_image": seen["observation/wrist_image"]}
        ran("clients/wav-client/README.md", here, state=seen["observation/state"], **parts)
        monkeypatch.setattr(sys, "argv", ["robot_loop.py", "lift the red cube"])
        code = (PROJECT / "examples/own_robot/robot_loop.py").read_text().replace("8000", str(server.port))
        exec(compile(code.replace("steps=200", "steps=10"), "robot_loop.py", "exec"), {"__name__": "__main__"})
    assert "Report(steps=10, " in capsys.readouterr().out
