"""Retrain's steps one by one: what a new server goes on from, where the branch goes, what is said of a failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.logging import disable_run_logger
from prefect.states import Completed, Failed, State

from flows import artifacts, retrain
from flows.challenge import Retrain
from flows.checkout import Checkout, Finished
from tests.helpers.retrain import policy, retrain_of
from wav.errors import StorageError, TrainingError
from wav.promotion import Verdict
from wav.stages import dvc_yaml


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No server: nothing is published, loggers need no run."""
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda *_, **__: None)
    with disable_run_logger():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Retrain:
    """A retrain that meets champion p1."""
    return retrain_of(tmp_path, champion=policy("p1", {"lift_red_cube/000": True}))


def test_a_new_server_goes_on_from_the_results_in_the_store(run: Retrain) -> None:
    """With ``dvc.lock`` alone every stage would run again: DVC's remote does not hold its metrics."""
    folder = run.checkout.folder
    (folder / "dvc.yaml").write_text(dvc_yaml())
    retrain.restore_results(run)
    assert not (folder / "dvc.lock").exists(), "the first retrain ever: nothing to go on from"
    names = ("dvc.lock", "reports/ingest/metrics.json", "reports/stages/ingest.json", "models/joint/metrics.json")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    (folder / "reports/other.json").write_text("not a retrain's own")
    retrain.keep_results(run)
    for name in (*names, "reports/other.json"):
        (folder / name).unlink()
    retrain.restore_results(run)
    assert [(folder / name).read_text() for name in names] == [f"{name}\n" for name in names]
    assert not (folder / "reports/other.json").exists()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("configured", [True, False])
def test_the_branch_is_pushed_only_where_configured(run: Retrain, tmp_path: Path, configured: bool) -> None:
    project, remote = tmp_path / "project", tmp_path / "remote.git"
    project.mkdir()
    (project / "dvc.yaml").write_text("stages: {export: {cmd: 'true'}}\n")
    git(project, "init", "-q", "-b", "main")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "project")
    git(tmp_path, "init", "-q", "--bare", str(remote))
    checkout = Checkout(project, tmp_path / "clone", dict(os.environ), lambda line: None)
    checkout.dvc = lambda *arguments: Finished(0, ())  # type: ignore[method-assign]
    run.checkout = checkout
    branch = checkout.prepare("HEAD", "2026-01-04")
    (checkout.folder / "dvc.lock").write_text("stages: {}\n")
    commit = retrain.push.fn(run, branch, "", str(remote) if configured else "")
    assert commit
    refs = git(remote, "for-each-ref", "--format=%(refname) %(objectname)")
    assert refs == (f"refs/heads/retrain/2026-01-04 {commit}" if configured else "")
    assert git(project, "branch", "--list", "retrain/*") == ""
    shutil.rmtree(remote)
    if configured:
        (checkout.folder / "dvc.lock").write_text("stages: {export: {}}\n")
        with pytest.raises(Exception, match=r"git push .*look there by hand"):
            retrain.push.fn(run, branch, "", str(remote))


def test_a_failed_stage_is_named_with_the_places_to_look_at(run: Retrain, tmp_path: Path) -> None:
    lines = ("Running stage 'train_joint':", "loss nan", "ERROR: failed to reproduce 'train_joint': exited with 1")
    told = retrain._failure(run, Finished(1, lines), tmp_path / "dvc-repro.log", "s3://wav/runs/7/dvc-repro.log")
    assert "stage train_joint failed: loss nan; champion tabletop (p1) stays" in told
    for place in ("/runs/flow-run/7", str(tmp_path / "dvc-repro.log"), "s3://wav/runs/7/dvc-repro.log"):
        assert place in told
    json.dumps(told)


@pytest.mark.parametrize("ended", [Completed(), Failed(message="no GPU")])
def test_another_deployment_goes_on_from_the_data_stages(ended: State, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def run_deployment(name: str, parameters: dict[str, object]) -> SimpleNamespace:
        asked.append((name, parameters))
        return SimpleNamespace(id="8", state=ended)

    monkeypatch.setattr(retrain, "run_deployment", run_deployment)
    monkeypatch.setattr(retrain, "flow_run", SimpleNamespace(parameters={"margin": 0.2, "then": "retrain/retrain"}))
    if ended.is_completed():
        assert "/runs/flow-run/8" in retrain.hand_over("retrain/retrain")
    else:
        with pytest.raises(TrainingError, match=r"retrain/retrain ended as Failed; look at .*/runs/flow-run/8"):
            retrain.hand_over("retrain/retrain")
    assert asked == [("retrain/retrain", {"margin": 0.2, "then": ""})]


@pytest.mark.parametrize("failures", [0, 2, 10**6])
def test_a_remote_in_trouble_is_waited_for_and_never_taken_for_empty(
    run: Retrain, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("wav.io.storage.base.time.sleep", waits.append)
    monkeypatch.setattr("wav.io.storage.base.time.monotonic", lambda: sum(waits))
    (run.checkout.folder / "dvc.lock").write_text("stages: {}")
    asked: list[str] = []

    def dvc(*arguments: str) -> Finished:
        asked.append(arguments[0])
        failed = arguments[0] == "fetch" and len(asked) <= failures
        return Finished(1, ("ERROR: failed to connect to s3",)) if failed else Finished(0, ())

    monkeypatch.setattr(run.checkout, "dvc", dvc)
    if failures > 2:
        with pytest.raises(StorageError, match=r"dvc fetch failed: .*connect to s3; champion tabletop \(p1\) stays"):
            retrain.pull.fn(run, "")
        assert "checkout" not in asked
    else:
        retrain.pull.fn(run, "")
        assert asked == ["fetch"] * (failures + 1) + ["checkout"]
    assert len(waits) == len(asked) - 1 - (asked[-1] == "checkout")


def test_files_that_the_remote_lacks_are_made_again(run: Retrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """What DVC 3.67 says where a folder's listing is there and one of its files is not."""
    (run.checkout.folder / "dvc.lock").write_text("stages: {}")
    said = ("ERROR: failed to transfer 'b0' - [Errno 2] No such file or directory: 'b0'", "ERROR: failed to fetch data")
    answers = {"fetch": Finished(1, said), "checkout": Finished(0, ())}
    monkeypatch.setattr(run.checkout, "dvc", lambda *arguments: answers[arguments[0]])
    retrain.pull.fn(run, "")


@pytest.fixture
def whole(run: Retrain, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The flow itself, each of whose steps does nothing; what it removes, and of whom it tells."""
    seen = SimpleNamespace(verdict=Verdict("unchanged", "nothing changed"), removed=[], told=[])
    runtime, project = run.runtime, run.checkout.folder
    monkeypatch.setattr(retrain, "begin_deployed", lambda: (runtime, project, project / "runs" / "7"))
    monkeypatch.setattr(retrain, "publish_numbers", lambda *_: None)
    monkeypatch.setattr(retrain, "publish_markdown", lambda *_: None)
    for name in ("pull", "reproduce"):
        monkeypatch.setattr(retrain, name, lambda *_: None)
    for name in ("check_out", "push"):
        monkeypatch.setattr(retrain, name, lambda *_: "abc")
    monkeypatch.setattr(retrain, "clean_up", retrain.clean_up.fn)
    monkeypatch.setattr(retrain, "challenge", lambda *_: seen.verdict)
    monkeypatch.setattr(retrain, "tell_stale", lambda *given: seen.told.append(given))
    monkeypatch.setattr(retrain, "old_runs", lambda *given: seen.removed.append(given) or iter(()))
    return seen


def test_old_runs_go_whether_or_not_the_retrain_gets_through(
    whole: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TrainingError("stage export failed")

    def refuse(*given: object) -> Iterator[str]:
        whole.removed.append(given)
        raise StorageError("s3://wav/runs/1: AccessDenied")

    monkeypatch.setattr(retrain, "old_runs", refuse)
    assert retrain.retrain.fn() == "nothing changed"
    monkeypatch.setattr(retrain, "reproduce", fail)
    with pytest.raises(TrainingError):
        retrain.retrain.fn(keep_days=30)
    assert [days for _, _, days in whole.removed] == [90, 30]


@pytest.mark.parametrize("kind", ["promoted", "unchanged", "refused"])
def test_a_champion_that_stays_is_asked_for_its_age(whole: SimpleNamespace, run: Retrain, kind: str) -> None:
    """Weeks in which nothing changed make it old as well as weeks of refused candidates do."""
    whole.verdict = Verdict(kind, "so")
    retrain.retrain.fn(stale_days=14)
    assert run.current is not None
    asked = [("tabletop", run.current[0].promoted, 14, "so")]
    assert whole.told == ([] if kind == "promoted" else asked)
