"""What each approximation of the planner saves and costs: speed, elites, actions, and success over paired episodes.

Runs a trained export of a simulated suite. The exact planner acts first; its episodes' contexts are what speed and
agreement are measured on, and every option then acts on the same episodes with the same draws:

    python benchmarks/approximate.py --export export --episodes 24 --json benchmarks/results/approximate-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from counting import machine
from torch import Tensor

from wav.config import DataSettings, PlannerSettings
from wav.evaluation.act import exported_data
from wav.evaluation.intervals import paired_difference, wilson
from wav.evaluation.protocol import EpisodeSpec
from wav.evaluation.rollout import Scheduler
from wav.inference.backends import planner_model
from wav.io.files import write_json
from wav.planning.types import Plan, RowKey, SeededNoise
from wav.policy.export import load_export
from wav.policy.policy import Policy
from wav.sim.registry import select_tasks
from wav.sim.workers import SimPool

ROWS = 8  #: the policy's batch while acting
SEED = 7

#: Option -> changed planner settings; ``precision`` is the model's, ``seed`` is the exact planner with other draws.
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "other seed": {"seed": SEED + 1},
    "bf16": {"precision": torch.bfloat16},
    "score_steps 4": {"score_steps": 4},
    "score_steps 2": {"score_steps": 2},
    "K=3": {"iterations": 3},
    "K=1": {"iterations": 1},
    "K=1, warm_start": {"iterations": 1, "warm_start": True},
    "realtime": {"iterations": 1, "score_steps": 2},
}


@dataclass
class Option:
    """One way to plan."""

    name: str
    settings: PlannerSettings
    seed: int = SEED
    precision: torch.dtype = torch.float32
    seconds: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    actions: list[tuple[float, float]] = field(default_factory=list)
    success: list[bool] = field(default_factory=list)
    spread: float = 0.0  #: standard deviation of the exact planner's normalised actions


@dataclass(frozen=True)
class Call:
    """One recorded policy call of one episode: what :meth:`begin` got, and which row of which call it was."""

    inputs: tuple[Tensor | None, ...]
    row: int
    call: int


def make_options(base: PlannerSettings, names: Sequence[str]) -> list[Option]:
    """The options by name, on top of the export's settings."""
    options = []
    for name in names:
        changes = dict(OPTIONS[name])
        seed, precision = changes.pop("seed", SEED), changes.pop("precision", torch.float32)
        settings = PlannerSettings.model_validate(base.model_dump() | changes)
        options.append(Option(name, settings, seed, precision))
    return options


def act(folder: Path, option: Option, episodes: int, record: list[Call] | None) -> list[bool]:
    """Success of the same ``episodes`` episodes under an option; with ``record``, what the policy saw is kept."""
    data = exported_data(folder, exported_suite(folder), ())
    policy = load_export(folder, batch_size=ROWS, device="cpu", planner=option.settings)
    _cast(policy, option.precision)
    if record is not None:
        begin = policy.model.begin
        number = iter(range(1 << 30))

        def begun(*inputs: Any) -> Any:
            call = next(number)
            rows = range(len(inputs[0]))
            record.extend(Call(tuple(None if x is None else x[i : i + 1] for x in inputs), i, call) for i in rows)
            return begin(*inputs)

        policy.model.begin = begun  # type: ignore[method-assign]
    tasks = select_tasks(data.suite, data.tasks)
    specs = []
    for n in range(episodes):
        task = tasks[n % len(tasks)]
        place = (data.suite, task.name, n // len(tasks), "planned", task.name, task.instruction, task.max_steps)
        specs.append(EpisodeSpec(*place, option.seed, n))
    done: dict[EpisodeSpec, bool] = {}
    with SimPool(data.suite, data, 1, min(ROWS, episodes)) as pool:
        Scheduler(
            pool,
            policy,
            execute_steps=5,
            batch_size=ROWS,
            on_finish=lambda rollout: done.update({rollout.spec: rollout.success}),
        ).run(specs)
    return [done[spec] for spec in specs]


def _cast(policy: Policy, precision: torch.dtype) -> None:
    """The policy's weights in another precision."""
    if precision != torch.float32:
        policy.model = planner_model(torch.nn.Module.to(policy.model.model, precision), policy.model.shapes)


def exported_suite(folder: Path) -> str:
    """Suite that the export was trained on."""
    from wav.io.files import read_json

    return DataSettings.model_validate(read_json(folder / "settings.json", "export the policy again")["data"]).suite


def planned(policy: Policy, option: Option, call: Call, warm: Plan | None) -> Plan:
    """One plan of a recorded call, row by row as a robot calls it."""
    noise = SeededNoise([RowKey(option.seed, call.row, call.call)])
    means = None if warm is None else warm.means
    context = policy.model.begin(*call.inputs)
    planner = policy.make_planner(option.settings)
    return planner.plan(context, noise, warm=means)


def overlap(one: Plan, two: Plan) -> float:
    """Share of the elites of the last iteration both have that are the same, of videos and values together."""
    last = min(len(one.history), len(two.history)) - 1
    pairs = [
        (getattr(p.history[last], kind)[0].tolist()) for kind in ("video_elites", "value_elites") for p in (one, two)
    ]
    same = len(set(pairs[0]) & set(pairs[1])) + len(set(pairs[2]) & set(pairs[3]))
    return same / (len(pairs[0]) + len(pairs[2]))


def compare(folder: Path, options: Sequence[Option], calls: Sequence[Call], wanted: int) -> None:
    """Speed and agreement of every option on ``wanted`` of the recorded calls, in turns.

    A warm start has had one call before.
    """
    policies = {}
    for option in options:
        if option.precision not in policies:
            policies[option.precision] = load_export(folder, batch_size=1, device="cpu")
            _cast(policies[option.precision], option.precision)
    before = {(call.row, call.call): call for call in calls}
    chosen = [call for call in calls if (call.row, call.call - 1) in before]
    chosen = chosen[:: max(1, len(chosen) // wanted)][:wanted]
    exact = []
    with torch.inference_mode():
        for call in chosen:
            wanted_plan = None
            for option in options:
                policy, previous = policies[option.precision], None
                if option.settings.warm_start:
                    previous = planned(policy, option, before[call.row, call.call - 1], None)
                began = time.perf_counter()
                result = planned(policy, option, call, previous)
                option.seconds.append(time.perf_counter() - began)
                wanted_plan = wanted_plan or result
                option.overlap.append(overlap(wanted_plan, result))
                off = (wanted_plan.actions - result.actions).abs()
                option.actions.append((float(off.max()), float(off.mean())))
            exact.append(wanted_plan.actions)
    options[0].spread = float(torch.cat(exact).std())


def table(options: Sequence[Option]) -> list[dict[str, Any]]:
    """One row of results per option, against the first."""
    first, rows = options[0], []
    for option in options:
        row: dict[str, Any] = {"option": option.name, "planner": option.settings.model_dump(mode="json")}
        row["precision"], row["seed"] = str(option.precision).removeprefix("torch."), option.seed
        if option.seconds:
            pairs = zip(first.seconds, option.seconds, strict=True)
            row |= {
                "seconds": statistics.median(option.seconds),
                "ratio": statistics.median(a / b for a, b in pairs),
                "elites_shared": statistics.mean(option.overlap),
                "action_largest": max(largest for largest, _ in option.actions),
                "action_mean": statistics.mean(mean for _, mean in option.actions),
            }
        if option.success:
            row["success"] = wilson(sum(option.success), len(option.success)).as_dict()
            row["against_exact"] = paired_difference(option.success, first.success).as_dict()
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    head = ("option", "seconds", "ratio", "elites", "action max", "mean", "success", "change")
    print("{:18}{:>8}{:>7}{:>8}{:>12}{:>7}{:>16}{:>22}".format(*head))
    for row in rows:
        line = f"{row['option']:18}"
        if "ratio" in row:
            line += f"{row['seconds']:8.3f}{row['ratio']:7.2f}{row['elites_shared']:8.0%}"
            line += f"{row['action_largest']:12.3f}{row['action_mean']:7.3f}"
        if "success" in row:
            rate, change = row["success"], row["against_exact"]
            line += f"{rate['success_rate']:7.0%} of {rate['episodes']:3d}"
            line += f"{change['difference']:+8.0%} [{change['low']:+.0%}, {change['high']:+.0%}]"
        print(line)


def main() -> None:
    """Act, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--export", type=Path, required=True, help="a trained policy folder of a simulated suite")
    parser.add_argument("--episodes", type=int, default=24, help="paired episodes of every option")
    parser.add_argument("--calls", type=int, default=24, help="recorded policy calls compared")
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), choices=list(OPTIONS), help="after exact")
    parser.add_argument("--acting", nargs="*", choices=list(OPTIONS), help="options that run episodes (default: all)")
    parser.add_argument("--json", type=Path, help="file to write, again after every option's episodes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before, folder = machine(), arguments.export
    base = load_export(folder, batch_size=1, device="cpu").planner
    options = make_options(base, ["exact", *(name for name in arguments.options if name != "exact")])
    calls: list[Call] = []
    options[0].success = act(folder, options[0], arguments.episodes, calls)
    compare(folder, options, calls, arguments.calls)
    for option in [None, *options[1:]]:
        if option is not None:
            if option.name not in (arguments.acting or OPTIONS):
                continue
            option.success = act(folder, option, arguments.episodes, None)
        rows = table(options)
        result = {
            "options": rows,
            "calls": len(options[0].seconds),
            "action_spread": options[0].spread,
            "episodes": arguments.episodes,
            "suite": exported_suite(folder),
            "threads": 1,
            "machine": before,
        }
        if arguments.json:
            write_json(arguments.json, result)
    show(rows)


if __name__ == "__main__":
    main()
