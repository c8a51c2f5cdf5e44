"""Deployment ``retrain``: the whole pipeline in a checkout of its own, then promotion of the policy if it is not worse.

Every week, without anybody watching: a stage that fails leaves the champion in place and says where to look, and the
next retrain goes on from what is finished. A retrain with nothing changed ends within a minute.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.settings import get_current_settings

from flows.artifacts import Progress, publish_markdown, publish_numbers, publish_objects, publish_table
from flows.checkout import Checkout, Finished
from flows.common import begin_deployed, by_hand, step
from flows.provenance import PARENT_VARIABLE, locked_hashes, run_url
from wav import promotion
from wav.config import Runtime, Settings, load_settings
from wav.errors import ConfigError, TrainingError, WavError
from wav.evaluation.tables import metrics_table
from wav.io.files import read_json
from wav.io.storage import ObjectInfo, ObjectStore, open_store
from wav.io.storage.commit import fetch, publish, remote_manifest, seal
from wav.promotion import Champion, Outcomes, Verdict
from wav.stages import CODE_STAGE, STAGES

FAILED = re.compile(r"failed to reproduce '([\w@.-]+)'")
STARTED = re.compile(r"Running stage '([\w@.-]+)'")
#: where the store keeps dvc.lock and metrics of the last retrain, by the champion's name
RESULTS = "retrains/{}/results"


@dataclass
class Retrain:
    """One retrain: where it works, where it reports, whom it challenges."""

    checkout: Checkout
    store: ObjectStore
    runtime: Runtime
    folder: Path
    flow_run: str
    name: str
    current: tuple[Champion, ObjectInfo] | None = None
    ran: list[str] = field(default_factory=list)

    @property
    def champion_name(self) -> str:
        """How messages call the champion."""
        return f"champion {self.name} ({self.current[0].policy[:12]})" if self.current else "no champion yet"


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
    """What ``dvc.lock`` names and the remote has; what it lacks is made again."""
    if not (run.checkout.folder / "dvc.lock").is_file():
        return
    chosen = ("--remote", remote) if remote else ()
    done = run.checkout.dvc("pull", "--run-cache", "--allow-missing", *chosen)
    if done.status != 0:
        get_run_logger().warning("dvc pull could not fetch everything (%s); the stages make the rest", done.tail)


@step("dvc repro")
def reproduce(run: Retrain) -> None:
    """All stages that are out of date.

    Raises:
        TrainingError: a stage failed; names it, the log and the champion that stays.
    """
    logger = get_run_logger()
    with Progress("stages", logger) as progress:
        names = [CODE_STAGE, *STAGES]

        def say(line: str) -> None:
            logger.info(line)
            if found := STARTED.search(line):
                run.ran.append(found[1])
                progress(names.index(found[1]) if found[1] in names else 0, len(names), found[1])

        run.checkout.follow(say)
        done = run.checkout.dvc("repro")
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
    """Data to the DVC remote, then ``dvc.lock`` and metrics to the branch.

    Raises:
        TrainingError: the remote did not take everything.
    """
    chosen = ("--remote", remote) if remote else ()
    done = run.checkout.dvc("push", "--run-cache", *chosen)
    if done.status != 0:
        raise TrainingError(f"retrain: dvc push failed: {done.tail}; {run.champion_name} stays; start retrain again")
    keep_results(run)
    commit = run.checkout.commit(f"Retrain {branch.removeprefix('retrain/')}: {', '.join(run.ran) or 'nothing ran'}")
    if push_to:
        run.checkout.git("push", "--quiet", push_to, branch)
    return commit


@step("evaluation identity")
def identity(run: Retrain) -> str:
    """Of the checkout's code and parameters, asked from its own code."""
    done = run.checkout.python("evaluation identity", "-m", "wav.promotion")
    if done.status != 0:
        raise ConfigError(f"retrain: {done.tail}")
    return str(json.loads(done.lines[-1])["evaluation"])


@step("evaluate champion")
def champion_outcomes(run: Retrain, settings: Settings, evaluation: str, variant: str) -> Outcomes | None:
    """The champion's outcomes under ``evaluation``: those it has, or new ones where the evaluation changed.

    Raises:
        TrainingError: it cannot be evaluated any more.
    """
    if run.current is None:
        return None
    champion = run.current[0]
    if champion.evaluation == evaluation:
        return champion.outcomes
    get_run_logger().info("the evaluation changed since %s: evaluating it again", run.champion_name)
    export = promotion.download_policy(run.store, champion, run.folder / "champion" / "export")
    out = run.folder / "champion" / "evaluation"
    arguments = ["--checkpoint", str(export), "--out", str(out), "--variant", variant]
    for name in settings.data.tasks:
        arguments += ["--task", name]
    done = run.checkout.python("evaluate champion", "-m", "flows.eval_run", *arguments)
    if done.status != 0:
        raise TrainingError(
            f"retrain: the champion could not be evaluated again: {done.tail}; it stays; if it can never run again, "
            f"delete {run.store.uri(promotion.pointer_key(run.name))} and the next policy becomes champion"
        )
    outcomes = promotion.read_outcomes(out / "reports/eval", variant)
    shutil.rmtree(export)  # it is in the store, and of gigabytes
    renewed = replace(champion, evaluation=evaluation, outcomes=outcomes)
    if (written := promotion.promote(run.store, run.name, renewed, run.current[1])) is not None:
        run.current = renewed, written  # the next retrain need not evaluate it again, whoever wins this one
    return outcomes


@step("promote")
def promote(run: Retrain, candidate: Champion, verdict: Verdict, export: Path, lock: Path) -> Verdict:
    """Upload the policy and write the pointer, if the verdict says so and nobody was first."""
    if not verdict.promote:
        return verdict
    prefix = f"policies/{candidate.policy}"
    files = promotion.upload_policy(run.store, export, f"{prefix}/export")
    kept = run.store.put_file(lock, f"{prefix}/dvc.lock") if lock.is_file() else None
    champion = Champion(**{**candidate.__dict__, "files": files, "lock": kept.key if kept else ""})
    written = promotion.promote(run.store, run.name, champion, run.current[1] if run.current else None)
    if written is None:
        return Verdict(
            False,
            "another retrain changed the champion meanwhile; start retrain again to compare with the new one",
            verdict.difference,
        )
    get_run_logger().info("champion %s is now %s (version %s)", run.name, champion.policy[:12], written.version or "-")
    objects = [(run.store.uri(written.key), written.version, written.size)]
    objects += [(run.store.uri(entry.key), entry.version, entry.size) for entry in files]
    publish_objects("champion", objects, run.runtime, f"champion {run.name}: the pointer and the policy's files")
    return verdict


def _tell(run: Retrain, verdict: Verdict, candidate: Champion, metrics: Path) -> None:
    """The verdict, the results table, the DVC hashes and the flow runs of the stages."""
    title = "promoted" if verdict.promote else "not promoted"
    url = run.store.uri(promotion.pointer_key(run.name))
    text = f"**{title}**: {verdict.reason}\n\nchampion pointer: `{url}`\n\n"
    publish_markdown("verdict", text + metrics_table(read_json(metrics, "run dvc repro eval_libero")), "promotion")
    rows = [{"name": "candidate", "policy": candidate.policy, "success": round(candidate.rate, 4)}]
    if run.current:
        rows += [{"name": "champion", "policy": run.current[0].policy, "success": round(run.current[0].rate, 4)}]
    publish_table("policies", rows, "candidate and champion")
    if verdict.difference:
        publish_table("comparison", [asdict(verdict.difference)], "candidate minus champion, same episodes")
    locked = locked_hashes(run.checkout.folder)
    publish_table("dvc", [{"path": path, "dvc": value} for path, value in locked.items()], "what dvc.lock names")
    _tell_stages(run)


def _tell_stages(run: Retrain) -> None:
    """A link to the flow run of each stage that ran."""
    rows = []
    for stage in run.ran:
        path = run.checkout.folder / "reports" / "stages" / f"{stage}.json"
        if path.is_file():
            child = str(read_json(path, "run the stage again").get("flow_run", ""))
            rows.append(f"- {stage}: [{child}]({run_url(child, get_current_settings().api.url)})")
    if rows:
        publish_markdown("stages", "\n".join(rows), "flow runs of the stages")


def challenge(run: Retrain, margin: float, commit: str) -> Verdict:
    """Compare what the checkout holds with the champion and act on the verdict."""
    workspace = run.checkout.folder
    settings = load_settings(workspace / "params.yaml")
    variant = promotion.judged_variant(settings)
    export = workspace / "export"
    candidate = Champion(
        policy=promotion.policy_identity(export),
        checkpoint=str(read_json(export / "manifest.json", "run dvc repro export")["checkpoint"]["digest"]),
        evaluation=identity(run),
        outcomes=promotion.read_outcomes(workspace / "reports/eval", variant),
        files=(),
        commit=commit or run.checkout.git("rev-parse", "HEAD"),
        run=run.flow_run,
        promoted=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        previous=run.current[0].policy if run.current else "",
    )
    if run.current and run.current[0].policy == candidate.policy:
        candidate = replace(candidate, previous=run.current[0].previous)
        unchanged = run.current[0].evaluation == candidate.evaluation
        told = f"nothing changed: {run.champion_name} is what the pipeline makes"
        verdict = Verdict(not unchanged, told if unchanged else "the champion itself, under a new evaluation")
    else:
        outcomes = champion_outcomes(run, settings, candidate.evaluation, variant)
        verdict = promotion.judge(candidate.outcomes, outcomes, margin)
    verdict = promote(run, candidate, verdict, export, workspace / "dvc.lock")
    _tell(run, verdict, candidate, workspace / "reports/eval/metrics.json")
    return verdict


@flow(name="retrain")
def retrain(
    base: str = "HEAD",
    checkout: str = "",
    margin: float = 0.1,
    remote: str = "",
    push_to: str = "",
    champion: str = "",
) -> str:
    """Retrain, compare, promote; returns the verdict in one sentence.

    Args:
        base: commit, branch or tag of the project that is retrained.
        checkout: folder of the dedicated checkout; empty: ``.wav/retrain`` in the project.
        margin: success rate that a new policy may lose against the champion, interval included.
        remote: DVC remote; empty: the default one.
        push_to: git remote or URL that the branch is pushed to; empty: it stays in the checkout.
        champion: name of the champion; empty: the suite's.
    """
    runtime, project, folder = begin_deployed()
    if not 0 <= margin <= 1:
        raise ConfigError(f"margin = {margin}: must lie in [0, 1]")
    logger = get_run_logger()
    store = open_store(runtime.store, runtime.s3_endpoint, runtime.s3_region)
    folder.mkdir(parents=True, exist_ok=True)
    name = champion or load_settings(project / "params.yaml").data.suite
    place = Path(checkout or os.environ.get("WAV_RETRAIN_CHECKOUT") or project / ".wav" / "retrain")
    environment = {**os.environ, PARENT_VARIABLE: folder.name, "WAV_STORE": runtime.store, "WAV_WORKSPACE": "."}
    clone = Checkout(project, place, environment, logger.info)
    run = Retrain(clone, store, runtime, folder, folder.name, name, promotion.read_champion(store, name))
    used = {"base": base, "checkout": place, "margin": margin, "remote": remote or "the default one"}
    used |= {"push_to": push_to or "nowhere", "champion": run.champion_name}
    publish_numbers("parameters", used, "what this retrain works with")
    with clone.locked():
        branch = check_out(run, base)
        pull(run, remote)
        try:
            reproduce(run)
        except WavError as error:
            _tell_stages(run)
            publish_markdown("verdict", f"**failed**: {error}", "promotion")
            raise
        commit = push(run, branch, remote, push_to)
        verdict = challenge(run, margin, commit)
    logger.info("%s: %s", "promoted" if verdict.promote else "not promoted", verdict.reason)
    return verdict.reason


def main() -> int:
    """Retrain now, without a worker."""
    return by_hand(retrain)


if __name__ == "__main__":
    raise SystemExit(main())
