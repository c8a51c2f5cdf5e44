"""What is evaluated: the list of episodes, and the checks that must pass before the first one.

An episode is a pure function of its :class:`EpisodeSpec`, the seed, the checkpoint and the settings in its key
(:func:`episode_key`): the noise depends on (seed, suite, task, initial state, call) only and is the same for every
variant, so that variants are compared on equal terms. Swapped probes start a task's scene with the instruction of
another task of the same scene and ask which of the two the policy does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import wav
from wav.config import DataSettings, EvalLiberoSettings, PlannerSettings
from wav.data.conventions import Conventions
from wav.data.names import full_name, own_task
from wav.errors import ConfigError
from wav.inference.cpu import kernels
from wav.io.files import canonical_digest
from wav.planning import Variant
from wav.sim.env import TaskSpec
from wav.sim.registry import select_tasks
from wav.source_code import module_digests

if TYPE_CHECKING:
    from wav.planning.types import Levels

#: Environment steps of every suite under ``budget: reference`` (its loop counts policy calls; spec section 7.9).
REFERENCE_BUDGET = 1000
#: Variants that the swapped-instruction probes run under, where they are evaluated at all.
SWAPPED_VARIANTS: tuple[Variant, ...] = ("planned", "unplanned")
#: What decides an episode's result is what these import: a change there makes finished records worthless.
_ENTRIES = ("wav.evaluation.protocol", "wav.evaluation.rollout", "wav.policy.policy", "wav.sim.worker")
#: Ends ``versions.kernels`` where compiled code planned (:mod:`wav.inference.compiled`), which rounds otherwise.
COMPILED = ", compiled"
_PACKAGES = ("torch", "numpy", "mujoco", "robosuite")


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to run.

    ``suite`` is the one that the task is of; of several the task's name carries it too (:mod:`wav.data.names`).
    ``instructed`` is the task whose instruction is given: ``task`` unless swapped. ``row`` modulo the batch size is the
    episode's place in the policy's batch: matrix products round differently from place to place. ``protocol_steps`` is
    the suite's published limit where ``max_steps`` is longer, else 0.
    """

    suite: str
    task: str
    init_index: int
    variant: Variant
    instructed: str
    instruction: str
    max_steps: int
    seed: int
    row: int
    record: bool = False
    protocol_steps: int = 0

    @property
    def swapped(self) -> bool:
        """Whether the instruction is another task's."""
        return self.instructed != self.task

    @property
    def group(self) -> str:
        """Folder of the record: the variant, or ``swapped-<variant>``."""
        return f"swapped-{self.variant}" if self.swapped else self.variant

    @property
    def name(self) -> str:
        """``<task>-<index>``: the record's file within its group; of several suites in a folder of its own."""
        return f"{self.task}-{self.init_index:03d}"

    @property
    def picture(self) -> str:
        """Stem of the files of its video and strip."""
        return f"{self.suite}-{self.group}-{own_task(self.suite, self.name)[1]}"

    @property
    def noise_name(self) -> str:
        """What the noise may depend on besides seed and call: never the variant or the instruction."""
        return f"{full_name(self.suite, self.task)}/{self.init_index}"


def _other_task(name: str, names: Sequence[str], specs: Mapping[str, TaskSpec]) -> str | None:
    """The next evaluated task that shares the scene, or None."""
    scene = [other for other in names if specs[other].scene == specs[name].scene]
    return scene[(scene.index(name) + 1) % len(scene)] if len(scene) > 1 else None


def other_instructions(data: DataSettings) -> dict[str, str]:
    """Instruction of each evaluated task -> that of another one of the same scene, for tasks that share theirs."""
    specs = {spec.name: spec for spec in select_tasks(data.suite, data.tasks)}
    pairs = ((name, _other_task(name, list(specs), specs)) for name in specs)
    return {specs[name].instruction: specs[other].instruction for name, other in pairs if other is not None}


def build_episodes(data: DataSettings, settings: EvalLiberoSettings) -> tuple[EpisodeSpec, ...]:
    """All episodes in the order they run: variant by variant, initial state by initial state, task by task.

    The first ``settings.videos`` of each variant are recorded. Swapped probes are not part of the reference's
    evaluation and keep the protocol's limit under any budget.

    Raises:
        ConfigError: ``data.tasks`` names a task that the suite lacks.
    """
    specs = {spec.name: spec for spec in select_tasks(data.suite, data.tasks)}
    names = list(specs)

    def episode(task: str, index: int, variant: Variant, instructed: str, record: bool) -> EpisodeSpec:
        limit, sentence = specs[task].max_steps, specs[instructed].instruction
        longer = settings.budget == "reference" and instructed == task and limit < REFERENCE_BUDGET
        steps, within = (REFERENCE_BUDGET, limit) if longer else (limit, 0)
        row = index * len(names) + names.index(task)
        common = (own_task(data.suite, task)[0], task, index, variant, instructed, sentence)
        return EpisodeSpec(*common, steps, settings.seed, row, record, within)

    episodes: list[EpisodeSpec] = []
    for variant in settings.variants:
        cells = [(index, task) for index in settings.states(settings.episodes_per_task) for task in names]
        episodes += [episode(t, i, variant, t, n < settings.videos) for n, (i, t) in enumerate(cells)]
    for variant in SWAPPED_VARIANTS:
        if variant in settings.variants:
            cells = [(index, task) for index in settings.states(settings.swapped_episodes) for task in names]
            pairs = [(i, t, _other_task(t, names, specs)) for i, t in cells]
            episodes += [episode(t, i, variant, other, False) for i, t, other in pairs if other is not None]
    return tuple(episodes)


def versions(compiled: bool = False) -> dict[str, str]:
    """Versions that may change a result; ``compiled``: whether compiled code plans."""
    found = _installed() | {"kernels": kernels.description() + (COMPILED if compiled else "")}
    return {**found, "wav": wav.__version__, "python": platform.python_version(), "machine": platform.machine()}


@functools.cache
def _installed() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@functools.cache
def code_digest() -> str:
    """Digest of the modules that decide an episode's result, comments left out."""
    return canonical_digest(module_digests(_ENTRIES))


def episode_key(
    spec: EpisodeSpec,
    *,
    checkpoint: str,
    statistics: str,
    conventions: Mapping[str, Any],
    planner: PlannerSettings,
    settings: EvalLiberoSettings,
    levels: Levels,
    compiled: bool = False,
) -> str:
    """Digest of everything that determines the episode's result; a finished record with this key is not repeated.

    How many episodes, variants and videos are asked for does not enter it, so asking for more keeps what is there.
    The padded batch shape and the place in it do: others may round differently.
    """
    return canonical_digest(
        {
            "episode": [spec.suite, spec.task, spec.init_index, spec.variant, spec.instruction, spec.max_steps],
            "seed": spec.seed,
            "execute_steps": settings.execute_steps,
            "batch": [settings.batch_size, spec.row % settings.batch_size],
            "planner": planner.model_dump(mode="json") if spec.variant != "unplanned" else planner.denoise_steps,
            "checkpoint": checkpoint,
            "levels": asdict(levels),  # no part of the weights: the same training may be planned with others
            "statistics": statistics,
            "conventions": dict(conventions),
            "versions": versions(compiled),
            "code": code_digest(),
        }
    )


def check_conventions(policy: Conventions, other: Conventions, name: str) -> None:
    """Refuse to run a policy on images, states or actions that mean something else than in its training.

    Raises:
        ConfigError: names the fields that differ, with both values.
    """
    differences = policy.difference(other)
    if differences:
        raise ConfigError(
            f"the policy's conventions differ from the {name}'s: {'; '.join(differences)}; "
            f"evaluate with the settings the policy was trained with, or train it on data made with these"
        )
