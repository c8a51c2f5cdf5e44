"""What is checked before the first episode, whoever starts an evaluation, and recorded with its results.

Each of these costs a policy its success without any error: other versions of MuJoCo or robosuite, another render
setting, a gripper of the other sign, pictures upside down, initial states of another release.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wav.config import DataSettings
from wav.data.conventions import Conventions
from wav.data.store import EpisodeStore
from wav.evaluation.evaluate import check_start
from wav.evaluation.first_frames import check_first_frames
from wav.evaluation.verdict import ALLOW_VARIABLE, refuse_failed, report_path
from wav.io.files import read_json
from wav.policy.policy import Policy
from wav.sim.registry import initial_states_digest
from wav.sim.workers import SimPool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What an evaluation began with: section ``start`` of ``metrics.json``.

    ``simulator``: versions that decide physics and pixels; ``initial_states``: digest of LIBERO's files, else empty;
    ``renderer``: backend, device, OpenGL implementation; ``store``: digest of the demonstrations compared with, empty
    where there are none; ``replay``: verdict of `wav replay` on them; ``first_frames``: SSIM per view.
    """

    simulator: Mapping[str, str]
    render: str
    renderer: Mapping[str, str]
    initial_states: str
    store: str
    replay: str
    first_frames: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


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


def check_all(policy: Policy, data: DataSettings, *, pool: SimPool, out: Path, store: EpisodeStore | None) -> Start:
    """Refuse what would make the evaluation worthless; what it starts with otherwise.

    A refusal leaves its pictures in ``out``. ``store`` holds the demonstrations the policy was trained on, where at
    hand.

    Raises:
        ConfigError: a convention, version or render setting differs, the replay of the store failed, or the pictures
            look rotated or swapped; names field, values and remedy.
        DataError: LIBERO's initial states are of another release.
        SimulationError: a simulator failed.
    """
    check_start(policy, data, None if store is None else store.conventions)
    states = initial_states_digest(data.suite)
    replay, likeness = "no demonstrations at hand", []
    if store is not None:
        refuse_failed(store)
        replay = _verdict(store)
        likeness = check_first_frames(pool, store, data, out)
    found = Start(
        simulator=Conventions.for_simulator(data).simulator,
        render=data.render,
        renderer=pool.renderer(),
        initial_states=states,
        store="" if store is None else store.digest,
        replay=replay,
        first_frames=tuple(asdict(view) for view in likeness),
    )
    versions = ", ".join(f"{name} {version}" for name, version in found.simulator.items())
    log.info("start: %s; render %s with %s; replay: %s", versions, data.render, found.renderer["renderer"], replay)
    return found


def _verdict(store: EpisodeStore) -> str:
    """What `wav replay` said about this very store, which was not refused."""
    path = report_path(store.path)
    if not path.is_file():
        return "not replayed"
    verdict = read_json(path, "run `wav replay` again")
    if verdict["digest"] != store.digest:
        return "not replayed since the data changed"
    share = f"{100 * verdict['success_share']:.0f}% of {verdict['episodes']}"
    return f"passed, {share}" if verdict["passed"] else f"failed, {share}, allowed by {ALLOW_VARIABLE}"
