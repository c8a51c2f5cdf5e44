"""The suites that can be simulated, by name. A suite's modules are imported when it is first used, and no other's.

Several of LIBERO's suites are one as well (:mod:`wav.data.names`).
"""

from __future__ import annotations

import difflib
from importlib.metadata import version
from typing import TYPE_CHECKING

from wav.data.names import LIBERO_SUITES, in_libero, suites_of
from wav.errors import ConfigError
from wav.sim.arm import Expert
from wav.sim.env import SimEnv, TaskSpec

if TYPE_CHECKING:
    from wav.config import DataSettings

SUITES = ("tabletop", *LIBERO_SUITES)  #: Suites with a simulator.


def is_libero(suite: str) -> bool:
    """Whether the suite is one of LIBERO's; ConfigError with the nearest known name for one without simulator."""
    for name in suites_of(suite):
        if name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the suites are {', '.join(SUITES)}"
            raise ConfigError(f"data.suites: {name!r}: unknown suite{hint}")
    return in_libero(suite)


def has_simulator(suite: str) -> bool:
    """Whether ``suite`` can be simulated; False for the dataset of a robot that nobody simulates here.

    Raises:
        ConfigError: the name is nearly that of a suite with a simulator.
    """
    if not any(difflib.get_close_matches(name, SUITES, n=1) for name in suites_of(suite)):
        return False
    is_libero(suite)
    return True


def task_specs(suite: str) -> dict[str, TaskSpec]:
    """Tasks of ``suite`` by name; raises ConfigError for an unknown suite."""
    if is_libero(suite):
        from wav.sim.libero.tasks import task_specs

        return task_specs(suite)
    from wav.sim.tabletop.tasks import TASKS

    return dict(TASKS)


def select_tasks(suite: str, names: tuple[str, ...]) -> tuple[TaskSpec, ...]:
    """The named tasks of ``suite`` (all of them for an empty tuple); raises ConfigError with the nearest known name."""
    specs = task_specs(suite)
    for name in names:
        if name not in specs:
            near = difflib.get_close_matches(name, specs, n=1, cutoff=0.0)[0]
            raise ConfigError(f"data.tasks: {name!r} is no task of suite {suite!r}; did you mean {near!r}?")
    return tuple(specs[name] for name in (names or specs))


def make_env(suite: str, data: DataSettings) -> SimEnv:
    """Create a simulator of ``suite`` rendering as ``data`` says (image size, views, render mode)."""
    if is_libero(suite):
        from wav.sim.libero.env import LiberoEnv

        return LiberoEnv(data.model_copy(update={"suites": suites_of(suite)}))
    from wav.sim.tabletop.env import TabletopEnv

    return TabletopEnv(data)


def make_expert(suite: str, env: SimEnv, task: str) -> Expert:
    """The scripted expert of ``suite`` for one episode of the task that ``env`` was reset to."""
    if is_libero(suite):
        from wav.sim.libero.expert import LiberoExpert

        return LiberoExpert(env, task)  # type: ignore[arg-type]
    from wav.sim.tabletop.expert import TabletopExpert

    return TabletopExpert(env, task)  # type: ignore[arg-type]


def simulator_versions(suite: str = "tabletop") -> dict[str, str]:
    """What decides physics and pixels of ``suite``, recorded with data and evaluations: versions, LIBERO's assets.

    Raises:
        ServiceError: a LIBERO suite, and LIBERO is not ready here (:func:`wav.sim.libero.assets.bootstrap`).
    """
    if in_libero(suite):
        from wav.sim.libero import assets as libero_assets

        return libero_assets.simulator_versions()
    return {name: version(name) for name in ("mujoco", "robosuite")}


def initial_states_digest(suite: str) -> str:
    """Digests of LIBERO's initial states; empty for suites that draw theirs. DataError if of another release."""
    if not in_libero(suite):
        return ""
    from wav.sim.libero.tasks import init_digest

    return "+".join(init_digest(own) for own in suites_of(suite))
