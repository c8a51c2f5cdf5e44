"""The bare name of ``prefect deployment run NAME``: completed there, untouched everywhere else, and it fails open."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from prefect.plugins import HookContext, SetupResult

from flows.retrain import DATA_STAGES
from wav import prefect_plugin
from wav.stages import STAGES

PROJECT = Path(__file__).resolve().parents[1]
CONTEXT = HookContext(prefect_version="3", api_url=None, logger_factory=logging.getLogger)


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("prefect deployment run eval-libero", 3),
        ("/venv/bin/prefect deployment run eval-libero/eval-libero --watch", 3),
        ("prefect --no-prompt --profile x deployment run --param a=1 --watch -t=x eval-libero", 10),
        ("/x/prefect/__main__.py deployment run eval-libero", 3),
        ("prefect --no-prompt --profile x deployment run --empty-param eval-libero", 7),
        ("prefect deployment run --id 7", None),
        ("prefect deployment run", None),
        ("prefect deployment ls", None),
        ("prefect deployment inspect eval-libero", None),
        ("prefect flow-run ls", None),
        ("pytest deployment run eval-libero", None),
        ("", None),
    ],
)
def test_only_that_command_line_is_recognised(line: str, place: int | None) -> None:
    found = prefect_plugin.name_place(line.split())
    assert found == place


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *argv: str) -> tuple[list[str], SetupResult | None]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", list(argv))
    result = prefect_plugin.setup_environment(ctx=CONTEXT)
    return sys.argv, result


def test_a_known_bare_name_is_completed_and_the_local_server_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "env").write_text("PREFECT_API_URL=http://127.0.0.1:1/api\n")
    (tmp_path / "credentials.env").write_text("AWS_SECRET_ACCESS_KEY=x\nPREFECT_API_AUTH_STRING=wav:x\n")
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path))
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    argv, result = call(monkeypatch, PROJECT, "prefect", "deployment", "run", "eval-libero", "--watch")
    assert argv == ["prefect", "deployment", "run", "eval-libero/eval-libero", "--watch"]
    assert result is not None
    assert result.env == {"PREFECT_API_URL": "http://127.0.0.1:1/api", "PREFECT_API_AUTH_STRING": "wav:x"}
    assert call(monkeypatch, PROJECT, "prefect", "flow-run", "ls")[1] == result, "every prefect command"
    assert call(monkeypatch, PROJECT, "pytest", "deployment", "run", "eval-libero")[1] is None
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    assert call(monkeypatch, PROJECT, "prefect", "deployment", "run", "retrain/retrain")[1] is None


def test_unknown_names_and_other_folders_stay_as_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path))
    typed = ["prefect", "deployment", "run", "nonsense"]
    assert call(monkeypatch, PROJECT, *typed) == (typed, None)
    typed[-1] = "eval-libero"
    assert call(monkeypatch, tmp_path, *typed) == (typed, None), "no prefect.yaml: left alone"
    (tmp_path / "prefect.yaml").write_text("deployments: {broken")
    assert call(monkeypatch, tmp_path, *typed) == (typed, None), "a damaged prefect.yaml: left alone"


def test_every_deployment_has_the_name_of_its_flow_and_every_stage_is_one() -> None:
    listed = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    names = {entry["name"] for entry in listed}
    assert names == {row.deployment for row in STAGES.values()} | {"retrain", "retrain-from-cpu"}
    for entry in listed:
        path, function = entry["entrypoint"].split(":")
        made = getattr(import_module(path.removesuffix(".py").replace("/", ".")), function)
        assert made.name == entry["name"].removesuffix("-from-cpu")
        assert entry["work_pool"]["name"] == "wav"
        data = entry["name"] in (*DATA_STAGES, "label-rewards", "retrain-from-cpu")
        assert entry["work_pool"]["work_queue_name"] == ("cpu" if data else "gpu")
        if path == "flows/deployed.py":
            assert set(made.parameters.properties) == {"changes"}


@pytest.mark.integration
def test_prefect_itself_completes_the_name_in_the_project_folder(tmp_path: Path) -> None:
    """The real command, against a server that does not answer: the error comes after the name was taken."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "WAV_"))}
    environment |= {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path)}
    environment |= {"PREFECT_CLIENT_MAX_RETRIES": "0", "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false"}
    script = "import sys; sys.argv=['prefect','deployment','run','eval-libero']; import prefect; print(sys.argv[3])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("eval-libero/eval-libero", "")
    command = [sys.executable, "-m", "prefect", "deployment", "run", "eval-libero"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Invalid deployment name" not in done.stdout + done.stderr
