"""The planning study: closed-loop success of a trained workspace over the planner's settings and over coupling.

A cell (``cells.py``) is one setting, everything else as in the workspace: paired episodes planned, unplanned and with
the temperature alone, what a call costs, and where the setting decides it, use of the noises and ranking. A cell's JSON
is written when it ends and a later run skips it; within a cell finished episodes are kept, so that it may be killed at
any time. The axes ``coupling`` and ``steps`` (of the joint stage) train a workspace of its own for every other value
(``dvc repro train_joint`` in a copy of this one, where no stage before runs again; ``make up`` must have run). The
hours are said before anything runs::

    make study ARGS=--dry                          # the cells, and the hours they will take
    make study                                     # all that is missing, then tables and plots
    python -m benchmarks.studies.planning workspaces/libero-cpu --axes score K --episodes 25

Everything lies in WORKSPACE/reports/study: ``cells/``, ``episodes/``, ``truth/``, ``plots/``, ``study.json``,
``summary.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.collect import commit, machine
from benchmarks.studies.cells import AXES, Cell, build_cells
from benchmarks.studies.imagined import chosen_and_rejected, truth
from benchmarks.studies.show import write_summary
from wav.config import EvalLiberoSettings, Runtime, Settings, load_settings
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.evaluation.evaluate import evaluate
from wav.evaluation.instruments.executed import all_returns
from wav.evaluation.instruments.oracle import held_out_windows, oracle
from wav.evaluation.instruments.ranking import ranking
from wav.evaluation.instruments.swap import swaps
from wav.evaluation.instruments.use import held_out_histories, noise_use
from wav.evaluation.intervals import paired_difference
from wav.evaluation.protocol import code_digest, other_instructions
from wav.evaluation.records import EpisodeRecord, read_record, step_limits, summarise
from wav.evaluation.report import build_report
from wav.io.files import canonical_digest, read_json, write_json
from wav.local import PROJECT
from wav.local.workspace import fill_workspace
from wav.planning import VARIANTS
from wav.planning.types import Levels
from wav.policy.export import policy_from_stages
from wav.policy.policy import Policy
from wav.sim.env import Observation
from wav.sim.futures import Branch, branches
from wav.sim.registry import select_tasks
from wav.sim.workers import SimPool

#: Success is reported within these multiples of the direct expert's steps, besides ``eval_libero.within`` and at all.
WITHIN = (1.0, 1.25, 1.5, 2.0)
#: Axes whose cells differ in what scores are worth, and in what the noises decide.
RANKED, USED = ("base", "coupling", "score", "phi", "passes"), ("base", "coupling", "passes")
CANDIDATES, BASE_CANDIDATES = 16, 32
TRAINED = ("train_value", "train_joint")


@dataclass
class Source:
    """A trained workspace."""

    folder: Path
    settings: Settings
    policy: Policy
    checkpoint: str
    store: EpisodeStore

    @classmethod
    def open(cls, folder: Path, device: str) -> Source:
        """What `dvc repro train_joint` left; DataError or CheckpointError where a part is missing."""
        settings = load_settings(folder / "params.yaml")
        parts = folder / "models" / "joint", folder / "data" / "latents", settings.data, settings.planner
        policy, checkpoint = policy_from_stages(*parts, batch_size=settings.eval_libero.batch_size, device=device)
        return cls(folder, settings, policy, checkpoint.digest, EpisodeStore.open(folder / "data" / "episodes"))

    def planning(self, cell: Cell) -> Policy:
        """The policy with the cell's planner and levels."""
        policy = copy.copy(self.policy)
        policy.planner, policy.levels = cell.planner, Levels(cell.schedule, self.policy.levels.value)
        return policy

    def trains(self, cell: Cell) -> bool:
        """Whether the cell needs another training than this workspace's."""
        return bool(cell.steps) or cell.mode != self.policy.coupling.mode

    def beside(self, cell: Cell) -> Path:
        """The workspace in which another mode of coupling, or another number of steps, is trained."""
        own = self.folder.resolve()
        name = f"{cell.steps}-steps" if cell.steps else cell.mode
        return PROJECT / "workspaces" / f"{'study' if own == PROJECT else own.name}-{name}"

    def minutes(self) -> float:
        """What this workspace's value and joint stages took."""
        stages = [read_json(self.folder / f"reports/stages/{name}.json", "run `dvc repro`") for name in TRAINED]
        return float(sum(stage["seconds"] for stage in stages)) / 60


def cost(
    policy: Policy, variants: Sequence[str], observations: Sequence[Observation], repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Median seconds and peak memory of a policy call on ``observations``, per variant."""
    found, rows, cuda = {}, list(range(len(observations))), policy.model.device.type == "cuda"
    for variant in variants:
        seconds = []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # on Linux the peak of resident memory begins again
                Path("/proc/self/clear_refs").write_text("5")
        for _ in range(repeats):
            for row in rows:
                policy.reset(row, "cost", 0)
            begun = time.perf_counter()
            policy.act(observations, rows, variant=variant)
            seconds.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[variant] = {"seconds_a_call": statistics.median(seconds), "peak_memory_gib": round(peak / 2**30, 3)}
    return found


def records_of(folder: Path) -> list[EpisodeRecord]:
    """Finished episodes of a cell."""
    return [read_record(path) for path in sorted((folder / "episodes").glob("*/*.json"))]


def against(
    records: Sequence[EpisodeRecord], base: Sequence[EpisodeRecord], steps: Mapping[str, int]
) -> dict[str, Any]:
    """Planned episodes of two cells, paired: success within ``steps`` of each task, and at all (``limit``)."""
    sides = [{(r.task, r.init_index): r for r in several if r.variant == "planned"} for several in (records, base)]
    common, found = sorted(sides[0].keys() & sides[1].keys()), {}
    for name, limits in (("within", steps), ("limit", {})):
        solved = [[s[k].solved and s[k].steps <= limits.get(k[0], s[k].steps) for k in common] for s in sides]
        found[name] = paired_difference(*solved).as_dict()
    return found


@dataclass
class Study:
    """The cells of one workspace and what running them needs."""

    source: Source
    out: Path
    protocol: EvalLiberoSettings
    states: int
    runtime: Runtime = field(default_factory=Runtime)
    branches: list[Branch] = field(default_factory=list)

    def source_of(self, cell: Cell) -> Source:
        """The workspace that the cell's model is trained in, now where it is another one and not there yet."""
        if not self.source.trains(cell):
            return self.source
        folder, changed = self.source.beside(cell), self.source.settings.model_dump()
        changed["coupling"] |= {"mode": cell.mode, "video_schedule": cell.schedule}
        changed["train_joint"]["steps"] = cell.steps or changed["train_joint"]["steps"]
        note = f"# {self.source.folder / 'params.yaml'} with {cell.name}, by make study.\n"
        fill_workspace(folder, Settings.model_validate(changed), note)
        if not (folder / "dvc.lock").exists():  # outputs that persist never come from DVC's run cache
            left_out = shutil.ignore_patterns("eval", "study")
            for name in ("data", "models", "reports"):
                shutil.copytree(self.source.folder / name, folder / name, ignore=left_out, dirs_exist_ok=True)
            shutil.copy(self.source.folder / "dvc.lock", folder)
        subprocess.run([sys.executable, "-m", "dvc", "repro", "train_joint"], cwd=folder, check=True)
        return Source.open(folder, self.runtime.device)

    def steps(self, factor: float) -> dict[str, int]:
        """Steps by task that are ``factor`` times the direct expert's; empty where no demonstration is direct."""
        data = self.source.settings.data
        tasks = [task.name for task in select_tasks(data.suite, data.tasks)]
        return step_limits(self.source.store, self.protocol.model_copy(update={"within": factor}), tasks)

    def protocol_of(self, cell: Cell) -> EvalLiberoSettings:
        """The study's protocol with the actions that the cell executes of a plan."""
        return self.protocol.model_copy(update={"execute_steps": cell.execute_steps})

    def key(self, cell: Cell, checkpoint: str) -> str:
        """Digest of what decides the cell's result."""
        planner, protocol = cell.planner.model_dump(mode="json"), self.protocol_of(cell).model_dump(mode="json")
        return canonical_digest([planner, cell.schedule, checkpoint, protocol, self.states, code_digest()])

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result where it is there and still true."""
        path = self.out / "cells" / f"{cell.name}.json"
        found = read_json(path, "remove it to run the cell again") if path.exists() else None
        weights = found["checkpoint"] if found and self.source.trains(cell) else self.source.checkpoint
        if found and found["key"] == self.key(cell, weights):
            return dict(found)
        return None

    def run(self, cell: Cell, base: Cell, pool: SimPool) -> dict[str, Any]:
        """Run a cell and write its JSON; one that is the base once more takes the base's result."""
        same = self.finished(base) if cell.setting == base.setting else None
        result = (same or self.measure(cell, pool)) | {"axis": cell.axis, "value": cell.value}
        (self.out / "cells").mkdir(parents=True, exist_ok=True)
        write_json(self.out / "cells" / f"{cell.name}.json", result)
        return result

    def measure(self, cell: Cell, pool: SimPool) -> dict[str, Any]:
        """A cell's result; finished episodes of a run that was killed are kept."""
        begun, source = time.perf_counter(), self.source_of(cell)
        policy, folder, base = source.planning(cell), self.out / "episodes" / cell.name, self.out / "episodes/base=base"
        if not folder.exists() and (base / "episodes" / "unplanned").is_dir():
            # acting unplanned is the same whatever the planner; a record of another key is run again
            shutil.copytree(base / "episodes" / "unplanned", folder / "episodes" / "unplanned")
        changes = {"planner": cell.planner, "eval_libero": self.protocol_of(cell)}
        settings, steps = source.settings.model_copy(update=changes), self.steps(self.protocol.within)
        metrics = evaluate(settings, policy, folder, pool=pool, checkpoint=source.checkpoint, limits=steps)
        records, histories = records_of(folder), self.histories(self.protocol.batch_size)
        variants = self.protocol.variants
        costs = cost(policy, variants, [history[-1] for history in histories])
        soon = {factor: summarise(records, {}, limits) for factor in WITHIN if (limits := self.steps(factor))}
        result = {
            "key": self.key(cell, source.checkpoint),
            "planner": cell.planner.model_dump(mode="json"),
            "coupling": {"mode": cell.mode, "video_schedule": list(cell.schedule), "value_level": policy.levels.value},
            "checkpoint": source.checkpoint,
            "training_minutes": round(source.minutes(), 1),
            "steps": steps,
            "execute_steps": cell.execute_steps,
            "variants": {name: metrics[name] | costs[name] for name in variants},
            "within": {
                str(factor): {name: found[name]["within"] for name in variants} for factor, found in soon.items()
            },
            "paired": metrics["paired"],
            "paired_within": metrics.get("paired_within", metrics["paired"]),
            "base": against(records, records_of(base), steps),
        }
        if cell.axis in USED:
            result |= self.look(policy, source)
        if cell.axis in RANKED and self.states:
            result["ranking"] = self.rank(policy, BASE_CANDIDATES if cell.axis == "base" else CANDIDATES)
        return result | {"seconds": round(time.perf_counter() - begun, 1)}

    def look(self, policy: Policy, source: Source) -> dict[str, Any]:
        """Use of the noises, whether actions follow another's future and values, and errors given the true ones."""
        folder, data, histories = source.folder / "data", source.settings.data, self.histories()
        latents = LatentStore.open(folder / "latents", source.store)
        windows = held_out_windows(source.store, latents, RewardStore.open(folder / "rewards", source.store), policy)
        found = {"use": noise_use(policy, histories), "oracle": oracle(policy, windows)}
        return found | {"swap": swaps(policy, histories, other_instructions(data))}

    def rank(self, policy: Policy, count: int) -> dict[str, Any]:
        """Scores beside what executing ``count`` candidates returned, from the same states in every cell."""
        settings, workers = self.source.settings, self.runtime.workers
        self.branches = self.branches or branches(
            settings.data, self.protocol.states(self.states), 2, self.protocol.execute_steps, workers
        )
        executed = functools.partial(all_returns, settings.data, settings.label_rewards, workers)
        return ranking(policy, self.branches, executed, count)

    def histories(self, *count: int) -> list[list[Observation]]:
        """What the policy has seen at states of held-out demonstrations."""
        return held_out_histories(self.source.store, self.source.policy.data.views, self.protocol.execute_steps, *count)

    def hours(self, cells: Sequence[Cell], base: Cell) -> str:
        """What ``cells`` will take, by what the workspace's own evaluation and training took."""
        timing = read_json(self.source.folder / "reports/eval/metrics.json", "run `dvc repro eval_libero`")["timing"]
        tasks = {row.task for row in self.source.store.episodes}
        episodes = len(self.protocol.variants) * self.protocol.episodes_per_task * len(tasks)
        work = sum(cell.work / base.work for cell in cells if cell == base or cell.setting != base.setting)
        whole, other = self.source.settings.train_joint.steps, filter(self.source.trains, cells)
        steps = sum(cell.steps or whole for cell in other if not (self.source.beside(cell) / "dvc.lock").exists())
        rate = timing["episodes_per_hour"]  # 0 where it was resumed whole
        evaluating = f"about {episodes * work / rate:.1f}" if rate else "an unknown number of"
        training = steps / whole * self.source.minutes() / 60
        return f"{evaluating} hours of episodes, {training:.1f} of training"


def say(text: str) -> None:
    """One line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def finish(study: Study, cells: Sequence[Cell]) -> None:
    """What the base imagines beside the truth, then one JSON, the plots and the summary."""
    source, plots = study.source, study.out / "plots"
    rewards = RewardStore.open(source.folder / "data" / "rewards", source.store)
    write_json(study.out / "truth.json", truth(source.policy, source.store, rewards, source.settings, study.out))
    chosen_and_rejected(source.policy, source.store, plots)
    head = {"command": "make study", "commit": commit(), "machine": machine(), "suite": source.settings.data.suite}
    write_summary(
        study.out, head | {"settings": source.settings.model_dump(mode="json")}, [cell.name for cell in cells]
    )
    say(f"{study.out / 'summary.md'}")
    if study.out.resolve() == (source.folder / "reports" / "study").resolve():
        say(f"{build_report(source.folder, source.settings)}")


def main() -> None:
    """State the hours, run what is missing, write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", nargs="?", type=Path, default=Path(), help="with a trained joint model")
    parser.add_argument("--out", type=Path, help="instead of WORKSPACE/reports/study")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--episodes", type=int, default=50, help="initial states of each task, at most 50")
    hint = "what planning is compared with; unplanned costs little, being shared"
    parser.add_argument(
        "--controls", nargs="*", choices=VARIANTS[1:], default=VARIANTS[1:], metavar="VARIANT", help=hint
    )
    parser.add_argument("--states", type=int, default=8, help="initial states per task from which scores are ranked")
    parser.add_argument("--dry", action="store_true", help="list cells and hours, run nothing")
    chosen = parser.parse_args()
    runtime = Runtime()
    torch.set_num_threads(runtime.threads or os.cpu_count() or 1)
    source = Source.open(chosen.workspace, runtime.device)
    variants = (VARIANTS[0], *chosen.controls)
    changes = {"episodes_per_task": chosen.episodes, "variants": variants, "swapped_episodes": 0, "videos": 0}
    protocol = source.settings.eval_libero.model_copy(update=changes)
    study = Study(source, chosen.out or chosen.workspace / "reports" / "study", protocol, chosen.states, runtime)
    data, cells = source.settings.data, build_cells(source.settings, chosen.axes)
    left = [cell for cell in cells if study.finished(cell) is None]
    say(f"{len(cells)} cells, {len(left)} to run: {study.hours(left, cells[0])}")
    if chosen.dry:
        say("\n".join(f"  {cell.name}{'' if cell in left else ' (finished)'}" for cell in cells))
        return
    with SimPool(data.suite, data, workers=runtime.workers, slots=protocol.batch_size) as pool:
        for number, cell in enumerate(left, 1):
            result = study.run(cell, cells[0], pool)
            rates = [f"{name} {100 * found['success_rate']:.0f}%" for name, found in result["variants"].items()]
            say(f"{number}/{len(left)} {cell.name}: {', '.join(rates)}, {result['seconds']:.0f} s")
    finish(study, cells)


if __name__ == "__main__":
    main()
