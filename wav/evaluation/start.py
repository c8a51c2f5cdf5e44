"""What is checked before the first episode, whoever starts an evaluation, and recorded with its results.

Each of these costs a policy its success without any error: other versions of MuJoCo or robosuite, another render
setting, a gripper of the other sign, pictures upside down, initial states of another release.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wav.config import DataSettings
from wav.data.conventions import Conventions
from wav.data.store import EpisodeStore
from wav.evaluation.evaluate import check_start
from wav.evaluation.first_frames import check_first_frames
from wav.evaluation.verdict import replay_verdict
from wav.policy.policy import Policy
from wav.sim.registry import initial_states_digest
from wav.sim.workers import SimPool

log = logging.getLogger(__name__)


def own_store(policy: Policy, path: Path) -> EpisodeStore | None:
    """The demonstrations at ``path`` if the policy was trained on them (its statistics are theirs), else None.

    Raises:
        DataError: there is a store and it is damaged.
    """
    if not path.is_dir():
        log.info("start: no demonstrations in %s to compare pictures and replay verdict with", path)
        return None
    store = EpisodeStore.open(path)
    known, statistics = policy.statistics, store.statistics
    if all(known.key(name) == statistics.key(name) for name in ("action", "state")):
        return store
    log.warning("start: %s holds other demonstrations than the policy's: pictures and verdict are not compared", path)
    return None


def check_all(
    policy: Policy, data: DataSettings, *, pool: SimPool, out: Path, store: EpisodeStore | None
) -> dict[str, Any]:
    """Refuse what would make the evaluation worthless; section ``start`` of ``metrics.json`` otherwise.

    A refusal leaves its pictures in ``out``. ``store`` holds the demonstrations the policy was trained on, where at
    hand.

    Returns:
        ``simulator``: versions that decide physics and pixels; ``renderer``: backend, device, OpenGL implementation;
        ``initial_states``: digest of LIBERO's files, else empty; ``store``: digest of the demonstrations, empty where
        there are none; ``replay``: verdict of `wav replay` on them; ``first_frames``: SSIM per view.

    Raises:
        ConfigError: a convention, version or render setting differs, the replay of the store failed, or the pictures
            look rotated or swapped; names field, values and remedy.
        DataError: LIBERO's initial states are of another release.
        SimulationError: a simulator failed.
    """
    check_start(policy, data, None if store is None else store.conventions)
    states = initial_states_digest(data.suite)
    replay = "no demonstrations at hand" if store is None else replay_verdict(store)
    likeness = [] if store is None else check_first_frames(pool, store, data, out)
    simulator, renderer = dict(Conventions.for_simulator(data).simulator), pool.renderer()
    versions = ", ".join(f"{name} {version}" for name, version in simulator.items())
    log.info("start: %s; render %s with %s; replay: %s", versions, data.render, renderer["renderer"], replay)
    return {
        "simulator": simulator,
        "render": data.render,
        "renderer": renderer,
        "initial_states": states,
        "store": "" if store is None else store.digest,
        "replay": replay,
        "first_frames": [asdict(view) for view in likeness],
    }
