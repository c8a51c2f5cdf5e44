"""A retrain's candidate against the champion: evaluated on equal terms, judged, promoted if it is not worse."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from prefect import get_run_logger
from prefect.settings import get_current_settings

from flows.artifacts import publish_markdown, publish_objects, publish_table
from flows.checkout import Checkout
from flows.common import step
from flows.provenance import locked_hashes, run_url
from wav import promotion
from wav.config import Runtime, Settings, load_settings
from wav.errors import ConfigError, TrainingError
from wav.evaluation.tables import metrics_table
from wav.io.files import read_json
from wav.io.storage import ObjectInfo, ObjectStore
from wav.promotion import Champion, Outcomes, Rules, Verdict


@dataclass
class Retrain:
    """One retrain: where it works, where it reports, whom it challenges."""

    checkout: Checkout
    store: ObjectStore
    runtime: Runtime
    folder: Path
    flow_run: str
    name: str
    rules: Rules = field(default_factory=Rules)
    harder: bool = False  #: the evaluation was made harder on purpose
    current: tuple[Champion, ObjectInfo] | None = None
    took_back: set[str] = field(default_factory=set)  #: policies that somebody took back by hand
    ran: list[str] = field(default_factory=list)

    @property
    def champion_name(self) -> str:
        """How messages call the champion."""
        return f"champion {self.name} ({self.current[0].policy[:12]})" if self.current else "no champion yet"


@step("evaluation identity")
def identity(run: Retrain) -> str:
    """Of the checkout's code and parameters, asked from its own code.

    Raises:
        ConfigError: the checkout's code cannot tell it; what it said.
    """
    done = run.checkout.python("evaluation identity", "-m", "wav.promotion")
    said = [line for line in done.lines if line.startswith('{"evaluation":')]  # libraries may have words of their own
    if done.status != 0 or not said:
        raise ConfigError(f"retrain: {done.tail}")
    return str(json.loads(said[-1])["evaluation"])


@step("evaluate champion")
def champion_outcomes(run: Retrain, champion: Champion, settings: Settings, variant: str) -> Outcomes:
    """The champion's outcomes under the checkout's evaluation; TrainingError where it cannot be evaluated any more."""
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
            f"delete {_places(run)}: the next policy above the floor becomes champion"
        )
    outcomes = promotion.read_outcomes(out / "reports/eval", variant, champion.checkpoint)
    shutil.rmtree(export)  # it is in the store, and of gigabytes
    return outcomes


def renew(run: Retrain, champion: Champion) -> None:
    """Write what the champion reached under the new evaluation: the next retrain need not evaluate it again."""
    assert run.current is not None
    written = promotion.promote(run.store, run.name, champion, run.current[1])
    run.current = champion, written or run.current[1]


def _places(run: Retrain) -> str:
    """The pointer, and the verdicts that say that there was one."""
    pointer, verdicts = promotion.pointer_key(run.name), promotion.verdicts_prefix(run.name)
    return f"{run.store.uri(pointer)} and everything below {run.store.uri(verdicts)}"


def meet(run: Retrain) -> None:
    """See whom this retrain challenges, and what was taken back by hand; TrainingError where a champion is lost."""
    run.current = promotion.read_champion(run.store, run.name)
    if run.current is None:
        if lost := promotion.promotions(run.store, run.name):
            policy, time = max(lost.items(), key=lambda item: item[1])
            raise TrainingError(
                f"retrain: there is no champion {run.name}, though {policy[:12]} was promoted ({time}); restore an "
                f"older version of {run.store.uri(promotion.pointer_key(run.name))}, or delete {_places(run)} to begin "
                "anew"
            )
        return
    champion = run.current[0]
    promotion.keep_verdict(run.store, run.name, champion, Verdict("promoted", "it is the champion"))
    later = promotion.promotions(run.store, run.name, after=champion.promoted)
    run.took_back = {*champion.refused, *later} - {champion.policy}


def compare(run: Retrain, candidate: Champion) -> Verdict:
    """What becomes of a candidate, under an evaluation that the champion went through too."""
    if run.current is None:
        return promotion.judge(candidate.outcomes, None, run.rules)
    champion = run.current[0]
    same, unchanged = champion.policy == candidate.policy, champion.evaluation == candidate.evaluation
    if candidate.policy in run.took_back:
        told = f"{candidate.policy[:12]} was champion and was taken back by hand; change what makes it"
        return Verdict("refused", told)
    if not unchanged:
        settings = load_settings(run.checkout.folder / "params.yaml")
        variant = promotion.judged_variant(settings)
        outcomes = candidate.outcomes if same else champion_outcomes(run, champion, settings, variant)
        renew(run, promotion.renewed(champion, candidate.evaluation, outcomes, run.rules, run.harder))
    if same:
        told = f"{run.champion_name} is what the pipeline makes"
        return Verdict("unchanged", f"nothing changed: {told}" if unchanged else f"only the evaluation changed: {told}")
    return promotion.judge(candidate.outcomes, run.current[0], run.rules)


@step("promote")
def promote(run: Retrain, candidate: Champion, verdict: Verdict) -> Verdict:
    """Upload the policy and write the pointer, if the verdict says so and nobody was first; keep the verdict."""
    if verdict.promote:
        verdict = _write(run, candidate, verdict)
    if verdict.kind != "unchanged":
        promotion.keep_verdict(run.store, run.name, candidate, verdict)
    return verdict


def _write(run: Retrain, candidate: Champion, verdict: Verdict) -> Verdict:
    workspace, prefix = run.checkout.folder, f"policies/{candidate.policy}"
    files = promotion.upload_policy(run.store, workspace / "export", f"{prefix}/export")
    lock = workspace / "dvc.lock"
    kept = run.store.put_file(lock, f"{prefix}/dvc.lock").key if lock.is_file() else ""
    over, etag = run.current or (None, None)
    champion = promotion.champion_after(replace(candidate, files=files, lock=kept), over, run.took_back)
    written = promotion.promote(run.store, run.name, champion, etag)
    if written is None:
        told = "another retrain changed the champion meanwhile; start retrain again to compare with the new one"
        return Verdict("refused", told, verdict.difference)
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
    policies = {"candidate": candidate} | ({"champion": run.current[0]} if run.current else {})
    rows = [{"name": name, "policy": found.policy, **_rates(found)} for name, found in policies.items()]
    publish_table("policies", rows, "candidate and champion")
    if verdict.difference:
        compared = {run.name: verdict.difference, **verdict.suites}
        rows = [{"suite": suite, **asdict(difference)} for suite, difference in compared.items()]
        publish_table("comparison", rows, "candidate minus champion, same episodes")
    locked = locked_hashes(run.checkout.folder)
    publish_table("dvc", [{"path": path, "dvc": value} for path, value in locked.items()], "what dvc.lock names")
    tell_stages(run)


def _rates(found: Champion) -> dict[str, float]:
    """Success in all and, of several suites, on each."""
    own = promotion.suite_outcomes(found.outcomes)
    return {"success": round(found.rate, 4)} | {s: round(sum(o.values()) / len(o), 4) for s, o in own.items()}


def tell_stages(run: Retrain) -> None:
    """A link to the flow run of each stage that ran."""
    rows = []
    for stage in run.ran:
        path = run.checkout.folder / "reports" / "stages" / f"{stage}.json"
        if path.is_file():
            child = str(read_json(path, "run the stage again").get("flow_run", ""))
            rows.append(f"- {stage}: [{child}]({run_url(child, get_current_settings().api.url)})")
    if rows:
        publish_markdown("stages", "\n".join(rows), "flow runs of the stages")


def challenge(run: Retrain, commit: str) -> Verdict:
    """Compare what the checkout holds with the champion and act on the verdict."""
    workspace = run.checkout.folder
    export, variant = workspace / "export", promotion.judged_variant(load_settings(workspace / "params.yaml"))
    checkpoint = str(read_json(export / "manifest.json", "run dvc repro export")["checkpoint"]["digest"])
    candidate = Champion(
        policy=promotion.policy_identity(export),
        checkpoint=checkpoint,
        evaluation=identity(run),
        outcomes=promotion.read_outcomes(workspace / "reports/eval", variant, checkpoint),
        files=(),
        commit=commit or run.checkout.git("rev-parse", "HEAD"),
        run=run.flow_run,
        promoted=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    verdict = promote(run, candidate, compare(run, candidate))
    _tell(run, verdict, candidate, workspace / "reports/eval/metrics.json")
    return verdict
