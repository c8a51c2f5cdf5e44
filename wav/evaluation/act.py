"""A few episodes of an exported policy, one line each: what ``wav act`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from wav.config import DataSettings
from wav.data.names import in_libero, own_task, suites_of
from wav.errors import CheckpointError, ConfigError
from wav.evaluation import pictures
from wav.evaluation.evaluate import applicable, check_start
from wav.evaluation.protocol import EpisodeSpec
from wav.evaluation.rollout import Rollout, Scheduler
from wav.io.files import read_json
from wav.io.readers import understood
from wav.planning import Variant
from wav.policy.export import load_export
from wav.policy.policy import Policy
from wav.sim.registry import select_tasks
from wav.sim.workers import SimPool


def exported_data(folder: Path, suite: str = "", tasks: Sequence[str] = ()) -> DataSettings:
    """Section ``data`` of an export, with other tasks or another of LIBERO's suites where asked for.

    LIBERO's suites share robot, cameras and conventions, so a policy of some can be run on any; without ``tasks`` on
    all tasks of suites that are not its own.

    Raises:
        ConfigError: the export was made for another simulator.
        CheckpointError: ``settings.json`` has no section ``data``.
    """
    path, remedy = folder / "settings.json", "export the policy again (`dvc repro export`)"
    settings = read_json(path, remedy, CheckpointError)
    with understood(path, remedy, CheckpointError):
        data = DataSettings.model_validate(settings["data"])
    if suite and data.suite != suite:
        if not (in_libero(data.suite) and in_libero(suite)):
            raise ConfigError(f"--suite = {suite}: {folder} was trained on {data.suite!r}; give --suite {data.suite}")
        own = tuple(name for of, name in (own_task(data.suite, task) for task in data.tasks) if of == suite)
        data = data.model_copy(update={"suites": suites_of(suite), "tasks": own})
    return data.model_copy(update={"tasks": tuple(tasks)}) if tasks else data


def policy_for_suite(policy: Policy, data: DataSettings) -> Policy:
    """The policy; one of LIBERO's with its conventions under the name of the suite it is run on (changed in place)."""
    if in_libero(policy.conventions.suite) and in_libero(data.suite):
        policy.conventions = dataclasses.replace(policy.conventions, suite=data.suite)
    return policy


def act_episodes(
    folder: Path,
    *,
    suite: str,
    episodes: int,
    tasks: Sequence[str] = (),
    variant: Variant = "planned",
    seed: int = 7,
    execute_steps: int | None = None,
    workers: int = 1,
    device: str = "auto",
    videos: Path | None = None,
    report: Callable[[str], None],
    pool_factory: Callable[..., SimPool] = SimPool,
) -> list[bool]:
    """Load an export and run ``episodes`` episodes, initial state by initial state over the tasks.

    Without ``tasks`` those of the export, without ``execute_steps`` as many as in its evaluation. ``videos`` is a
    folder for one mp4 per episode, ``report`` gets one line per episode as it finishes.

    Returns:
        Success of each episode, in order.

    Raises:
        WavError: a damaged export, another suite, an unknown task, a variant that needs the value expert the export
            lacks, other simulator versions, a broken renderer.
    """
    data = exported_data(folder, suite, tasks)
    chosen = select_tasks(suite, data.tasks)
    slots = min(episodes, 8)
    policy = policy_for_suite(load_export(folder, batch_size=slots, device=device), data)
    check_start(policy, data)
    applicable((variant,), policy.has_values, "--variant")
    specs = []
    for number in range(episodes):
        task, index = chosen[number % len(chosen)], number // len(chosen)
        own, told = own_task(suite, task.name)[0], (task.name, task.instruction, task.max_steps)
        specs.append(EpisodeSpec(own, task.name, index, variant, *told, seed, number, record=videos is not None))
    results: dict[EpisodeSpec, bool] = {}

    def finish(rollout: Rollout) -> None:
        spec = rollout.spec
        results[spec] = rollout.success
        verdict = "success" if rollout.success else "failure"
        value = f", value {rollout.values[0]:.3f} to {rollout.values[-1]:.3f}" if rollout.values else ""
        where = f"{spec.suite}: {spec.task} (initial state {spec.init_index})"
        report(f"{where}: {verdict} after {rollout.steps} steps{value}")
        if videos is not None and rollout.frames:
            frames = [pictures.join_views(frame, data.views) for frame in rollout.frames]
            pictures.write_mp4(Path(videos) / f"{spec.picture}.mp4", frames, data.control_hz)

    with pool_factory(suite, data, min(workers, slots), slots) as pool:
        steps = min(execute_steps or policy.execute_steps, data.action_chunk)
        Scheduler(pool, policy, execute_steps=steps, batch_size=slots, on_finish=finish).run(specs)
    return [results[spec] for spec in specs]
