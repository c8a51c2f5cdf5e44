"""Stage ``label_rewards``: the reward terms of Table 2 and their returns, per step, into ``data/rewards/``."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import Progress, pictured, publish_images, publish_numbers
from flows.common import StageRun, finish, main, start, step
from wav import plots
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.io.files import write_bytes, write_json
from wav.rewards.label import label_store
from wav.rewards.terms import episode_rewards

PLOTTED_RETURNS = 20


@step("label episodes")
def label(run: StageRun) -> None:
    """Terms and returns of every episode, with progress."""
    data, settings = run.settings.data, run.settings.label_rewards
    with Progress("reward labels", run.logger) as progress, run.cluster() as cluster:
        episodes = EpisodeStore.open(run.path("data/episodes"))
        episodes.verify()
        label_store(
            episodes,
            settings,
            data.action_chunk,
            run.path("data/rewards"),
            progress=progress,
            run=cluster and cluster.mapper(),
        )


@step("plot rewards")
def plot(run: StageRun) -> None:
    """Plots of the terms (one episode per task) and of the returns over time."""
    episodes, folder = EpisodeStore.open(run.path("data/episodes")), run.path("reports/label_rewards")
    rewards = RewardStore.open(run.path("data/rewards"), episodes)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for task_name, index in pictured(episodes).items():
        terms = episode_rewards(episodes[index], run.settings.label_rewards, run.settings.data.views)
        pictures[f"terms-{task_name}"] = plots.reward_terms(terms, f"weighted reward terms: {task_name}")
    shown = range(min(PLOTTED_RETURNS, len(episodes.episodes)))
    returns = [rewards.episode(i)[:, -1] for i in shown]
    pictures["returns"] = plots.returns_over_time(returns, "returns along the episodes")
    for name, image in pictures.items():
        write_bytes(folder / "pictures" / f"{name}.png", image)
    values = rewards.values[:]
    channels = [*rewards.names, "return"]
    metrics = {
        "steps": len(values),
        "mean": {name: round(float(values[:, i].mean()), 6) for i, name in enumerate(channels)},
        "std": {name: round(float(values[:, i].std()), 6) for i, name in enumerate(channels)},
    }
    write_json(folder / "metrics.json", metrics)
    publish_numbers("metrics", metrics, "weighted terms and return")
    publish_images("plots", pictures, "reward terms and returns")


@flow(name="label-rewards")
def label_rewards(workspace: str = ".") -> None:
    """Make ``data/rewards/``."""
    run = start("label_rewards", workspace)
    label(run)
    plot(run)
    finish(run, [run.path("reports/label_rewards"), run.path("data/rewards/manifest.json")])


if __name__ == "__main__":
    raise SystemExit(main(label_rewards))
