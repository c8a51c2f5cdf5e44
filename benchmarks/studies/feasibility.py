"""Lemma 4.1, Proposition 4.2 and Corollary 4.3 in numbers: feasible mass over the horizon, one-shot against iterative.

Declared dynamics, which need neither simulator nor model and take seconds on one core:

- *corridor* (Lemma 4.1, Prop. 4.2): a hand beside its path, x' = x + a per axis and step, feasible while |x| <= 1 in
  all three axes. Actions uniform in [-1, 1], or a decoder that knows where the path is: x' = x / 2 + noise. The mass
  is computed by quadrature, not sampled.
- *search* (Cor. 4.3): Algorithm 1 itself (:class:`wav.planning.planner.Planner`) on a planted return
  V(z) = -mean over the horizon of (z_h - 1)^2, near-optimal from -0.5 on; K x M candidates in all, spent at once or
  over iterations.

With a workspace the same on its simulator (some minutes): chunks of uniform actions, of one uniform action held, and
the policy's own are executed from states of the expert's episodes. A segment of h positions of hand and fingers is
feasible where it lies within epsilon of a demonstrated one of its task; epsilon holds 95% of held-out demonstrations::

    python -m benchmarks.studies.feasibility benchmarks/results/feasibility.json
    python -m benchmarks.studies.feasibility benchmarks/results/feasibility.json --workspace .
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from benchmarks.counting import machine
from wav.config import PlannerSettings, Runtime
from wav.data.store import EpisodeStore
from wav.data.windows import split_episodes
from wav.evaluation.intervals import wilson
from wav.io.files import write_bytes, write_json
from wav.planning import Variant
from wav.planning.planner import Planner
from wav.planning.types import NoiseShapes, RowKey, SeededNoise
from wav.plots import png
from wav.policy.policy import Policy
from wav.seeding import numpy_generator
from wav.sim.futures import Branch, Segment, branches, execute, of_all

AXES, GRID, HORIZON = 3, 801, 60
#: Standard deviation per step of the decoder of the corridor; None: uniform actions.
WALKS = {"uniform actions": None, "decoder, error 0.2": 0.2, "decoder, error 0.4": 0.4}
HORIZONS, BUDGETS, ROWS, NEAR = (1, 2, 4, 8, 16, 32, 64), ((1, 128), (4, 32), (8, 16)), 256, -0.5
COUNT, SEED = 16, 0


def corridor(error: float | None) -> list[float]:
    """Mass that is still feasible after 1..60 steps of the corridor, from its middle."""
    x = np.linspace(-1, 1, GRID)
    step = x[None, :] - x[:, None] * (1.0 if error is None else 0.5)  # from row to column
    if error is None:
        kernel = 0.5 * (np.abs(step) <= 1)
    else:
        kernel = np.exp(-0.5 * (step / error) ** 2) / (error * np.sqrt(2 * np.pi))
    weights = np.full(GRID, x[1] - x[0])
    weights[[0, -1]] /= 2  # trapezoid
    density, mass = kernel[GRID // 2], []
    for _ in range(HORIZON):
        mass.append(float((density * weights).sum()) ** AXES)
        density = (density * weights) @ kernel
    return mass


class Planted:
    """A model whose value of a candidate is the planted return of its noise, over ``horizon`` steps."""

    def __init__(self, horizon: int) -> None:
        self.shapes = NoiseShapes((1, 1, horizon, 1, 1), (1, 1), (1, 1))

    def video_features(self, context: Any, noise: Tensor, levels: tuple[float, ...]) -> Tensor:
        """The noise itself."""
        return noise

    def denoise_value(self, features: Tensor, noise: Tensor, steps: int) -> Tensor:
        """V (B, M, N, 1, 1) of candidates."""
        value = -(features.flatten(2) - 1).square().mean(2)
        return value[:, :, None, None, None].expand(noise.shape)

    def denoise_action(
        self, context: Any, features: Tensor, value: Any, noise: Tensor, steps: int, level: float
    ) -> Tensor:
        """V of what is acted on."""
        return self.denoise_value(features, noise[:, None, None], 1)[:, 0, 0]


def search(horizon: int, iterations: int, candidates: int) -> dict[str, float]:
    """How often, over 256 draws, a search finds a near-optimal candidate, and acts on a near-optimal sample."""
    settings = PlannerSettings(
        iterations=iterations,
        video_samples=candidates,
        value_samples=1,
        video_elites=max(2, candidates // 4),
        value_elites=1,
        alpha=1.0,
        beta=1.0,
        sigma_decay=1.0,
        score="mean",
        denoise_steps=1,
    )
    noise = SeededNoise([RowKey(SEED, row, horizon) for row in range(ROWS)])
    plan = Planner(Planted(horizon), settings, lambda values: values[..., 0]).plan(None, noise)
    best = torch.stack([step.scores.flatten(1).amax(1) for step in plan.history]).amax(0)
    found, acted = ((value >= NEAR).float().mean().item() for value in (best, plan.actions[:, 0, 0]))
    return {"found": found, "acted": acted, "mean_acted": plan.actions.mean().item()}


def declared() -> dict[str, Any]:
    """Corridor and search."""
    masses = {name: corridor(error) for name, error in WALKS.items()}
    rates = {name: float(np.log(mass[-2] / mass[-1])) for name, mass in masses.items()}
    budgets = {f"{k}x{m}": {str(h): search(h, k, m) for h in HORIZONS} for k, m in BUDGETS}
    return {"corridor": {"mass": masses, "rate": rates}, "search": budgets}


def positions(state: NDArray[np.floating]) -> NDArray[np.float64]:
    """Hand position and fingers (T, 5) of simulator states (T, 8), in metres: an axis-angle jumps where it turns."""
    return np.asarray(state, np.float64)[:, [0, 1, 2, 6, 7]]


def windows(
    store: EpisodeStore, indices: list[int], task: str, length: int, scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Segments (n, length * 5) of a task's demonstrations, in units of ``scale``."""
    found = []
    for i in indices:
        state = positions(store[i].state) / scale
        if store.episodes[i].task == task and len(state) >= length:
            segments = np.lib.stride_tricks.sliding_window_view(state, length, 0).swapaxes(1, 2)
            found.append(segments.reshape(len(segments), -1))
    return np.concatenate(found)


def policy_chunks(policy: Policy, branch: Branch, variant: Variant) -> NDArray[np.float32]:
    """COUNT chunks (COUNT, A, 7) of the policy from a branch, each of noises of its own."""
    name = f"feasibility/{branch.task}/{branch.index}/{branch.step}"
    noise = SeededNoise([RowKey(SEED, name, draw) for draw in range(COUNT)], policy.model.device)
    planner = policy.make_planner()
    with torch.inference_mode():
        plan = planner.plan(policy.context([branch.seen] * COUNT), noise, variant=variant)
    return policy.actions(plan.actions.float().cpu().numpy())


def simulated(workspace: Path, states: int) -> dict[str, Any]:
    """Feasible share of executed segments by sampler and horizon, with Wilson intervals."""
    from benchmarks.studies.planning import Source

    runtime, source = Runtime(), Source.open(workspace, Runtime().device)
    data, store, A = source.settings.data, source.store, source.settings.data.action_chunk
    found = branches(data, range(states), 2, source.settings.eval_libero.execute_steps, runtime.workers)
    rng = numpy_generator(SEED, "feasibility")
    samplers = {
        "uniform": lambda branch: rng.uniform(-1, 1, (COUNT, A, data.action_dim)),
        "uniform, held": lambda branch: np.repeat(rng.uniform(-1, 1, (COUNT, 1, data.action_dim)), A, 1),
        "latent": lambda branch: policy_chunks(source.policy, branch, "unplanned"),
        "planned": lambda branch: policy_chunks(source.policy, branch, "planned"),
    }
    train, held = (list(map(int, split_episodes(store, part, 0.05))) for part in ("train", "validation"))
    scale = np.concatenate([positions(store[i].state) for i in train]).std(0)
    trees: dict[tuple[str, int], tuple[cKDTree, float]] = {}
    for task in dict.fromkeys(branch.task for branch in found):
        for h in range(1, A + 1):
            tree = cKDTree(windows(store, train, task, h, scale))
            trees[task, h] = tree, float(np.quantile(tree.query(windows(store, held, task, h, scale))[0], 0.95))

    def feasible(branch: Branch, segment: Segment, h: int) -> bool:
        tree, epsilon = trees[branch.task, h]
        states = positions(np.stack([seen.state for seen in segment.seen[1 : h + 1]])) / scale
        return bool(tree.query(states.reshape(-1))[0] <= epsilon)

    result: dict[str, Any] = {}
    for name, sample in samplers.items():
        chunks = [(branch, np.asarray(sample(branch), np.float32)) for branch in found]
        executed = of_all(execute, [(data.suite, data, *chunk) for chunk in chunks], runtime.workers)
        pairs = [(b, segment) for (b, _), several in zip(chunks, executed, strict=True) for segment in several]
        shares = [wilson(sum(feasible(b, s, h) for b, s in pairs), len(pairs)).as_dict() for h in range(1, A + 1)]
        result[name] = {"feasible": shares, "solved": sum(segment.solved for _, segment in pairs) / len(pairs)}
    epsilon = {f"{task}/{h}": value for (task, h), (_, value) in trees.items()}
    coupling = source.policy.coupling.model_dump(mode="json")
    return {"suite": data.suite, "states": len(found), "samples": COUNT, "epsilon": epsilon, "samplers": result} | {
        "checkpoint": source.checkpoint,
        "coupling": coupling,
        "planner": source.settings.planner.model_dump(mode="json"),
    }


def draw(result: dict[str, Any]) -> bytes:
    """The corridor, the search, and the simulator where it was run."""
    figure = Figure(figsize=(12 if "simulated" in result else 8, 3.3), dpi=110, layout="constrained")
    panels = list(figure.subplots(1, 3 if "simulated" in result else 2))
    for name, mass in result["corridor"]["mass"].items():
        panels[0].plot(range(1, len(mass) + 1), mass, label=name)
    panels[0].set(yscale="log", ylim=(1e-12, 2), title="corridor: feasible mass", xlabel="horizon, steps")
    for name, found in result["search"].items():
        rates = [found[str(h)]["found"] for h in HORIZONS]
        panels[1].plot(HORIZONS, rates, marker="o", label=f"K x M = {name}")
    panels[1].set(xscale="log", title="search: near-optimal candidate found", xlabel="horizon, dimensions")
    for name, found in result.get("simulated", {}).get("samplers", {}).items():
        rates = [share["success_rate"] for share in found["feasible"]]
        panels[2].plot(range(1, len(rates) + 1), rates, label=name)
        panels[2].set(title="simulator: feasible share of executed chunks", xlabel="horizon, steps", ylim=(-0.03, 1.03))
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return png(figure)


def main() -> None:
    """Compute, write the JSON and the plot beside it (``.png``)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("json", type=Path, help="file to write")
    parser.add_argument(
        "--workspace", type=Path, help="also on the simulator, with this workspace's demonstrations and policy"
    )
    parser.add_argument(
        "--states", type=int, default=4, help="initial states of each task; two points of each are used"
    )
    parser.add_argument("--plot", type=Path, help="picture to write, instead of one beside the JSON")
    chosen = parser.parse_args()
    result: dict[str, Any] = {"command": "python -m benchmarks.studies.feasibility", "machine": machine()} | declared()
    if chosen.workspace:
        result["simulated"] = simulated(chosen.workspace, chosen.states)
    write_json(chosen.json, result)
    write_bytes(chosen.plot or chosen.json.with_suffix(".png"), draw(result))


if __name__ == "__main__":
    main()
