"""The planning study: closed-loop success of a trained workspace over the planner's settings and over coupling.

A cell is one setting, everything else as in the workspace: paired episodes planned, unplanned and with the temperature
alone, what a call costs, and where the setting decides it, use of the noises and ranking. A cell's JSON is written when
it ends and a later run skips it; within a cell finished episodes are kept, so that it may be killed at any time. The
coupling axis trains a workspace of its own for every other mode (`dvc repro train_joint` there; stages that do not
change come from DVC's run cache). The hours are said before anything runs:

    make study ARGS=--dry                          # the cells and the hours, from calls measured here
    make study                                     # all that is missing, then tables and plots
    python -m benchmarks.studies.planning workspaces/libero-cpu --axes base score K --episodes 25

Everything lies in ``WORKSPACE/reports/study``: ``cells/``, ``episodes/``, ``plots/``, ``study.json``, ``summary.md``.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.collect import commit, machine
from benchmarks.studies.imagined import chosen_and_rejected, truth
from benchmarks.studies.show import write_summary
from infra.local.workspace import fill_workspace
from wav.config import PlannerSettings, Runtime, Settings, load_settings
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.evaluation.evaluate import evaluate
from wav.evaluation.held_out import held_out_episodes, observed
from wav.evaluation.instruments.ranking import ranking
from wav.evaluation.instruments.use import held_out_histories, noise_use
from wav.evaluation.intervals import paired_difference, wilson
from wav.evaluation.protocol import code_digest
from wav.evaluation.records import EpisodeRecord, read_record
from wav.io.files import canonical_digest, read_json, write_json
from wav.local import PROJECT
from wav.planning import VARIANTS
from wav.planning.scores import SCORES
from wav.planning.types import Levels
from wav.policy.export import policy_from_stages
from wav.policy.policy import Policy
from wav.sim.env import Observation
from wav.sim.futures import Branch, branches, execute_all
from wav.sim.workers import SimPool

MODES = ("none", "future", "value", "both")
AXES = ("base", "coupling", "score", "passes", "act_on", "phi", "gate", "K", "M", "N", "budget")
AXES = (*AXES, "alpha", "beta", "K1", "K2")
#: Time limits: these multiples of the direct demonstrations' median length, besides the protocol's limit.
WITHIN = (1.0, 1.25, 1.5, 2.0)
RANKED, USED = ("base", "coupling", "score", "passes"), ("base", "coupling", "passes")
TRAINED = ("train_value", "train_joint")
CANDIDATES = 16
#: Seconds of a core per environment step, rendering included (benchmarks/results/evaluate-cpu.json), and how full the
#: batches of an evaluation are (benchmarks/results/tabletop-default.json): for the hours alone.
STEP_SECONDS, FILLED = 0.0125, 0.6


@dataclass(frozen=True)
class Cell:
    """One setting: ``planner`` whole, the video passes' noise levels, and the mode of coupling trained with."""

    axis: str
    value: str
    planner: PlannerSettings
    schedule: tuple[float, ...]
    mode: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.axis}={self.value}"


def planner_with(planner: PlannerSettings, change: Mapping[str, Any]) -> PlannerSettings:
    """``planner`` with a change; elites are no more than the candidates then are."""
    new = planner.model_dump() | dict(change)
    new["video_elites"] = min(new["video_elites"], new["video_samples"])
    new["value_elites"] = min(new["value_elites"], new["video_samples"] * new["value_samples"])
    return PlannerSettings.model_validate(new)


def build_cells(settings: Settings, mode: str, schedule: tuple[float, ...], axes: Sequence[str]) -> list[Cell]:
    """The cells of ``axes`` around the workspace's planner, trained ``mode`` and ``schedule``."""
    base, coupling = settings.planner, settings.coupling
    budget, most = base.iterations * base.video_samples, base.video_samples * base.value_samples
    sweeps: dict[str, dict[Any, dict[str, Any]]] = {
        "base": {"base": {}},
        "K": {k: {"iterations": k} for k in (1, 2, 3, 5)},
        "M": {m: {"video_samples": m} for m in (2, 4, 8, 16)},
        "N": {n: {"value_samples": n} for n in (1, 2, 4, 8)},
        "budget": {f"{k}x{budget // k}": {"iterations": k, "video_samples": budget // k} for k in (1, 2, 4)},
        "alpha": {share: {"alpha": share} for share in (0.1, 0.5, 1.0)},
        "beta": {share: {"beta": share} for share in (0.1, 0.5, 1.0)},
        "K1": {k: {"video_elites": k} for k in (1, 2, 4, 8) if k <= base.video_samples},
        "K2": {k: {"value_elites": k} for k in (1, 4, 8, 16) if k <= most},
        "score": {name: {"score": name} for name in SCORES},
        "phi": {name: {"phi": name} for name in ("max", "mean")},
        "act_on": {name: {"act_on": name} for name in ("sample", "winner")},
        "gate": {gate: {"gate": gate} for gate in (0.0, 0.02, 0.05, 0.1)},
    }
    low, high = coupling.future_levels
    last = schedule[-1] if schedule[-1] < 1 else (low + high) / 2
    passes = {1: (1.0,), 2: (1.0, last), 3: (1.0, (1 + last) / 2, last)}
    cells = []
    for axis in axes:
        if axis == "coupling":
            deep = {other: passes[len(schedule) if len(schedule) > 1 else 2] for other in ("future", "both")}
            levels = {"none": (1.0,), "value": (1.0,), **deep} | {mode: schedule}
            cells += [Cell(axis, other, base, levels[other], other) for other in MODES]
        elif axis == "passes":
            allowed = passes if mode in ("future", "both") else {1: (1.0,)}
            cells += [Cell(axis, str(count), base, levels, mode) for count, levels in allowed.items()]
        else:
            changes = sweeps[axis].items()
            cells += [Cell(axis, str(name), planner_with(base, change), schedule, mode) for name, change in changes]
    return cells


@dataclass
class Source:
    """A trained workspace."""

    workspace: Path
    settings: Settings
    policy: Policy
    checkpoint: str
    store: EpisodeStore

    @classmethod
    def open(cls, workspace: Path, device: str) -> Source:
        """What `dvc repro train_joint` left; raises DataError or CheckpointError where a part is missing."""
        settings = load_settings(workspace / "params.yaml")
        policy, checkpoint = policy_from_stages(
            workspace / "models" / "joint",
            workspace / "data" / "latents",
            settings.data,
            settings.planner,
            batch_size=settings.eval_libero.batch_size,
            device=device,
        )
        return cls(workspace, settings, policy, checkpoint.digest, EpisodeStore.open(workspace / "data" / "episodes"))

    def planning(self, cell: Cell) -> Policy:
        """The policy with the cell's planner and levels."""
        policy = copy.copy(self.policy)
        policy.planner, policy.levels = cell.planner, Levels(cell.schedule, self.policy.levels.value)
        return policy


def limits(store: EpisodeStore) -> list[int]:
    """Time limits in environment steps, by the direct demonstrations that succeeded (all, where none is direct)."""
    done = [info for info in store.episodes if info.success]
    lengths = [info.length for info in done if info.style == "direct"] or [info.length for info in done]
    return [round(factor * statistics.median(lengths)) for factor in WITHIN]


def cost(policy: Policy, observations: Sequence[Observation], repeats: int = 3) -> dict[str, dict[str, float]]:
    """Median seconds and peak memory of a policy call of one full batch, per variant."""
    found, rows, cuda = {}, list(range(len(observations))), policy.model.device.type == "cuda"
    for variant in VARIANTS:
        seconds = []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins again
        for _ in range(repeats):
            for row in rows:
                policy.reset(row, "cost", 0)
            begun = time.perf_counter()
            policy.act(observations, rows, variant=variant)
            seconds.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[variant] = {"seconds_a_call": statistics.median(seconds), "peak_memory_gib": round(peak / 2**30, 3)}
    return found


def outcome(records: Sequence[EpisodeRecord], within: Sequence[int]) -> dict[str, Any]:
    """Success with Wilson's interval, without and within time limits, and steps to success."""
    solved = [record.steps for record in records if record.solved]
    ranks = sorted([*solved, *[float("inf")] * (len(records) - len(solved))])
    median = ranks[len(ranks) // 2]
    return {
        "success": wilson(len(solved), len(records)).as_dict(),
        "within": {str(w): wilson(sum(s <= w for s in solved), len(records)).as_dict() for w in within},
        "median_steps": median if median < float("inf") else None,
        "mean_steps_to_success": statistics.mean(solved) if solved else None,
    }


def paired(one: Sequence[EpisodeRecord], two: Sequence[EpisodeRecord], within: Sequence[int]) -> dict[str, Any]:
    """Differences over the episodes that both have, without (``limit``) and within time limits."""
    a, b = ({(r.task, r.init_index): r for r in records} for records in (one, two))
    common = sorted(a.keys() & b.keys())
    found = {}
    for name, most in [("limit", sys.maxsize), *((str(w), w) for w in within)]:
        sides = ([side[cell].solved and side[cell].steps <= most for cell in common] for side in (a, b))
        found[name] = paired_difference(*sides).as_dict()
    return found


def records_of(folder: Path, variant: str) -> list[EpisodeRecord]:
    """Finished episodes of an evaluation."""
    return [read_record(path) for path in sorted((folder / "episodes" / variant).glob("*.json"))]


@dataclass
class Study:
    """The cells of one workspace and what running them needs."""

    source: Source
    out: Path
    episodes: int
    states: int
    runtime: Runtime
    found: list[Branch] | None = None

    def source_of(self, cell: Cell) -> Source:
        """The workspace of the cell's mode, trained now where it is another one's and not there yet."""
        if cell.mode == self.source.policy.coupling.mode:
            return self.source
        folder = workspace_of(self.source, cell)
        coupling = {"mode": cell.mode, "video_schedule": cell.schedule}
        settings = self.source.settings.model_dump() | {
            "coupling": self.source.settings.coupling.model_dump() | coupling
        }
        note = f"# {self.source.workspace / 'params.yaml'} with coupling.mode: {cell.mode}, by make study.\n"
        fill_workspace(folder, Settings.model_validate(settings), note)
        subprocess.run([sys.executable, "-m", "dvc", "repro", "train_joint"], cwd=folder, check=True)
        return Source.open(folder, self.runtime.device)

    def evaluation(self) -> dict[str, Any]:
        """What the study changes in section ``eval_libero``."""
        return {"episodes_per_task": self.episodes, "variants": VARIANTS, "swapped_episodes": 0, "videos": 0}

    def key(self, cell: Cell, checkpoint: str) -> str:
        """Digest of what decides the cell's result."""
        parts = [cell.planner.model_dump(mode="json"), cell.schedule, checkpoint, self.episodes, self.states]
        return canonical_digest([*parts, self.source.settings.eval_libero.model_dump(mode="json"), code_digest()])

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result where it is there and still true."""
        path = self.out / "cells" / f"{cell.name}.json"
        found = read_json(path, "remove it to run the cell again") if path.exists() else None
        own = cell.mode == self.source.policy.coupling.mode
        if found and found["key"] == self.key(cell, self.source.checkpoint if own else found["checkpoint"]):
            return dict(found)
        return None

    def run(self, cell: Cell, base: Cell, pool: SimPool) -> dict[str, Any]:
        """Run a cell and write its JSON; one that is the base once more takes the base's result."""
        same = replace(cell, axis=base.axis, value=base.value) == base and cell != base
        result = (self.finished(base) if same else None) or self.measure(cell, pool)
        result |= {"axis": cell.axis, "value": cell.value}
        write_json(self.out / "cells" / f"{cell.name}.json", result)
        return result

    def measure(self, cell: Cell, pool: SimPool) -> dict[str, Any]:
        """A cell's result; finished episodes of a run that was killed are kept."""
        begun, source = time.perf_counter(), self.source_of(cell)
        key, within = self.key(cell, source.checkpoint), limits(self.source.store)
        policy, folder = source.planning(cell), self.out / "episodes" / cell.name
        base = self.out / "episodes" / "base=base"
        if base != folder and not folder.exists() and (base / "episodes" / "unplanned").is_dir():
            # acting unplanned is the same whatever the planner: a record of another key is run again
            shutil.copytree(base / "episodes" / "unplanned", folder / "episodes" / "unplanned")
        protocol = self.source.settings.eval_libero.model_copy(update=self.evaluation())
        settings = source.settings.model_copy(update={"planner": cell.planner, "eval_libero": protocol})
        evaluate(settings, policy, folder, pool=pool, checkpoint=source.checkpoint)
        records = {variant: records_of(folder, variant) for variant in VARIANTS}
        costs, planned = cost(policy, self.observations()), records["planned"]
        sides = {name: records[name] for name in ("unplanned", "temperature")} | {"base": records_of(base, "planned")}
        result = {
            "key": key,
            "planner": cell.planner.model_dump(mode="json"),
            "coupling": {"mode": cell.mode, "video_schedule": cell.schedule, "value_level": policy.levels.value},
            "checkpoint": source.checkpoint,
            "variants": {name: outcome(records[name], within) | costs[name] for name in VARIANTS},
            "paired": {f"planned-{name}": paired(planned, other, within) for name, other in sides.items()},
        }
        every = protocol.execute_steps
        if cell.axis in USED:
            result["use"] = noise_use(policy, held_out_histories(source.store, policy.data.views, every))
        if cell.axis in RANKED and self.states:
            result["ranking"] = self.ranking(policy, source.settings, 2 * CANDIDATES if cell.axis == "base" else 0)
        result["seconds"] = round(time.perf_counter() - begun, 1)
        return result

    def ranking(self, policy: Policy, settings: Settings, count: int) -> dict[str, Any]:
        """Scores beside what executing the candidates returned, from the same states in every cell."""
        data, workers = settings.data, self.runtime.workers
        if self.found is None:
            self.found = branches(data, range(self.states), 2, settings.eval_libero.execute_steps, workers)
        run = lambda chunks: execute_all(data, chunks, workers)  # noqa: E731
        return ranking(policy, self.found, run, settings.label_rewards, count or CANDIDATES)

    def observations(self) -> list[Observation]:
        """A full batch of first observations of held-out demonstrations."""
        store, views = self.source.store, self.source.policy.data.views
        held, size = held_out_episodes(store), self.source.policy.batch_size
        return [observed(store[held[i % len(held)]], 0, views) for i in range(size)]

    def hours(self, cells: Sequence[Cell]) -> tuple[float, float]:
        """Hours that evaluating and that training for ``cells`` will take, from one call of the base measured now."""
        settings, store, mode = self.source.settings, self.source.store, self.source.policy.coupling.mode
        costs, size = cost(self.source.policy, self.observations(), 1), settings.eval_libero.batch_size
        unplanned, planned = (costs[name]["seconds_a_call"] for name in ("unplanned", "planned"))
        searched = (planned - unplanned) / max(1, work(settings.planner, self.source.policy.levels.video))
        steps, workers = limits(store)[2], self.runtime.workers or os.cpu_count() or 1
        episodes = self.episodes * len({info.task for info in store.episodes})
        total = 0.0
        for cell in cells:
            if cell.planner == settings.planner and cell.axis not in ("base", "coupling", "passes"):
                continue  # the base once more
            alone = cell.axis in ("base", "passes", "coupling")  # whose unplanned episodes no other cell has
            seconds = (2 + alone) * unplanned + 2 * searched * work(cell.planner, cell.schedule)
            total += episodes * steps / settings.eval_libero.execute_steps * seconds / (FILLED * size)
            executed = 4 * self.states * CANDIDATES * settings.data.action_chunk if cell.axis in RANKED else 0
            total += (episodes * steps * (2 + alone) + executed) * STEP_SECONDS / workers
        stages = self.source.workspace / "reports" / "stages"
        training = sum(read_json(stages / f"{name}.json", "run `dvc repro`")["seconds"] for name in TRAINED)
        missing = {c.mode for c in cells if c.mode != mode and not (workspace_of(self.source, c) / "dvc.lock").exists()}
        return total / 3600, len(missing) * training / 3600


def work(planner: PlannerSettings, schedule: Sequence[float]) -> int:
    """What a search costs, in passes of the video model and of the value flow."""
    return planner.iterations * planner.video_samples * (len(schedule) + planner.value_samples)


def workspace_of(source: Source, cell: Cell) -> Path:
    """Where the cell's mode of coupling is trained."""
    own = source.workspace.resolve()
    return PROJECT / "workspaces" / f"{'study' if own == PROJECT else own.name}-{cell.mode}"


def say(text: str) -> None:
    """One line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """State the hours, run what is missing, write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "workspace", nargs="?", type=Path, default=Path(), help="a workspace with a trained joint model"
    )
    parser.add_argument("--out", type=Path, help="instead of WORKSPACE/reports/study")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--episodes", type=int, default=50, help="initial states of each task, at most 50")
    parser.add_argument("--states", type=int, default=8, help="initial states per task from which scores are ranked")
    parser.add_argument("--dry", action="store_true", help="list cells and hours, run nothing")
    chosen = parser.parse_args()
    runtime = Runtime()
    torch.set_num_threads(runtime.threads or os.cpu_count() or 1)
    source = Source.open(chosen.workspace, runtime.device)
    study = Study(source, chosen.out or chosen.workspace / "reports" / "study", chosen.episodes, chosen.states, runtime)
    axes = ["base", *(axis for axis in chosen.axes if axis != "base")]  # what every other cell is compared with
    cells = build_cells(source.settings, source.policy.coupling.mode, source.policy.levels.video, axes)
    left = [cell for cell in cells if study.finished(cell) is None]
    evaluating, training = study.hours(left)
    say(f"{len(cells)} cells, {len(left)} to run: about {evaluating:.1f} hours, and {training:.1f} of training")
    if chosen.dry:
        say("\n".join(f"  {cell.name}{'' if cell in left else ' (finished)'}" for cell in cells))
        return
    (study.out / "cells").mkdir(parents=True, exist_ok=True)
    data = source.settings.data
    with SimPool(data.suite, data, workers=runtime.workers, slots=source.settings.eval_libero.batch_size) as pool:
        for number, cell in enumerate(left, 1):
            result = study.run(cell, cells[0], pool)
            rates = {name: 100 * found["success"]["success_rate"] for name, found in result["variants"].items()}
            shown = ", ".join(f"{name} {rate:.0f}%" for name, rate in rates.items())
            say(f"{number}/{len(left)} {cell.name}: {shown}, {result['seconds']:.0f} s")
    rewards = RewardStore.open(source.workspace / "data" / "rewards", source.store)
    write_json(study.out / "truth.json", truth(source.policy, source.store, rewards, source.settings, study.out))
    chosen_and_rejected(source.policy, source.store, study.out / "plots")
    head = {"command": "make study", "commit": commit(), "machine": machine(), "suite": data.suite}
    head |= {
        "limits": limits(source.store),
        "episodes": chosen.episodes,
        "settings": source.settings.model_dump(mode="json"),
    }
    write_summary(study.out, head, [cell.name for cell in cells])
    say(f"{study.out / 'summary.md'}")


if __name__ == "__main__":
    main()
