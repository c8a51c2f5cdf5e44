"""Episodes per hour of simulators that feed one batched policy, against one simulator and one policy in turns.

Both run the same episodes on this machine, alternating, with the default policy's sizes and random weights; simulators
are started before the clock. LIBERO needs `make libero` and its assets. Prints a table and a projection from the
measured parts; ``--json FILE`` writes them:

    python benchmarks/evaluate.py --json benchmarks/results/evaluate-cpu.json
    python benchmarks/evaluate.py --suite libero_object --tasks 1 --slots 4 --episodes 4 --steps 10
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counting import machine, write_result

from wav.codec import PCACodec
from wav.config import DataSettings, Settings, load_settings
from wav.data.conventions import Conventions
from wav.data.statistics import Statistics, compute_statistics
from wav.evaluation.protocol import EpisodeSpec
from wav.evaluation.rollout import Clock, Rollout, Scheduler
from wav.model import build_model
from wav.policy.policy import Policy
from wav.sim.registry import select_tasks, simulator_versions
from wav.sim.workers import SimPool

ROOT = Path(__file__).resolve().parents[1]
PROJECTED = (1, 2, 4, 8, 16, 32)


def make_policy(settings: Settings, instructions: list[str], batch_size: int) -> Policy:
    """The default policy's sizes with random weights, the same for every batch size."""
    data, encode, random = settings.data, settings.encode, np.random.default_rng(0)
    size = (data.image_height, data.image_width, 3)
    images = random.integers(0, 256, (20, *size), dtype=np.uint8)
    clips = random.integers(0, 256, (8, data.future_frames, *size), dtype=np.uint8)
    codec = PCACodec.fit(images, clips, patch=encode.patch, temporal=encode.temporal, channels=encode.channels)
    model = build_model(settings.model, data, encode.channels, encode.text_dim)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    keys = {
        "action": compute_statistics(random.uniform(-1, 1, (500, data.action_dim)), "quantile"),
        "state": compute_statistics(random.normal(size=(500, data.state_dim)), "quantile"),
        "value": compute_statistics(random.normal(3, 2, (500, model.config.value_in_channels)), "zscore_symlog"),
    }
    shape, mask = (data.text_tokens, encode.text_dim), np.ones(data.text_tokens, bool)
    prompts = {text: (random.normal(size=shape).astype(np.float32), mask) for text in sorted(instructions)}
    conventions = Conventions.for_simulator(data, {})
    parts = (codec, None, Statistics(keys), conventions, data, settings.planner)
    return Policy(model.eval(), *parts, batch_size=batch_size, prompts=prompts)


def make_episodes(settings: Settings, count: int, steps: int) -> list[EpisodeSpec]:
    """``count`` planned episodes of ``steps`` environment steps, initial state by initial state over the tasks."""
    data, specs = settings.data, select_tasks(settings.data.suite, settings.data.tasks)
    chosen = [(specs[n % len(specs)], n // len(specs), n) for n in range(count)]
    return [
        EpisodeSpec(data.suite, s.name, index, "planned", s.name, s.instruction, steps, 7, n) for s, index, n in chosen
    ]


def cpu_seconds(pids: list[int]) -> float:
    """Processor time that processes have used so far, all their threads; 0 where /proc does not tell."""
    total = 0.0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if stat.is_file():
            fields = stat.read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def busy_seconds() -> float:
    """Processor time that the machine has spent or that was taken from it, by whomever; 0 where /proc does not tell."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(share: float, until: float) -> None:
    """Sleep until others leave the cores alone for two seconds, or until ``time.perf_counter()`` is ``until``."""
    while share < 1 and time.perf_counter() < until:
        busy = busy_seconds()
        time.sleep(2)
        if (busy_seconds() - busy) / 2 / (os.cpu_count() or 1) < share:
            return


class Side:
    """One way to evaluate: a pool of simulators and a policy, timed over the episodes."""

    def __init__(self, settings: Settings, episodes: list[EpisodeSpec], pool: SimPool, batch: int) -> None:
        self.pool, self.batch, self.episodes = pool, batch, episodes
        self.execute_steps = settings.eval_libero.execute_steps
        self.policy = make_policy(settings, [spec.instruction for spec in episodes], batch)
        self.seconds: list[float] = []
        self.cpu: list[tuple[float, float]] = []  # of the policy's process and the simulators'
        self.others: list[float] = []  # share of the cores that other processes had meanwhile
        self.clocks: list[Clock] = []

    def warm(self) -> None:
        """Start every simulator with its scenes, and call the policy once."""
        tasks = list(dict.fromkeys(spec.task for spec in self.episodes))
        for task in tasks:
            for slot in range(self.pool.slots):
                self.pool.submit_reset(slot, task, 0)
            left = self.pool.slots
            while left:
                replies = self.pool.wait()
                left -= len(replies)
                if any(reply.error for _, reply in replies):
                    raise SystemExit("a simulator failed to start; run `wav doctor`")
        self.run([replace(spec, max_steps=self.execute_steps) for spec in self.episodes[: self.batch]], keep=False)

    def run(self, episodes: list[EpisodeSpec], keep: bool = True) -> dict[EpisodeSpec, Rollout]:
        """Run ``episodes``; their outcomes."""
        done: dict[EpisodeSpec, Rollout] = {}
        scheduler = Scheduler(
            self.pool,
            self.policy,
            execute_steps=self.execute_steps,
            batch_size=self.batch,
            on_finish=lambda rollout: done.__setitem__(rollout.spec, rollout),
        )
        start, ours, theirs, busy = (
            time.perf_counter(),
            time.process_time(),
            cpu_seconds(self.pool.pids),
            busy_seconds(),
        )
        scheduler.run(episodes)
        if keep:
            seconds = time.perf_counter() - start
            cpu = time.process_time() - ours, cpu_seconds(self.pool.pids) - theirs
            self.seconds.append(seconds)
            self.cpu.append(cpu)
            self.others.append(max(0.0, busy_seconds() - busy - sum(cpu)) / seconds / (os.cpu_count() or 1))
            self.clocks.append(scheduler.clock)
        return done

    def drop(self) -> None:
        """Forget the last turn."""
        for kept in (self.seconds, self.cpu, self.others, self.clocks):
            kept.pop()  # type: ignore[attr-defined]

    def row(self) -> dict[str, Any]:
        """Medians over the turns, per episode where it is a time."""
        count, seconds = len(self.episodes), statistics.median(self.seconds)
        mean = {name: statistics.mean(asdict(clock)[name] for clock in self.clocks) for name in asdict(self.clocks[0])}
        parts = {
            "simulation": mean["simulation_seconds"] / count,
            "rendering": mean["rendering_seconds"] / count,
            "planning": mean["policy_seconds"] / count,
        }
        whole = sum(parts.values())
        return {
            "processes": self.pool.workers,
            "slots": self.pool.slots,
            "batch": self.batch,
            "seconds": {"median": seconds, "min": min(self.seconds), "max": max(self.seconds), "runs": self.seconds},
            "episodes_per_hour": 3600 * count / seconds,
            "seconds_per_episode": parts,
            "share": {name: value / whole for name, value in parts.items()},
            "others": self.others,
            "waiting_seconds": mean["simulation_wait_seconds"] / count,
            "cpu_seconds_per_episode": {
                name: statistics.median(cpu[i] for cpu in self.cpu) / count
                for i, name in enumerate(("policy", "simulators"))
            },
            "policy_call_seconds": mean["policy_seconds"] / mean["policy_calls"],
            "calls_per_episode": mean["policy_rows"] / count,
            "rows_per_call": mean["policy_rows"] / mean["policy_calls"],
            "overdue_calls": mean["overdue_calls"],
        }


def compare(one: dict[EpisodeSpec, Rollout], two: dict[EpisodeSpec, Rollout]) -> float:
    """Largest difference of executed actions; the batch shape rounds differently, the outcome must not differ."""
    largest = 0.0
    for spec, a in one.items():
        b = two[spec]
        if (a.success, a.steps, a.calls) != (b.success, b.steps, b.calls):
            raise SystemExit(f"{spec.name}: {a.success}, {a.steps} steps in turns, {b.success}, {b.steps} in parallel")
        largest = max(largest, float(np.abs(np.concatenate(a.executed) - np.concatenate(b.executed)).max()))
    return largest


def projection(row: dict[str, Any]) -> list[dict[str, float]]:
    """Episodes per hour of more processes with a core each, from the measured parts; nobody has run these.

    ``in_turns``: simulators wait while the policy plans (one batch of slots), ``overlapped``: they never do (two
    batches of slots, the policy on cores or a device of its own).
    """
    simulate = row["seconds_per_episode"]["simulation"] + row["seconds_per_episode"]["rendering"]
    plan = row["calls_per_episode"] * row["policy_call_seconds"] / row["batch"]
    return [
        {
            "processes": workers,
            "in_turns": 3600 / (simulate / workers + plan),
            "overlapped": 3600 / max(simulate / workers, plan),
        }
        for workers in PROJECTED
    ]


def measure(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns, their rows, the ratio and the projection."""
    begun = time.perf_counter()
    episodes = make_episodes(settings, arguments.episodes, arguments.steps)
    data, slots = settings.data, arguments.slots or settings.eval_libero.batch_size
    largest, ratios, disturbed = 0.0, [], 0
    with contextlib.ExitStack() as stack:
        pools = {
            "one": stack.enter_context(SimPool(data.suite, data, workers=1, slots=1)),
            "many": stack.enter_context(SimPool(data.suite, data, workers=arguments.workers, slots=slots)),
        }
        sides = {name: Side(settings, episodes, pool, pool.slots) for name, pool in pools.items()}
        for side in sides.values():
            side.warm()
        renderer = pools["many"].renderer()
        print(f"simulators and policies ready after {time.perf_counter() - begun:.0f} s", flush=True)
        while len(ratios) < arguments.repeats:
            wait_for_quiet(arguments.quiet, begun + arguments.budget)
            start = time.perf_counter()
            found = {name: side.run(episodes) for name, side in sides.items()}
            largest = max(largest, compare(found["one"], found["many"]))
            ratios.append(sides["one"].seconds[-1] / sides["many"].seconds[-1])
            others = max(side.others[-1] for side in sides.values())
            times = ", ".join(f"{name} {side.seconds[-1]:.1f} s" for name, side in sides.items())
            so_far = f"other processes had {others:.0%} of the cores, {time.perf_counter() - begun:.0f} s so far"
            print(f"turn {len(ratios)}: {times} ({so_far})", flush=True)
            last = time.perf_counter() - begun + 1.2 * (time.perf_counter() - start) > arguments.budget
            if others > arguments.quiet and not (last and len(ratios) == 1):
                disturbed += 1
                ratios.pop()
                for side in sides.values():
                    side.drop()
            if last:
                break
    rows = {name: side.row() for name, side in sides.items()}
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "turns_left_out_as_disturbed": disturbed,
        "max_abs_diff": largest,
        "plain_seconds": rows["one"]["seconds"]["median"],
        "ours_seconds": rows["many"]["seconds"]["median"],
        "sides": rows,
        "projection": projection(rows["many"]),
        "renderer": renderer,
    }


def show(result: dict[str, Any]) -> None:
    """The table and what follows from it."""
    print(f"{'':6}{'processes':>10}{'batch':>7}{'episodes/h':>12}{'seconds per episode:':>22}", end="")
    print(f"{'simulation':>12}{'rendering':>11}{'planning':>10}{'rows/call':>11}")
    for name, row in result["sides"].items():
        parts = row["seconds_per_episode"]
        total = row["seconds"]["median"] / result["sizes"]["episodes"]
        widths = {"simulation": 12, "rendering": 11, "planning": 10}
        cells = "".join(f"{parts[part]:{width}.3f}" for part, width in widths.items())
        print(f"{name:6}{row['processes']:10}{row['batch']:7}{row['episodes_per_hour']:12.0f}{total:22.3f}", end="")
        print(f"{cells}{row['rows_per_call']:11.1f}")
        shares = ", ".join(f"{part} {share:.0%}" for part, share in row["share"].items())
        cpu = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in row["cpu_seconds_per_episode"].items())
        print(f"      of the work: {shares}; processor time of an episode: {cpu}")
    print(f"ratio {result['ratio']:.2f}; same outcomes, largest difference of an action {result['max_abs_diff']:.1e}")
    print("projection (not measured) to processes with a core each, episodes/h in turns to overlapped:")
    print(
        "  "
        + "; ".join(f"{p['processes']}: {p['in_turns']:.0f} to {p['overlapped']:.0f}" for p in result["projection"])
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--suite", default="tabletop")
    parser.add_argument("--tasks", type=int, default=2, help="of a suite other than the default one, its first")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="simulator processes")
    parser.add_argument("--slots", type=int, default=0, help="episodes at once, and the batch; 0: as in params.yaml")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the policy, on both sides")
    parser.add_argument("--episodes", type=int, default=8, help="in each turn")
    parser.add_argument("--steps", type=int, default=20, help="environment steps of an episode")
    parser.add_argument("--repeats", type=int, default=5, help="turns at most")
    parser.add_argument("--budget", type=float, default=85.0, help="seconds after which no further turn starts")
    parser.add_argument(
        "--quiet", type=float, default=1.0, help="wait for, and keep, turns in which others have less of the cores"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = load_settings(ROOT / "params.yaml")
    if arguments.suite != settings.data.suite:
        data = DataSettings.model_validate(settings.data.model_dump() | {"suites": (arguments.suite,), "tasks": ()})
        tasks = tuple(spec.name for spec in select_tasks(arguments.suite, ())[: arguments.tasks])
        settings = settings.model_copy(update={"data": data.model_copy(update={"tasks": tasks})})
    before = machine()
    result = measure(settings, arguments)
    result["sizes"] = {
        **{name: getattr(settings, name).model_dump(mode="json") for name in ("data", "model", "planner")},
        **{
            name: getattr(arguments, name)
            for name in ("suite", "episodes", "steps", "workers", "slots", "threads", "quiet")
        },
        "execute_steps": settings.eval_libero.execute_steps,
    }
    result |= {"simulator": simulator_versions(arguments.suite), "machine": before, "load_after": machine()["load"]}
    show(result)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
