"""Stage ``eval_libero``: closed-loop success of the joint model, planned and with its controls, and the report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from prefect import flow

from flows.artifacts import Progress, publish_images, publish_markdown, publish_numbers, publish_values
from flows.common import StageRun, finish, main, start, step
from flows.policy import assembly
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.evaluation.evaluate import evaluate, without_simulator
from wav.evaluation.extras.table import evaluated_table, markdown
from wav.evaluation.held_out import held_out_values
from wav.evaluation.instruments import INSTRUMENTS
from wav.evaluation.instruments.executed import all_returns
from wav.evaluation.instruments.futures import direct_ahead, futures_apart
from wav.evaluation.instruments.oracle import held_out_windows, oracle
from wav.evaluation.instruments.ranking import ranking
from wav.evaluation.instruments.swap import swaps
from wav.evaluation.instruments.use import held_out_histories, noise_use
from wav.evaluation.protocol import other_instructions
from wav.evaluation.records import step_limits
from wav.evaluation.report import build_report
from wav.evaluation.shares import Elsewhere, policy_of_stages
from wav.evaluation.start import check_all
from wav.evaluation.tables import metrics_table
from wav.io.files import write_json, write_text
from wav.policy.export import Checkpoint
from wav.policy.policy import Policy
from wav.sim.futures import Branch, branches
from wav.sim.registry import has_simulator, select_tasks
from wav.sim.workers import SimPool

POINTS = 4  #: states of an expert's episode that instruments look at


@step("load policy")
def load(run: StageRun) -> tuple[Policy, Checkpoint]:
    """The policy as it will be exported."""
    return assembly(run, run.settings.eval_libero.batch_size)()


def closed_loop(
    run: StageRun, policy: Policy, digest: str, store: EpisodeStore | None, load: Callable[[], Policy]
) -> dict[str, Any]:
    """Start checks, then all episodes of all variants; finished ones of an interrupted run of the same key are kept.

    A suite without simulator has none of that, and its metrics say so.
    ``store`` holds the demonstrations the policy was trained on, where they are at hand; ``load`` loads the policy on a
    cluster's worker.
    """
    data, settings, out = run.settings.data, run.settings.eval_libero, run.path("reports/eval")
    if not has_simulator(data.suite):
        return without_simulator(run.settings, out, digest)
    with (
        Progress("episodes", run.logger) as progress,
        SimPool(data.suite, data, workers=run.runtime.workers, slots=settings.batch_size) as pool,
        run.cluster() as cluster,
    ):
        return evaluate(
            run.settings,
            policy,
            out,
            pool=pool,
            checkpoint=digest,
            data_conventions=None if store is None else store.conventions,
            start=check_all(policy, data, pool=pool, out=out, store=store),
            limits=step_limits(store, settings, [task.name for task in select_tasks(data.suite, data.tasks)]),
            progress=lambda state: progress(
                state.done,
                state.total,
                f"{state.successes}/{state.finished} solved ({state.label})",
                left=state.eta_seconds,
            ),
            elsewhere=cluster and Elsewhere(cluster.mapper(gpu=run.gpu), load),
        )


def expert_states(run: StageRun) -> list[Branch]:
    """States of the scripted expert's episodes from evaluation's initial states, which no demonstration began from.

    None, and the log says why, where the expert solves no episode of the suite's tasks.
    """
    data, settings, workers = run.settings.data, run.settings.eval_libero, run.runtime.workers
    found = branches(data, settings.states(settings.ranked_states), POINTS, settings.execute_steps, workers)
    if settings.ranked_states and not found:
        run.logger.warning("instruments: the scripted expert solved no episode of %s: no ranking", data.suite)
    return found


def rank(run: StageRun, policy: Policy, states: Sequence[Branch]) -> dict[str, Any]:
    """Scores beside realised returns from half of the states: executing candidates is what takes long."""
    data, count, workers = run.settings.data, run.settings.eval_libero.ranked_candidates, run.runtime.workers
    execute = functools.partial(all_returns, data, run.settings.label_rewards, workers)
    return ranking(policy, states[::2], execute, count)


def instruments(run: StageRun, policy: Policy, metrics: dict[str, Any], store: EpisodeStore | None) -> None:
    """Look inside (:mod:`wav.evaluation.instruments`), add what is found to ``metrics``, and publish it.

    Where neither a simulator nor demonstrations are at hand there is nothing to look at.
    """
    data, simulated = run.settings.data, has_simulator(run.settings.data.suite)
    states = expert_states(run) if simulated else []
    histories = [state.seen for state in states]
    if store is not None and not histories:
        histories = held_out_histories(store, data.views, run.settings.eval_libero.execute_steps)
    if histories:
        metrics["use"] = noise_use(policy, histories)
        metrics["swap"] = swaps(policy, histories, other_instructions(data) if simulated else {})
    if states and policy.has_values:
        metrics["ranking"] = rank(run, policy, states)
    if store is not None and (run.workspace / "data/latents").is_dir():
        latents = LatentStore.open(run.path("data/latents"), store)
        rewards = RewardStore.open(run.path("data/rewards"), store) if run.settings.model.value_expert else None
        metrics["oracle"] = oracle(policy, held_out_windows(store, latents, rewards, policy))
        metrics["futures"] = futures_apart(store, latents) | {"read_at": policy.levels.video[-1]}
        if rewards is not None:
            metrics["futures"]["direct_ahead"] = direct_ahead(store, latents, rewards.values)
    write_json(run.path("reports/eval/metrics.json"), metrics)
    found = {name: metrics[name] for name in INSTRUMENTS if name in metrics}
    publish_numbers("instruments", found, "what the noises decide, and whether scores are right")


@step("roll out")
def roll_out(run: StageRun, policy: Policy, checkpoint: Checkpoint) -> dict[str, Any]:
    """The joint model in closed loop."""
    load = assembly(run, run.settings.eval_libero.batch_size, policy_of_stages)
    return closed_loop(run, policy, checkpoint.digest, EpisodeStore.open(run.path("data/episodes")), load)


@step("look inside")
def look_inside(run: StageRun, policy: Policy, metrics: dict[str, Any]) -> dict[str, Any]:
    """What the policy's noises decide, beside its success."""
    instruments(run, policy, metrics, EpisodeStore.open(run.path("data/episodes")))
    return metrics


@step("picture predictions")
def picture(run: StageRun, policy: Policy) -> None:
    """Predicted against real value and frames along a held-out demonstration."""
    store = EpisodeStore.open(run.path("data/episodes"))
    rewards = RewardStore.open(run.path("data/rewards"), store) if run.settings.model.value_expert else None
    held_out_values(policy, store, rewards, run.settings, run.path("reports/eval"))


@step("report")
def report(run: StageRun, metrics: dict[str, Any]) -> None:
    """``reports/index.html``, and its tables in ``reports/eval/table.md`` and, with pictures, on the flow run."""
    build_report(run.workspace, run.settings)
    table = evaluated_table(metrics)
    text = metrics_table(metrics) + ("" if table is None else f"\n\nLIBERO, success in %:\n\n{markdown(table)}")
    write_text(run.path("reports/eval/table.md"), text)
    publish_markdown("results", text, f"success on {run.settings.data.suite}")
    for kind in ("strips", "predictions"):
        pictures = sorted(run.path(f"reports/eval/{kind}").glob("*.png"))
        if pictures:
            publish_images(kind, {path.stem: path for path in pictures[:6]}, f"evaluation: {kind}")
    publish_values(run.path("reports/eval"))


@flow(name="eval-libero")
def eval_libero(workspace: str = ".") -> None:
    """Make ``reports/eval/`` and ``reports/index.html``."""
    run = start("eval_libero", workspace)
    policy, checkpoint = load(run)
    metrics = look_inside(run, policy, roll_out(run, policy, checkpoint))
    picture(run, policy)
    report(run, metrics)
    finish(
        run, [run.path("reports/eval/metrics.json"), run.path("reports/eval/videos"), run.path("reports/index.html")]
    )


if __name__ == "__main__":
    raise SystemExit(main(eval_libero))
