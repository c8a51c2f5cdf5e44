"""The retrain's checkout: own branch, dirt refused, own results kept, only dvc.lock and metrics committed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.checkout import NO_SECRET, Checkout, without_secret
from flows.retrain import retrain
from wav.errors import ConfigError, ServiceError, StorageError, WavError
from wav.stages import STAGES

PROJECT = Path(__file__).resolve().parents[1]
DVC = """
stages:
  train:
    cmd: "true"
    outs: [{models/x: {persist: true}}, {reports/stages/train.json: {cache: false}}]
    metrics: [{reports/metrics.json: {cache: false}}]
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    (folder / "dvc.yaml").write_text(DVC)
    (folder / ".dvc" / "config").write_text("[core]\n    remote = local\n")
    (folder / ".gitignore").write_text("/models/\nconfig.local\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.fixture
def checkout(project: Path, tmp_path: Path) -> Checkout:
    return Checkout(project, tmp_path / "checkout", dict(os.environ), lambda line: None)


def results(folder: Path, text: str) -> None:
    for name in ("dvc.lock", "reports/metrics.json", "reports/stages/train.json", "models/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_only_the_lock_and_metrics_are_committed_on_a_branch_of_the_day(checkout: Checkout, project: Path) -> None:
    assert checkout.prepare("HEAD", "2026-01-04") == "retrain/2026-01-04"
    checkout.configure_dvc("http://127.0.0.1:1")
    results(checkout.folder, "1")
    assert checkout.commit("first retrain")
    changed = git(checkout.folder, "diff", "--name-only", "main", "retrain/2026-01-04").splitlines()
    assert sorted(changed) == ["dvc.lock", "reports/metrics.json", "reports/stages/train.json"]
    assert checkout.commit("again") == "", "nothing changed: no commit"
    assert git(project, "branch", "--list", "retrain/*") == "", "the project's repository is not touched"
    assert "secret" not in (checkout.folder / ".dvc" / "config.local").read_text()


def test_the_next_retrain_has_the_results_and_the_new_code(checkout: Checkout, project: Path) -> None:
    checkout.prepare("HEAD", "2026-01-04")
    results(checkout.folder, "1")
    checkout.commit("first retrain")
    results(checkout.folder, "half a retrain that failed")
    (project / "code.py").write_text("x = 1\n")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "second")
    assert checkout.prepare("HEAD", "2026-01-11") == "retrain/2026-01-11"
    assert (checkout.folder / "code.py").is_file()
    assert (checkout.folder / "dvc.lock").read_text() == "half a retrain that failed"
    assert checkout.dirt() == []


def test_two_retrains_of_a_day_keep_each_others_commits(checkout: Checkout, project: Path) -> None:
    checkout.prepare("HEAD", "2026-01-04")
    results(checkout.folder, "1")
    first = checkout.commit("first")
    assert checkout.prepare("HEAD", "2026-01-04") == "retrain/2026-01-04"
    assert git(checkout.folder, "rev-parse", "HEAD") == first, "the same base: the branch grows"
    git(project, "commit", "-qm", "more", "--allow-empty")
    assert checkout.prepare("main", "2026-01-04") == "retrain/2026-01-04-2"
    assert git(checkout.folder, "rev-parse", "retrain/2026-01-04") == first


def test_an_older_base_does_not_get_the_newer_code_of_todays_branch(checkout: Checkout, project: Path) -> None:
    (project / "code.py").write_text("x = 1\n")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "second")
    checkout.prepare("HEAD", "2026-01-04")
    results(checkout.folder, "1")
    checkout.commit("first retrain")
    assert checkout.prepare("HEAD~1", "2026-01-04") == "retrain/2026-01-04-2"
    assert not (checkout.folder / "code.py").exists()
    assert checkout.prepare("HEAD", "2026-01-04") == "retrain/2026-01-04"


def test_a_dirty_checkout_is_refused(checkout: Checkout) -> None:
    checkout.prepare("HEAD", "2026-01-04")
    (checkout.folder / "dvc.yaml").write_text(DVC + "# edited\n")
    with pytest.raises(ConfigError, match=r"checkout: dvc\.yaml and 0 more files differ"):
        checkout.prepare("HEAD", "2026-01-11")
    git(checkout.folder, "checkout", "-q", "dvc.yaml")
    (checkout.folder / "notes.txt").write_text("?")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        checkout.prepare("HEAD", "2026-01-11")


def test_what_a_killed_stage_left_is_no_dirt(tmp_path: Path) -> None:
    """Outputs are assembled beside their final names: a SIGKILL there must not stop every retrain that follows."""
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text((PROJECT / ".gitignore").read_text())
    git(tmp_path, "add", ".gitignore")
    for stage in STAGES.values():
        for path in map(Path, (*stage.made, stage.code)):
            for part in (f".{path.name}.tmp-7", f".{path.name}.tmp-old-7"):
                left = tmp_path / path.parent / part / "file"
                left.parent.mkdir(parents=True, exist_ok=True)
                left.write_text("half")
    assert git(tmp_path, "ls-files", "--others", "--exclude-standard") == ""


def test_an_unknown_base_and_a_busy_checkout_are_named(checkout: Checkout) -> None:
    with pytest.raises(ServiceError, match="rev-parse"):
        checkout.prepare("no-such-branch", "2026-01-04")
    with checkout.locked(), pytest.raises(ServiceError, match="another retrain"), checkout.locked():
        pass


@pytest.mark.integration
def test_commands_run_in_the_checkout_and_end_with_it(checkout: Checkout, tmp_path: Path) -> None:
    checkout.prepare("HEAD", "2026-01-04")
    said: list[str] = []
    checkout.follow(said.append)
    done = checkout.run("pwd", "/bin/sh", "-c", "pwd; exit 3")
    assert (done.status, said) == (3, [str(checkout.folder)])

    def cancel(line: str) -> None:
        raise KeyboardInterrupt

    checkout.follow(cancel)
    began, alive = time.monotonic(), tmp_path / "alive"
    with pytest.raises(KeyboardInterrupt):
        checkout.run("sleep", "/bin/sh", "-c", f"(sleep 6; touch {alive}) & echo started; wait")
    assert time.monotonic() - began < 5
    time.sleep(max(0.0, 6.5 - (time.monotonic() - began)))
    assert not alive.exists(), "a grandchild outlived the command"


def test_the_lock_of_a_killed_dvc_is_removed_although_its_pid_lives_on(checkout: Checkout) -> None:
    """After a reboot another process has the pid that DVC wrote down."""
    path = checkout.folder / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    for command, kept in (["sleep", "60"], False), ([sys.executable, "-c", "import time; time.sleep(60)", "dvc"], True):
        with subprocess.Popen(command) as process:
            path.write_text(json.dumps({"read": {"x": [{"pid": process.pid, "cmd": "dvc repro"}]}, "write": {}}))
            with checkout.locked():
                assert path.exists() == kept
            process.kill()


@pytest.mark.parametrize(
    ("address", "taken"),
    [
        ("", True),
        ("origin", True),
        ("https://host/a/b.git", True),
        ("git@host:a/b.git", True),
        ("ssh://git@host:22/a", True),
        ("/srv/a@b:c/d.git", True),
        ("https://user:secret@host/a", False),
        ("https://secret@host/a", False),
        ("ssh://git:secret@host/a", False),
        ("../a@b", True),
        ("file:///srv/a", True),
        (" https://user:secret@host/a", False),
        ("HTTPS://secret@host/a", False),
        ("git+https://user:secret@host/a", False),
        ("https::https://user:secret@host/a", False),
        ("https://user:secret/a@host/a", False),
        ("ftp://secret@host/a", False),
        ("user:secret@host:a", False),
        ("https://host/a?private_token=secret", False),
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(address: str, taken: bool) -> None:
    """By Prefect's server too, before a run with it is in the database."""
    assert retrain.parameters.properties["push_to"]["pattern"] == NO_SECRET
    assert bool(re.search(NO_SECRET, address)) is taken
    if taken:
        without_secret(address, "push_to")
        return
    with pytest.raises(ConfigError, match="push_to: holds a password") as found:
        without_secret(address, "push_to")
    assert "secret" not in str(found.value)


def test_what_git_says_of_a_remote_hides_its_password(checkout: Checkout, project: Path) -> None:
    checkout.prepare("HEAD", "2026-01-01")
    with pytest.raises(ServiceError, match=r"https://\*\*\*@") as found:
        checkout.git("push", "--quiet", "https://user:secret@127.0.0.1:9/x", "main")
    assert "secret" not in str(found.value)


def test_the_project_itself_is_no_checkout(project: Path) -> None:
    with pytest.raises(ConfigError, match="is the project"):
        Checkout(project, project, dict(os.environ), lambda line: None).prepare("HEAD", "2026-01-01")
    assert git(project, "branch", "--show-current") == "main"


@pytest.mark.parametrize("kind", [ConfigError, ServiceError, StorageError])
def test_no_message_repeats_what_stands_before_the_host_of_an_address(kind: type[WavError]) -> None:
    error = kind("Prefect server at https://user:se@cret@host/api and s3://bucket/a@b: not up")
    assert str(error) == "Prefect server at https://***@host/api and s3://bucket/a@b: not up"
    assert "cret" not in repr(error)
