"""Retrain's steps one by one: whom the champion is compared with, who wins, and where the branch goes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest
from prefect.logging import disable_run_logger

from flows import artifacts, retrain
from flows.checkout import Checkout, Finished
from flows.retrain import Retrain
from wav import promotion
from wav.config import Runtime, load_settings
from wav.errors import TrainingError
from wav.evaluation.records import EpisodeRecord, write_record
from wav.io.storage import open_store
from wav.promotion import Champion, Verdict
from wav.stages import dvc_yaml

SETTINGS = load_settings(Path(__file__).resolve().parents[1] / "presets" / "smoke.yaml")
OLD = {"lift_red_cube/000": True, "lift_red_cube/001": False}


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No server: nothing is published, loggers need no run."""
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda *_, **__: None)
    with disable_run_logger():
        yield


class Elsewhere(Checkout):
    """A checkout whose commands are functions of the test."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder, dict(os.environ), lambda line: None)
        self.asked: list[tuple[str, ...]] = []
        self.answer: Callable[[tuple[str, ...]], Finished] = lambda arguments: Finished(0, ())

    def python(self, name: str, *arguments: str) -> Finished:
        self.asked.append(arguments)
        return self.answer(arguments)


def make_export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"champion's weights")
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Retrain:
    """A retrain that meets a champion, which was evaluated under identity ``e1``."""
    store = open_store((tmp_path / "store").as_uri())
    files = promotion.upload_policy(store, make_export(tmp_path / "old"), "policies/p1/export")
    champion = Champion("p1", "c1", "e1", OLD, files, "abc", "run", "2026-01-01T00:00:00+00:00")
    promotion.promote(store, "tabletop", champion, None)
    (tmp_path / "runs").mkdir()
    return Retrain(
        checkout=Elsewhere(tmp_path),
        store=store,
        runtime=Runtime(store=store.url),
        folder=tmp_path / "runs",
        flow_run="7",
        name="tabletop",
        current=promotion.read_champion(store, "tabletop"),
    )


def record(**given: Any) -> EpisodeRecord:
    """A record with these values and empty ones elsewhere."""
    hints = get_type_hints(EpisodeRecord)
    empty = {field.name: (get_origin(hints[field.name]) or hints[field.name])() for field in fields(EpisodeRecord)}
    return EpisodeRecord(**{**empty, **given})


def evaluated(arguments: tuple[str, ...]) -> Finished:
    """What the evaluation of the champion does: read its export, leave records."""
    given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert (Path(given["--checkpoint"]) / "weights").read_bytes() == b"champion's weights"
    for index, success in enumerate((False, True)):
        path = Path(given["--out"]) / "reports/eval/episodes/planned" / f"lift_red_cube-{index:03d}.json"
        write_record(path, record(task="lift_red_cube", init_index=index, success=success))
    return Finished(0, ("done",))


def test_an_unchanged_evaluation_needs_no_new_episodes(run: Retrain) -> None:
    assert retrain.champion_outcomes.fn(run, SETTINGS, "e1", "planned") == OLD
    assert run.checkout.asked == []  # type: ignore[attr-defined]


def test_the_champion_is_evaluated_again_when_the_evaluation_changed(run: Retrain) -> None:
    """By the checkout's code, on the champion's own files from the store, on the suite's tasks."""
    run.checkout.answer = evaluated  # type: ignore[attr-defined]
    found = retrain.champion_outcomes.fn(run, SETTINGS, "e2", "planned")
    assert found == {"lift_red_cube/000": False, "lift_red_cube/001": True}
    (arguments,) = run.checkout.asked  # type: ignore[attr-defined]
    assert arguments[:2] == ("-m", "flows.eval_run")
    assert [b for a, b in itertools.pairwise(arguments) if a == "--task"] == list(SETTINGS.data.tasks)
    assert arguments[arguments.index("--variant") + 1] == "planned"


def test_what_the_champion_reached_under_the_new_evaluation_is_kept(run: Retrain, tmp_path: Path) -> None:
    """The next retrain need not evaluate it again, and a candidate that is better still wins."""
    run.checkout.answer = evaluated  # type: ignore[attr-defined]
    found = retrain.champion_outcomes.fn(run, SETTINGS, "e2", "planned")
    kept = promotion.read_champion(run.store, "tabletop")
    assert kept is not None
    assert kept == run.current
    assert (kept[0].policy, kept[0].evaluation, kept[0].outcomes) == ("p1", "e2", found)
    assert retrain.champion_outcomes.fn(run, SETTINGS, "e2", "planned") == found
    assert len(run.checkout.asked) == 1  # type: ignore[attr-defined]
    winner = replace(kept[0], policy="p2", files=())
    assert retrain.promote.fn(run, winner, Verdict(True, "not worse"), tmp_path / "old", tmp_path / "none").promote


def test_a_champion_that_changed_while_the_old_one_was_evaluated_stays(run: Retrain, tmp_path: Path) -> None:
    assert run.current is not None
    other = replace(run.current[0], policy="p9", files=())

    def overtaken(arguments: tuple[str, ...]) -> Finished:
        assert run.current is not None
        assert promotion.promote(run.store, "tabletop", other, run.current[1])
        return evaluated(arguments)

    run.checkout.answer = overtaken  # type: ignore[attr-defined]
    retrain.champion_outcomes.fn(run, SETTINGS, "e2", "planned")
    candidate = replace(run.current[0], policy="p2", files=())
    told = retrain.promote.fn(run, candidate, Verdict(True, "not worse"), tmp_path / "old", tmp_path / "none")
    assert not told.promote
    assert "another retrain changed the champion meanwhile" in told.reason
    champion = promotion.read_champion(run.store, "tabletop")
    assert champion is not None
    assert champion[0] == other


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


def test_a_champion_that_cannot_be_evaluated_stays_and_the_way_out_is_named(run: Retrain) -> None:
    run.checkout.answer = lambda arguments: Finished(1, ("export: format 0 is too old",))  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match=r"format 0 is too old; it stays; .*delete .*champions/tabletop.json"):
        retrain.champion_outcomes.fn(run, SETTINGS, "e2", "planned")
    assert promotion.read_champion(run.store, "tabletop") == run.current


def test_of_two_retrains_that_met_the_same_champion_one_wins(run: Retrain, tmp_path: Path) -> None:
    verdict, lock = Verdict(True, "not worse"), tmp_path / "dvc.lock"
    lock.write_text("stages: {}")
    assert run.current is not None
    first, second = (replace(run.current[0], policy=name, files=()) for name in ("p2", "p3"))
    told = [retrain.promote.fn(run, one, verdict, tmp_path / "old", lock) for one in (first, second)]
    assert [one.promote for one in told] == [True, False]
    assert "another retrain changed the champion meanwhile" in told[1].reason
    champion = promotion.read_champion(run.store, "tabletop")
    assert champion is not None
    assert (champion[0].policy, champion[0].lock) == ("p2", "policies/p2/dvc.lock")
    assert {entry.path for entry in champion[0].files} == {"weights", "manifest.json"}


def test_a_policy_that_may_be_worse_changes_nothing(run: Retrain, tmp_path: Path) -> None:
    assert run.current is not None
    verdict = Verdict(False, "may be worse")
    assert retrain.promote.fn(run, run.current[0], verdict, tmp_path / "old", tmp_path / "none") == verdict
    assert promotion.read_champion(run.store, "tabletop") == run.current


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
