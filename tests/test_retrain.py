"""Retrain against real Prefect and S3 servers, with a pipeline of one cheap stage: first, unchanged, worse, failing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from tests.free_ports import find_free
from tests.helpers.local_services import prefect_client
from wav.config import load_preset, parameter_text
from wav.io.storage import open_store
from wav.local import read_env
from wav.promotion import Champion, read_champion

PROJECT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.long

#: an "export" whose success rate and failure stand in rate.txt
STAGE = """
import json, pathlib, sys
rate = pathlib.Path("rate.txt").read_text().strip()
if rate == "fail":
    sys.exit("the disk caught fire")
from dataclasses import asdict
from wav.evaluation.records import EpisodeRecord, write_record
solved = int(rate)
for i in range(20):
    record = EpisodeRecord("k", "tabletop", "lift_red_cube", i, 7, "planned", "lift_red_cube", "lift", i < solved,
        {"lift_red_cube": i < solved}, 5, 9, 1, [], {}, "d", 0.1, 1, {}, rate, "s", {}, "fast", "protocol",
        5, [8, 0], {}, "code", [], 9)
    write_record(pathlib.Path(f"reports/eval/episodes/planned/lift_red_cube-{i:03d}.json"), record)
out = pathlib.Path("export"); out.mkdir(exist_ok=True)
rated = {"success_rate": solved / 20, "episodes": 20, "wilson_low": 0.0, "wilson_high": 1.0, "tasks": {}}
metrics = {"suite": "tabletop", "planned": rated}
pathlib.Path("reports/eval/metrics.json").write_text(json.dumps(metrics))
(out / "settings.json").write_text(json.dumps({"data": {}, "model": {}, "planner": {}, "export": {}}))
(out / "manifest.json").write_text(json.dumps({"checkpoint": {"digest": rate}, "dtype": "float32"}))
"""
DVC = """
stages:
  export:
    cmd: python stage.py
    deps: [stage.py, rate.txt]
    outs:
      - export
      - reports/eval/episodes
    metrics:
      - reports/eval/metrics.json: {cache: false}
"""
IGNORED = [
    "/export/",
    "/reports/eval/episodes/",
    "/.wav/",
    "/runs/",
    "config.local",
    "/.dvc/cache",
    "/.dvc/tmp",
    "*.pyc",
]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@dataclass
class Site:
    """A project with its servers."""

    folder: Path
    environment: dict[str, str]

    def retrain(self) -> tuple[int, str, float]:
        """Status, output and seconds of one retrain."""
        began = time.monotonic()
        command = [sys.executable, "-m", "flows.retrain"]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        return done.returncode, done.stdout + done.stderr, time.monotonic() - began

    def rate(self, text: str) -> None:
        """Commit another outcome of the pipeline."""
        (self.folder / "rate.txt").write_text(text + "\n")
        git(self.folder, "commit", "-qam", f"rate {text}")

    def champion(self, monkeypatch: pytest.MonkeyPatch) -> Champion:
        """The current champion."""
        values = read_env(Path(self.environment["WAV_LOCAL_DIR"]) / "credentials.env")
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        endpoint = read_env(Path(self.environment["WAV_LOCAL_DIR"]) / "env")["WAV_S3_ENDPOINT"]
        found = read_champion(open_store("s3://wav", endpoint), "tabletop")
        assert found is not None
        return found[0]

    def shown(self, name: str) -> str:
        """What the newest retrain shows in the UI under a name."""
        with prefect_client(self.environment) as client:
            key = ArtifactFilterKey(any_=[f"retrain-{name}"])
            found = client.read_artifacts(artifact_filter=ArtifactFilter(key=key), sort=ArtifactSort.CREATED_DESC)
        return str(found[0].data)

    def holding_keys(self) -> list[Path]:
        """Files that hold an access key of the store: none but the ones that ``make up`` made for that."""
        folders = [self.folder, Path(self.environment["WAV_LOCAL_DIR"])]
        keys = [value.encode() for value in read_env(folders[1] / "credentials.env").values()]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert any(path.name == "prefect.db" for path in files)
        return [path for path in files if any(key in path.read_bytes() for key in keys)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("retrain")
    folder = root / "project"
    (folder / ".dvc").mkdir(parents=True)
    for name, text in {
        "stage.py": STAGE,
        "rate.txt": "10\n",
        "dvc.yaml": DVC,
        "params.yaml": parameter_text(load_preset("smoke")),
        ".dvc/config": (PROJECT / ".dvc" / "config").read_text(),
        ".gitignore": "\n".join(IGNORED) + "\n",
        ".dvcignore": (PROJECT / ".dvcignore").read_text(),
    }.items():
        (folder / name).write_text(text)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "project")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "WAV_", "GIT_"))}
    environment |= find_free() | {"WAV_LOCAL_DIR": str(root / "local"), "PYTHONPATH": str(PROJECT)}

    def services(command: str) -> None:
        argv = [sys.executable, "-m", "wav.local.services", command]
        subprocess.run(argv, cwd=PROJECT, env=environment, check=True, capture_output=True)

    services("up")
    try:
        yield Site(folder, environment)
    finally:
        services("down")


def test_retrain_first_unchanged_worse_failing_better(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One story, because each retrain meets the champion that the one before left."""
    code, text, _ = site.retrain()
    assert code == 0, text[-4000:]
    assert "promoted: there was no champion" in text
    first = site.champion(monkeypatch)
    assert first.checkpoint == "10"
    assert first.rate == 0.5
    clone = site.folder / ".wav" / "retrain"
    assert re.fullmatch(r"retrain/\d{4}-\d\d-\d\d", git(clone, "branch", "--show-current"))
    changed = git(clone, "diff", "--name-only", "HEAD~1", "HEAD").splitlines()
    assert sorted(changed) == ["dvc.lock", "reports/eval/metrics.json"]
    assert git(clone, "status", "--porcelain") == ""
    assert git(site.folder, "status", "--porcelain") == "", "the project's folder is only read"

    code, text, seconds = site.retrain()
    assert code == 0, text[-4000:]
    assert "not promoted: nothing changed" in text
    assert "Running stage" not in text
    assert seconds < 60
    assert site.shown("verdict").startswith("**not promoted**: nothing changed")
    assert first.policy[:12] in site.shown("parameters")
    assert "dvc-repro.log" in site.shown("objects")

    site.rate("4")
    code, text, _ = site.retrain()
    assert code == 0, text[-4000:]
    assert "not promoted: may be worse than the champion: difference -0.300" in text
    assert site.champion(monkeypatch) == first

    site.rate("fail")
    code, text, _ = site.retrain()
    assert code == 1
    last = text.strip().splitlines()[-1]
    assert "stage export failed: the disk caught fire" in last
    assert f"champion tabletop ({first.policy[:12]}) stays" in last
    assert "dvc-repro.log" in last
    assert "/runs/flow-run/" in last
    assert site.champion(monkeypatch) == first

    site.rate("15")
    code, text, _ = site.retrain()
    assert code == 0, text[-4000:]
    assert "promoted: not worse than the champion: difference +0.250" in text
    better = site.champion(monkeypatch)
    assert (better.checkpoint, better.previous) == ("15", first.policy)
    assert json.loads((clone / "reports/eval/metrics.json").read_text())["planned"]["success_rate"] == 0.75

    shutil.rmtree(site.folder / ".wav")  # the server is lost: only the project's code and the store are left
    shutil.rmtree(site.folder / ".dvc" / "cache")
    code, text, _ = site.retrain()
    assert code == 0, text[-4000:]
    assert "not promoted: nothing changed" in text
    assert "Running stage" not in text, "what can be fetched is not computed again"
    assert site.champion(monkeypatch) == better
    assert site.holding_keys() == [Path(site.environment["WAV_LOCAL_DIR"]) / "credentials.env"]

    (clone / "stage.py").write_text("# somebody's edit\n")
    code, text, _ = site.retrain()
    assert code == 1
    assert "stage.py and 0 more files differ from git" in text.strip().splitlines()[-1]
