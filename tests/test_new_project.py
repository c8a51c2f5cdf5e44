"""``wav init``: a project outside the repository has what the stages need, and the stages see its own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_processes import gone
from wav import cli
from wav.config import load_settings
from wav.local import local_folder, project_folder
from wav.local.workspace import make_workspace
from wav.stages import STAGES, dvc_yaml

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
INGEST = """
from pathlib import Path
from wav.config import load_settings
from wav.ingest import ingest
settings = load_settings("presets/own.yaml")
report = ingest(settings.data, settings.ingest, Path("store"), workers=2)
assert (report.episodes, report.rejected) == (3, 0), report
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("WAV_LOCAL_DIR", raising=False)
    folder = tmp_path / "my-project"
    assert cli.main(["init", str(folder)]) == 0
    monkeypatch.chdir(folder)
    return folder


def python(folder: Path, *arguments: str) -> None:
    """Run the installed package in the project, as a stage's command does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_project_has_its_own_parameters_presets_and_services(project: Path) -> None:
    assert project_folder() == project
    assert local_folder() == project / ".local"
    assert (project / "dvc.yaml").read_text() == dvc_yaml()
    assert load_settings("params.yaml") == load_settings(ROOT / "params.yaml")
    assert load_settings("presets/smoke.yaml") == load_settings(ROOT / "presets/smoke.yaml")
    assert not any(path.is_symlink() for path in project.rglob("*"))


def test_a_preset_gets_a_workspace_there_that_runs_the_installed_package(project: Path) -> None:
    folder = make_workspace("smoke")
    assert folder == project / "workspaces" / "smoke"
    assert not (folder / "wav").exists()
    python(folder, "-m", "wav.stages", "code")
    written = {path.stem for path in (folder / "reports" / "code").glob("*.json")}
    assert written == set(STAGES)
    assert "deps" not in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]["code"]


def test_the_example_reader_ingests_its_example_and_an_edit_of_it_is_seen(project: Path) -> None:
    python(project, "reader.py", "demonstrations")
    python(project, "-c", INGEST)
    (project / "params.yaml").write_text("ingest: {source: 'reader:NpzSource'}\n")
    digests = []
    for line in ("", "\nMORE = 1\n"):
        (project / "reader.py").write_text((project / "reader.py").read_text() + line)
        python(project, "-m", "wav.stages", "code")
        digests.append(json.loads((project / "reports/code/ingest.json").read_text())["reader.py"])
    assert digests[0] != digests[1]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert cli.main(["init", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_reader_that_is_not_there_is_named(project: Path) -> None:
    from wav.data.sources import open_source

    (project / "presets/own.yaml").write_text("ingest: {source: 'nowhere:Reader', path: x}\n")
    settings = load_settings("presets/own.yaml")
    with pytest.raises(ValueError, match=r"ingest\.source = 'nowhere:Reader': No module named"):
        open_source(settings.data, settings.ingest)


def test_dvc_ends_with_the_repro_that_started_it(tmp_path: Path) -> None:
    """Terminated, as by ``timeout`` or a service, which asks it alone; ``dvc`` is a module that tells its pid."""
    (tmp_path / "dvc.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    code = "import sys; from pathlib import Path; from wav.local.workspace import repro; repro(Path(sys.argv[1]), [])"
    started = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    started.terminate()
    started.wait()
    assert gone(pid)
