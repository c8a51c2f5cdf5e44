"""Deployment ``retrain``: the whole pipeline in a checkout of its own, then promotion of the policy if it is not worse.

Every week, without anybody watching: a stage that fails leaves the champion in place and says where to look, and the
next retrain goes on from what is finished. A retrain with nothing changed ends within a minute.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from flows.artifacts import Progress, publish_markdown, publish_numbers, publish_objects
from flows.challenge import Retrain, challenge, meet, tell_stages
from flows.checkout import Checkout, Finished, GitAddress, without_secret
from flows.common import begin_deployed, by_hand, step
from flows.housekeeping import old_runs, tell_stale
from flows.provenance import PARENT_VARIABLE, run_url
from wav.config import load_settings
from wav.errors import StorageError, TrainingError, WavError
from wav.io.storage import open_store
from wav.io.storage.base import TransferError, patiently
from wav.io.storage.commit import fetch, publish, remote_manifest, seal
from wav.promotion import Rules
from wav.stages import CODE_STAGE, STAGES, TRAINING

FAILED = re.compile(r"failed to reproduce '([\w@.-]+)'")
STARTED = re.compile(r"Running stage '([\w@.-]+)'")
#: what needs no GPU
DATA_STAGES = tuple(takewhile(lambda name: name not in TRAINING, STAGES))
#: where the store keeps dvc.lock and metrics of the last retrain, by the champion's name
RESULTS = "retrains/{}/results"
#: how long a DVC remote that fails is asked again
REMOTE_PATIENCE_S = 120.0


@step("check out")
def check_out(run: Retrain, base: str) -> str:
    """The branch of today, the DVC configuration, and the last retrain's results where this machine has none."""
    branch = run.checkout.prepare(base, datetime.now(timezone.utc).date().isoformat())
    run.checkout.configure_dvc(run.runtime.s3_endpoint)
    if not (run.checkout.folder / "dvc.lock").is_file():
        restore_results(run)
    return branch


def keep_results(run: Retrain) -> None:
    """What git keeps of a retrain, ``dvc.lock`` and metrics, as one commit in the store: a new server goes on from it.

    DVC's remote holds the rest; without the metrics it would run every stage again, because an output is missing.
    """
    folder = run.folder / "results"
    shutil.rmtree(folder, ignore_errors=True)
    for name in run.checkout.own_files():
        if (run.checkout.folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.checkout.folder / name, folder / name)
    seal(folder, {"run": run.flow_run})
    publish(run.store, folder, RESULTS.format(run.name))


def restore_results(run: Retrain) -> None:
    """The results that the last retrain left in the store, into a checkout that has none."""
    prefix, folder = RESULTS.format(run.name), run.folder / "restored"
    if remote_manifest(run.store, prefix) is None:
        return
    names = {entry.path for entry in fetch(run.store, prefix, folder).files}
    for name in names.intersection(run.checkout.own_files()):
        (run.checkout.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, run.checkout.folder / name)
    get_run_logger().info("no dvc.lock here: going on from %s", run.store.uri(prefix))


@step("pull data")
def pull(run: Retrain, remote: str) -> None:
    """What ``dvc.lock`` names and the remote has; what it lacks is made again.

    Trouble of the remote (TransferError) ends the run: taken for empty, days of training would be repeated.
    """
    if not (run.checkout.folder / "dvc.lock").is_file():
        return
    logger = get_run_logger()

    def fetch_data() -> None:
        done = run.checkout.dvc("fetch", "--run-cache", *(("--remote", remote) if remote else ()))
        if done.status != 0 and not _only_missing(done):
            raise TransferError(
                f"retrain: dvc fetch failed: {done.tail}; {run.champion_name} stays; see to the DVC remote and start "
                "retrain again"
            )

    patiently(fetch_data, logger.warning, REMOTE_PATIENCE_S)
    done = run.checkout.dvc("checkout", "--allow-missing")
    if done.status != 0:
        logger.warning("dvc checkout could not put everything there (%s); the stages make the rest", done.tail)


def _only_missing(done: Finished) -> bool:
    """Whether a fetch failed for want of files alone (DVC counts those whose folder's listing is there)."""
    failed = [line for line in done.lines if "failed to transfer" in line or "failed to connect" in line]
    return bool(failed) and all("[Errno 2]" in line for line in failed)


@step("dvc repro")
def reproduce(run: Retrain, names: Sequence[str] = ()) -> None:
    """All stages that are out of date, or those of these names; TrainingError where one failed."""
    logger = get_run_logger()
    with Progress("stages", logger) as progress:
        order = [CODE_STAGE, *STAGES]

        def say(line: str) -> None:
            logger.info(line)
            if found := STARTED.search(line):
                run.ran.append(found[1])
                progress(order.index(found[1]) if found[1] in order else 0, len(order), found[1])

        run.checkout.follow(say)
        done = run.checkout.dvc("repro", *names)
        run.checkout.follow(logger.info)
    log = run.folder / "dvc-repro.log"
    log.write_text("\n".join(done.lines) + "\n")
    uploaded = run.store.put_file(log, f"runs/{run.flow_run}/dvc-repro.log")
    uri = run.store.uri(uploaded.key)
    publish_objects("objects", [(uri, uploaded.version, uploaded.size)], run.runtime, "what dvc repro said")
    if done.status != 0:
        raise TrainingError(_failure(run, done, log, uri))


def _failure(run: Retrain, done: Finished, log: Path, uri: str) -> str:
    """One sentence: which stage failed, what stays, where to look."""
    named = [found[1] for line in done.lines if (found := FAILED.search(line))]
    what = f"stage {named[-1]} failed" if named else f"dvc repro ended with status {done.status}"
    url = run_url(run.flow_run, get_current_settings().api.url)
    said = [line for line in done.lines if line.strip() and not line.startswith(("ERROR: failed", "+", ">", "Running"))]
    return (
        f"retrain: {what}: {said[-1].strip() if said else 'it said nothing'}; {run.champion_name} stays; "
        f"look at {url}, {log} or {uri}, and start retrain again: it goes on from what is finished"
    )


@step("push and commit")
def push(run: Retrain, branch: str, remote: str, push_to: str) -> str:
    """Data to the DVC remote, else TrainingError, then ``dvc.lock`` and metrics to the branch."""
    chosen = ("--remote", remote) if remote else ()
    done = run.checkout.dvc("push", "--run-cache", *chosen)
    if done.status != 0:
        raise TrainingError(f"retrain: dvc push failed: {done.tail}; {run.champion_name} stays; start retrain again")
    keep_results(run)
    commit = run.checkout.commit(f"Retrain {branch.removeprefix('retrain/')}: {', '.join(run.ran) or 'nothing ran'}")
    if push_to:
        run.checkout.git("push", "--quiet", push_to, branch)
    return commit


def hand_over(then: str) -> str:
    """Have a deployment go on with this retrain, and wait for it; TrainingError where it did not end well."""
    child: Any = run_deployment(then, parameters={**flow_run.parameters, "then": ""})
    address = run_url(str(child.id), get_current_settings().api.url)
    if not child.state.is_completed():
        raise TrainingError(f"retrain: {then} ended as {child.state.name}; look at {address}")
    return f"{then} has ended; its verdict stands at {address}"


@step("clean up")
def clean_up(run: Retrain, days: int) -> None:
    """Remove the runs of old, here and in the store; what is in the way of that is in the way of nothing else."""
    try:
        for line in old_runs(run.folder.parent, run.store, days):
            get_run_logger().info("%s", line)
    except StorageError as error:
        get_run_logger().warning("old runs stay: %s", error)


@flow(name="retrain")
def retrain(
    base: str = "HEAD",
    checkout: str = "",
    margin: float = 0.1,
    total: float = 0.1,
    floor: float = 0.05,
    harder_evaluation: bool = False,
    remote: str = "",
    push_to: GitAddress = "",
    champion: str = "",
    stale_days: int = 28,
    keep_days: int = 90,
    then: str = "",
) -> str:
    """Retrain, compare, promote; returns the verdict in one sentence.

    Args:
        base: commit, branch or tag of the project that is retrained.
        checkout: folder of the dedicated checkout; empty: ``.wav/retrain`` in the project.
        margin: success rate that a new policy may lose against the champion, interval included.
        total: success rate that it may lose against the best champion so far.
        floor: success rate that it must reach for certain (lower end of Wilson's interval).
        harder_evaluation: the evaluation was made harder on purpose, so that the champion may score less under it.
        remote: DVC remote; empty: the default one.
        push_to: git remote or URL, without a password or token, that the branch is pushed to; empty: to none.
        champion: name of the champion; empty: the suite's.
        stale_days: a champion that is older and stays is told about (docs/operations.md).
        keep_days: older folders of ``runs/`` are removed, here and in the store; 0: none.
        then: deployment of this flow, on a machine that shares the checkout's folder, which goes on once the data
            stages are made here; empty: all of it is done here.
    """
    without_secret(push_to, "push_to")
    runtime, project, folder = begin_deployed()
    rules, logger = Rules(margin, total, floor), get_run_logger()
    store = open_store(runtime.store, runtime.s3_endpoint, runtime.s3_region)
    folder.mkdir(parents=True, exist_ok=True)
    name = champion or load_settings(project / "params.yaml").data.suite
    place = Path(checkout or os.environ.get("WAV_RETRAIN_CHECKOUT") or project / ".wav" / "retrain")
    environment = {**os.environ, PARENT_VARIABLE: folder.name, "WAV_STORE": runtime.store, "WAV_WORKSPACE": "."}
    clone = Checkout(project, place, environment, logger.info)
    run = Retrain(clone, store, runtime, folder, folder.name, name, rules, harder_evaluation)
    meet(run)
    used = {"base": base, "checkout": place, **asdict(rules), "remote": remote or "the default one"}
    used |= {"push_to": push_to or "nowhere", "champion": run.champion_name}
    publish_numbers("parameters", used, "what this retrain works with")
    clean_up(run, keep_days)  # first, so that weeks of failed retrains fill no disk
    with clone.locked():
        branch = check_out(run, base)
        pull(run, remote)
        try:
            reproduce(run, DATA_STAGES if then else ())
            if not then:
                commit = push(run, branch, remote, push_to)
                verdict = challenge(run, commit)
        except WavError as error:
            tell_stages(run)
            publish_markdown("verdict", f"**failed**: {error}", "promotion")
            raise
    if then:
        return hand_over(then)
    logger.info("%s: %s", "promoted" if verdict.promote else "not promoted", verdict.reason)
    if run.current and not verdict.promote:
        tell_stale(run.name, run.current[0].promoted, stale_days, verdict.reason)
    return verdict.reason


def main() -> int:
    """Retrain now, without a worker."""
    return by_hand(retrain)


if __name__ == "__main__":
    raise SystemExit(main())
